"""How tables look."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(title: str, *headings: str, words: int = 1) -> Table:
    """The first columns hold words, the others numbers."""
    made = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < words else "right")
    return made


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def spread(row: dict) -> str:
    """How many times as fast, and between what."""
    colour = "green" if row["low"] > 1 else "red" if row["high"] < 1 else "yellow"
    return f"[{colour}]{row['speed']:.2f}[/] ({row['low']:.2f}-{row['high']:.2f})"
