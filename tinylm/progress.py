"""What a person sees while a run goes on: one live line, and lines that stay.

On a terminal the live line shows step, loss, tokens/s and the time left; elsewhere a plain line is
printed now and then. Everything goes to standard error: standard output is for results.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from pathlib import Path

from rich import progress as bars
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

EVERY = 10  # seconds between plain lines


class Progress:
    """Tells of one command's work; `live` where there is a terminal to redraw."""

    def __init__(self):
        self.console = Console(file=sys.stderr, highlight=False)
        self.live = self.console.is_terminal
        self.bar, self.task, self.smooth, self.spoke = None, None, None, 0.0

    def say(self, text: str, style: str = "", indent: int = 0) -> None:
        told = Padding.indent(Text(text, style), indent) if self.live else Text(" " * indent + text)
        self.console.print(told, soft_wrap=not self.live)  # a file wraps nothing

    def left_out(self, data: Path, places: list[str], what: str) -> None:
        """Tell which rows of a file are not used, if any, and why."""
        if places:
            kind = places[0].split()[0]  # "line", or "row"
            shown = ", ".join(place.removeprefix(f"{kind} ") for place in places[:20])
            shown += ", …" if len(places) > 20 else ""
            told = f"{data}: {len(places)} rows {what} and are left out: {kind} {shown}"
            self.say(told, "yellow")

    def given_chat_tokens(self, model: Path, tokens: list[str] | None) -> None:
        if tokens:
            self.say(f"{model} has no chat tokens: added {', '.join(tokens)}", "yellow")

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.print(Rule(Text(text, "bold"), align="left"))

    @contextmanager
    def counting(self, what: str, total: int):
        """A bar over `total` bytes; yields the function to tell of every n more."""
        columns = ("{task.description}", bars.BarColumn(), bars.DownloadColumn())
        rest = (bars.TransferSpeedColumn(), bars.TimeRemainingColumn(elapsed_when_finished=True))
        with bars.Progress(*columns, *rest, console=self.console, disable=not self.live) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.advance(task, n)
        if not self.live:
            self.say(f"{what}: {total / 1e6:.1f} MB")

    @contextmanager
    def training(self, trainer):
        self.smooth = None
        bar = [bars.BarColumn()] if self.console.width >= 80 else []  # the numbers say as much
        columns = ("{task.description}", *bar, "{task.fields[numbers]}")
        with bars.Progress(*columns, console=self.console, disable=not self.live) as self.bar:
            self.task = self.bar.add_task(trainer.stage.name, total=1.0, numbers="")
            yield

    def step(self, trainer, row: dict) -> None:
        what = "reward" if "reward" in row else "loss"
        if row[what] is not None:
            old = self.smooth if self.smooth is not None else row[what]
            self.smooth = 0.95 * old + 0.05 * row[what]
        share = trainer.share_done()
        left = trainer.seconds * (1 - share) / share if share else 0.0
        of = f" of {trainer.config.max_steps}" if trainer.config.max_steps else ""
        mean = "-" if self.smooth is None else f"{self.smooth:.3f}"
        speed = f"{row['tokens_per_second']:,} tokens/s"
        numbers = f"step {row['step']}{of}  {what} {mean}  {clock(left)} left  {speed}"
        if self.live:
            name = trainer.stage.name
            self.bar.update(self.task, description=name, completed=share, numbers=numbers)
        elif time.monotonic() - self.spoke > EVERY:
            self.spoke = time.monotonic()
            self.say(f"{trainer.stage.name}: {numbers}")

    def evaluating(self, trainer) -> None:
        """The line stands still for longer than a step takes: it says why."""
        if self.live:
            self.bar.update(self.task, description=f"{trainer.stage.name}: evaluating")

    def evaluation(self, trainer, found: dict) -> None:
        if self.live:
            self.bar.update(self.task, description=trainer.stage.name)
        known = {
            "loss": "held-out loss {:.4f}",
            "bits_per_byte": "{:.3f} bits per byte",
            "accuracy": "{:.1%} of held-out pairs told apart",
            "held_out_reward": "held-out reward {:.3f}",
            "win_rate": "{:.0%} of the latest comparisons won",
            "reward_before": "(before feedback {:.3f})",
        }
        numbers = [known[k].format(found[k]) for k in known if k in found]
        if found.get("xz_bits_per_byte"):
            numbers.append(f"(xz {found['xz_bits_per_byte']:.3f})")
        if numbers:
            told = ", ".join(numbers).replace(", (", " (")
            self.say(f"step {trainer.step}: {told}", "bold")
        if found.get("sample"):
            self.say(" ".join(found["sample"].split()), "dim", indent=2)


def table(title: str, *headings: str, words: int = 1, **style) -> Table:
    """The first columns hold words, the others numbers."""
    left = {"title_justify": "left", "caption_justify": "left"}
    made = Table(title=title, title_style="bold", box=SIMPLE_HEAD, **left, **style)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="left" if i < words else "right")
    return made


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
