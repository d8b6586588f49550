"""How tables look."""

from __future__ import annotations

from functools import partial

from rich.box import SIMPLE_HEAD

from tinylm import progress

# The first columns hold words, the others numbers.
table = partial(progress.table, title_style="bold", title_justify="left", box=SIMPLE_HEAD)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def spread(row: dict) -> str:
    """How many times as fast, and between what."""
    colour = "green" if row["low"] > 1 else "red" if row["high"] < 1 else "yellow"
    return f"[{colour}]{row['speed']:.2f}[/] ({row['low']:.2f}-{row['high']:.2f})"
