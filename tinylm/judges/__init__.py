"""Who judges answers: verifier.py, a Python function of each answer.

A judge maps groups of answers to scores; None means "no judgement".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tinylm.chat import Row


@dataclass
class Group:
    """Several answers to one prompt, which is a row of the prompts file."""

    row: Row
    answers: list[str]


Judge = Callable[[list[Group]], list[list[float | None]]]
