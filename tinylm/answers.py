"""Sampled answers as a batch: whose each token is, how likely it was, and what it is worth.

A prompt is read once. In a row it lies before all answers to it, of which each begins with the
prompt's last token, from which its first is predicted, and does not see those before it:

    tokens    p p p p a a a p b b p c c c       targets    . . . a a a $ b b $ c c c $
              prompt ────────┘                             the answers aaa$, bb$, ccc$
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy

from tinylm import backend, ops
from tinylm.data import Batch, first_fit
from tinylm.judges import Group
from tinylm.model import Transformer
from tinylm.tensor import Array, Tensor, no_grad

ROW = 128  # tokens to a row, if no prompt needs more: little padding, little attention
EXACT_KL = 8192  # vocabularies up to this size have their KL summed, larger ones estimated
KEPT = {"tokens": "int64", "targets": "int64", "start": "int32", "gap": "int32", "answer": "int64",
        "old_logp": "float32", "advantages": "float64"}  # fmt: skip


@dataclass
class Answers(Batch):
    """Prompts with their sampled answers, several to a row; targets are the answers' tokens."""

    gap: Array = None  # (B, T, 2): the answers between a token and its prompt
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
        pending = zip(KEPT.items(), state["pending"], strict=True)
        made = {name: numpy.array(x, kind) for (name, kind), x in pending}
        for name in ("old_logp", "advantages"):
            made[name] = backend.asarray(made[name])
        return cls(**made, notes=state["notes"], harm=state.get("harm", ""), length=length)


def answer_batch(groups: list[Group], padding: int, most: int, length: int) -> Answers:
    """Prompts with their answers, as many to a row as fit.

    A row has ROW tokens or what the largest group needs, within `most`, the model's context. An
    answer is learned with its end of turn.  length: L_max
    """
    alone = max(len(group.prompt) - 1 + len(ids) for group in groups for ids in group.ids)
    whole = max(len(group.prompt) - 1 + sum(map(len, group.ids)) for group in groups)
    width = max(min(most, max(ROW, whole)), alone)
    parts, sizes = [], []  # a prompt and answers to it that lie together in a row
    numbered = itertools.count()
    for group in groups:
        room = 0
        for ids in group.ids:
            if len(ids) > room:
                parts.append((group.prompt, []))
                sizes.append(len(group.prompt) - 1)
                room = width - sizes[-1]
            parts[-1][1].append((next(numbered), ids))
            sizes[-1] += len(ids)
            room -= len(ids)

    rows = first_fit(sizes, width)
    shape = len(rows), max(sum(sizes[i] for i in row) for row in rows)
    tokens, start = numpy.full(shape, padding), numpy.zeros(shape, "int32")
    gap = numpy.zeros((*shape, 2), "int32")
    targets, answer = numpy.full((2, *shape), -1)
    for r, row in enumerate(rows):
        at = 0
        for prompt, said in (parts[i] for i in row):
            start[r, at:] = at
            end = at + len(prompt) - 1
            tokens[r, at:end] = prompt[:-1]
            at = end
            for number, ids in said:
                here = r, slice(at, at + len(ids))
                tokens[here], targets[here] = [prompt[-1], *ids[:-1]], ids
                gap[here], answer[here] = (end, at), number
                at += len(ids)
        start[r, at:] = at
    return Answers(tokens, targets, start, gap=gap, answer=answer, length=length)


def opinion(model: Transformer, batch: Answers) -> tuple[Tensor, Array | None]:
    """−log π of each target (B, T), and all logits of the answers' tokens if these are few."""
    hidden, head = model.hidden(batch.tokens, batch.start, gap=batch.gap), model.head_weight
    targets = backend.asarray(batch.targets)
    nll = ops.linear_cross_entropy(hidden, head, targets, even=False)
    if model.config.vocab_size > EXACT_KL:
        return nll, None
    with no_grad():
        return nll, ops.linear(Tensor(hidden.data[targets >= 0]), head).data
