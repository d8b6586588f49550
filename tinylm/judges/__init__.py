"""Who judges answers. verifier.py: a Python function of each of them; reward.py: a reward model;
model.py: another model; endpoint.py: one behind an address; human.py: a person. choice.py makes one
of the settings, watch.py tells whether one is outwitted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

from tinylm.chat import ChatFormat, Row
from tinylm.data import Asked

AT_ONCE = 16  # prompts with their answers, or questions, in one forward of a model that judges


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


def by_reading(
    groups: list[Group], form: ChatFormat, most: int, scores: Callable[[list[Asked]], list]
) -> list[list[float | None]]:
    """The scores of all answers that fit a context of `most` tokens, some prompts at a time."""
    asked = [form.asked(group.row.messages, group.answers) for group in groups]
    fits = [[len(prompt) + len(ids) <= most for ids in answers] for prompt, answers in asked]
    short = [(p, [*compress(of, fit)]) for (p, of), fit in zip(asked, fits) if any(fit)]
    found = iter(in_parts(short, scores))
    return [[next(found) if fit else None for fit in some] for some in fits]


def in_parts(items: list, scores: Callable[[list], list]) -> list:
    """scores(items), AT_ONCE of them at a time."""
    parts = (items[i : i + AT_ONCE] for i in range(0, len(items), AT_ONCE))
    return [score for part in parts for score in scores(part)]
