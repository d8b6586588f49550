"""Who judges answers. verifier.py: a Python function of each of them; reward.py: a reward model;
model.py: another model; endpoint.py: one behind an address; human.py: a person. choice.py makes one
of the settings, watch.py tells whether one is outwitted.

A judge maps groups of answers to scores; None means "no judgement". It may also have `notes()`,
numbers for the log since the last call; `summary()`, those of the whole run; `begin(place, rows)`,
told before answers to these prompts are written, which may return those of an earlier time;
`hear(row, token)`, told while they are; `attending(stage, folder, progress)`, a context around the
whole run; and `trouble`, why it had nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tinylm.chat import Row


@dataclass
class Group:
    """Several answers to one prompt, which is a row of the prompts file."""

    row: Row
    answers: list[str]
    place: int | None = None  # in the stream of prompts that are learned from
    ids: list[list[int]] = field(default_factory=list)
    logp: list[list[float]] = field(default_factory=list)  # log π_old of each of the ids


Judge = Callable[[list[Group]], list[list[float | None]]]
