"""Who judges answers. verifier.py: a Python function of each of them; reward.py: a reward model;
model.py: another model; endpoint.py: one behind an address; human.py: a person. choice.py makes one
of the settings, watch.py tells whether one is outwitted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tinylm.chat import Row


@dataclass
class Group:
    """Several answers to one prompt, which is a row of the prompts file."""

    row: Row
    answers: list[str]
    place: int | None = None  # in the stream of prompts that are learned from
    prompt: list[int] = field(default_factory=list)  # as ids
    ids: list[list[int]] = field(default_factory=list)  # of the answers
    logp: list[list[float]] = field(default_factory=list)  # log π_old of each of the ids
    scores: list[float | None] = field(default_factory=list)  # what the judge said


class Judge:
    """Maps groups of answers to scores; the rest are occasions that most judges let pass."""

    trouble = ""  # why it had nothing to say

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        """A score of each answer; None: no judgement."""
        raise NotImplementedError

    def attending(self, stage, folder: Path, progress) -> AbstractContextManager:
        """A context around the whole run."""
        return nullcontext()

    def begin(self, place: int, rows: list[Row]) -> list[list[int]] | None:
        """Told before answers to these prompts are written; may return those of an earlier time."""

    def hear(self, row: int, token: int) -> None:
        """Told of each token while they are written."""

    def notes(self) -> dict[str, float]:
        """Numbers for the log since the last call."""
        return {}

    def summary(self) -> dict[str, float]:
        """Numbers of the whole run."""
        return {}


def by_group(groups: list[Group], scores: Iterable[float | None]) -> list[list[float | None]]:
    """The scores of all answers, one after another, as those of each group."""
    scores = iter(scores)
    return [[next(scores) for _ in group.answers] for group in groups]
