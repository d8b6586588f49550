"""Sampled answers as a batch: how likely each token was, and what it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from tinylm import backend, ops
from tinylm.data import SharedPrompts
from tinylm.model import Transformer
from tinylm.tensor import Array, Tensor, no_grad

EXACT_KL = 8192  # vocabularies up to this size have their KL summed, larger ones estimated
KEPT = {"tokens": "int64", "targets": "int64", "start": "int32", "gap": "int32", "answer": "int64",
        "old_logp": "float32", "advantages": "float64"}  # fmt: skip


@dataclass
class Answers(SharedPrompts):
    """Prompts with their sampled answers; each is learned with its end of turn."""

    old_logp: Array = None  # (B, T): log π_old of each target, 0 elsewhere
    advantages: Array = None  # (B, T): of the target's answer, 0 elsewhere
    length: int = 1  # L_max
    nll: Tensor | None = None  # −log π_old with its tape, for the first update's backward

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
        pending = [backend.to_numpy(getattr(self, name)).tolist() for name in KEPT]
        return {"pending": pending, "notes": self.notes, "harm": self.harm}

    @classmethod
    def of_state(cls, state: dict, length: int) -> Answers:
        pending = zip(KEPT.items(), state["pending"], strict=True)
        made = {name: numpy.array(x, kind) for (name, kind), x in pending}
        for name in ("old_logp", "advantages"):
            made[name] = backend.asarray(made[name])
        return cls(**made, notes=state["notes"], harm=state.get("harm", ""), length=length)


def opinion(model: Transformer, batch: Answers) -> tuple[Tensor, Array | None]:
    """−log π of each target (B, T), and log π of all tokens in their place (targets, V) if these
    are few."""
    hidden, head = model.hidden(batch.tokens, batch.start, gap=batch.gap), model.head_weight
    targets = backend.asarray(batch.targets)
    nll = ops.linear_cross_entropy(hidden, head, targets, even=False)
    if model.config.vocab_size > EXACT_KL:
        return nll, None
    known = targets >= 0
    with no_grad():
        logits = ops.linear(Tensor(hidden.data[known]), head).data
    at_target = logits[backend.xp.arange(len(logits)), targets[known]]
    logits -= (nll.data[known] + at_target)[:, None]  # log Σ exp logits
    return nll, logits
