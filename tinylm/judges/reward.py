"""The judge that was trained: a reward model, made by `tinylm reward` from preferences.

It reads each answer by itself, with its own tokenizer and chat template, and gives a score in nats:
of two answers, the one with a score of s more is preferred with a probability of σ(s).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from tinylm import backend, checkpoint
from tinylm.chat import ChatFormat
from tinylm.errors import InputError
from tinylm.judges import Group, Judge, by_group
from tinylm.model import Transformer
from tinylm.tensor import no_grad


def pad_right(rows: Sequence[list[int]]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Rows of unequal length as one (B, T) array, and their lengths (B,)."""
    width = max(map(len, rows))
    tokens = numpy.array([[*row, *[0] * (width - len(row))] for row in rows])
    return tokens, numpy.array([len(row) for row in rows])


def scores(model: Transformer, rows: Sequence[list[int]], batch_size: int = 64) -> numpy.ndarray:
    """A reward model's score of every row of ids, (len(rows),)."""
    found = [numpy.zeros(0)]
    for i in range(0, len(rows), batch_size):
        with no_grad():
            made = model.scores(*pad_right(rows[i : i + batch_size])).data
        found.append(backend.to_numpy(made).astype("float64"))
    return numpy.concatenate(found)


class RewardModel(Judge):
    """An answer that does not fit its context gets no judgement."""

    def __init__(self, folder: str):
        if not folder:
            raise InputError("--judge reward-model: name its directory, --reward-model DIR")
        self.model, tokenizer = checkpoint.load(folder)
        if not self.model.config.scores:
            raise InputError(
                f"--reward-model {folder}: this model writes text and scores none: make a reward "
                f"model of it with  tinylm reward {folder} --data PREFERENCES --out DIR"
            )
        if tokenizer is None:
            raise InputError(f"--reward-model {folder}: no tokenizer.json, so it cannot read")
        if tokenizer.eos_id is None or tokenizer.eos_id not in self.model.config.stop_ids:
            raise InputError(
                f"--reward-model {folder}: its tokenizer ends a turn with {tokenizer.eos_id}, but "
                f"its config.json with {self.model.config.stop_ids}: these files do not belong "
                "together"
            )
        self.form = ChatFormat(tokenizer)

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        rows = [
            self.form.answered(group.row.messages, answer)
            for group in groups
            for answer in group.answers
        ]
        fits = [len(row) <= self.model.config.block_size for row in rows]
        found = iter(scores(self.model, [row for row, fit in zip(rows, fits) if fit]))
        return by_group(groups, [float(next(found)) if fit else None for fit in fits])
