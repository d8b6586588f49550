"""How numbers look in tables."""

from __future__ import annotations


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def spread(row: dict) -> str:
    """How many times as fast, and between what."""
    colour = "green" if row["low"] > 1 else "red" if row["high"] < 1 else "yellow"
    return f"[{colour}]{row['speed']:.2f}[/] ({row['low']:.2f}-{row['high']:.2f})"
