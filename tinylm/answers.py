"""Sampled answers as a batch: whose each token is, how likely it was, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from tinylm import backend, ops
from tinylm.data import Batch, first_fit, packed_batch
from tinylm.judges import Group
from tinylm.model import Transformer
from tinylm.tensor import Array, Tensor, no_grad

ROW = 128  # tokens to a row of answers, if none is longer: little padding, little attention
EXACT_KL = 8192  # vocabularies up to this size have their KL summed, larger ones estimated
KEPT = {"tokens": "int64", "targets": "int64", "start": "int32", "answer": "int64",
        "old_logp": "float32", "advantages": "float64"}  # fmt: skip


@dataclass
class Answers(Batch):
    """Prompts with their sampled answers, several to a row; targets are the answers' tokens."""

    answer: numpy.ndarray = None  # (B, T): whose token a target is, −1 where none is
    old_logp: Array = None  # (B, T): log π_old of each target, 0 elsewhere
    advantages: Array = None  # (B, T): of the target's answer, 0 elsewhere
    length: int = 1  # L_max
    nll: Tensor | None = None  # −log π_old with its tape: what the first update undoes

    def denominator(self) -> int:
        return (int(self.answer.max()) + 1) * self.length

    def by_answer(self, values: Array) -> list[numpy.ndarray]:
        """values (B, T) as one array for each answer's tokens."""
        values = backend.to_numpy(values)
        return [values[self.answer == i] for i in range(int(self.answer.max()) + 1)]

    def learns(self) -> bool:
        return bool(self.advantages.any())

    def state(self) -> dict:
        """As JSON, in which floats survive to the bit."""
        kept = (getattr(self, name) for name in KEPT)
        pending = [backend.to_numpy(x).tolist() for x in kept]
        return {"pending": pending, "notes": self.notes, "harm": self.harm}

    @classmethod
    def of_state(cls, state: dict, length: int) -> Answers:
        pending = zip(KEPT.items(), state["pending"])
        made = {name: numpy.array(x, kind) for (name, kind), x in pending}
        for name in ("old_logp", "advantages"):
            made[name] = backend.asarray(made[name])
        return cls(**made, notes=state["notes"], harm=state.get("harm", ""), length=length)


def answer_batch(groups: list[Group], padding: int, most: int, length: int) -> Answers:
    """Prompts with their answers, as many to a row as fit ROW tokens, or one that is longer.

    An answer is learned with its end of turn.  most: the model's context; length: L_max.
    """
    examples = [
        ([*group.prompt, *answer], [False] * len(group.prompt) + [True] * len(answer))
        for group in groups
        for answer in group.ids
    ]
    sizes = [len(ids) - 1 for ids, _ in examples]
    rows = first_fit(sizes, max(min(ROW, most), *sizes))
    batch = packed_batch([[examples[i] for i in row] for row in rows], padding)
    whose = numpy.full_like(batch.targets, -1)
    for places, row in zip(whose, rows):
        order = numpy.repeat(row, [sizes[i] for i in row])
        places[: len(order)] = order
    whose[batch.targets < 0] = -1
    return Answers(batch.tokens, batch.targets, batch.start, answer=whose, length=length)


def opinion(model: Transformer, batch: Answers) -> tuple[Tensor, Array | None]:
    """−log π of each target (B, T), and all logits of the answers' tokens if these are few."""
    hidden, head = model.hidden(batch.tokens, batch.start), model.head_weight
    targets = backend.asarray(batch.targets)
    nll = ops.linear_cross_entropy(hidden, head, targets, even=False)
    if model.config.vocab_size > EXACT_KL:
        return nll, None
    with no_grad():
        return nll, ops.linear(Tensor(hidden.data[targets >= 0]), head).data
