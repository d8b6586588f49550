"""The judge that is another model of this kind: any directory that tinylm opens and chats with.

likelihood   the mean log-probability, in nats, of an answer's tokens, its end of turn included:
             what the judge would say itself scores best. Sound for a small model, which can write
             but not discuss; the mean, because a sum would prefer short answers
pairwise     log P("A") − log P("B") as its reply to the question which of two answers is better;
             for a model that follows instructions
"""

from __future__ import annotations

import numpy

from tinylm import backend, checkpoint
from tinylm.chat import ChatFormat, turn
from tinylm.data import Asked, SharedPrompts
from tinylm.errors import InputError
from tinylm.generate import read
from tinylm.judges import Group, Judge, by_reading, in_parts
from tinylm.judges.pairwise import agreement, compare
from tinylm.tensor import no_grad

MODES = ("likelihood", "pairwise")


class Model(Judge):
    """What does not fit its context gets no judgement."""

    trouble = "too long for the context of --judge-model"

    def __init__(self, folder: str, mode: str):
        if not folder:
            raise InputError("--judge model: name its directory, --judge-model DIR")
        if mode not in MODES:
            raise InputError(f"--judge-mode {mode}: a model judges by {' or '.join(MODES)}")
        self.model, tokenizer, added = checkpoint.load_for_chat(folder, writes=False)
        if self.model.config.scores:
            raise InputError(f"{folder} is a reward model: use --judge reward-model for it")
        if added is not None:
            raise InputError(f"--judge-model {folder}: it was never fine-tuned to answer")
        self.form = ChatFormat(tokenizer, f"the chat template of --judge-model {folder}")
        self.mode, self.agreed = mode, []
        if mode == "pairwise":
            _, replies = self.form.asked([turn("user", "A or B?")], ["A", "B"])
            (self.a, *end), (self.b, *other) = replies  # as ids, with the ends of the turns
            if self.a == self.b or end != other:
                raise InputError(
                    f"--judge-model {folder}: A and B are no tokens to it; use likelihood"
                )

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        if self.mode == "pairwise":
            scores, agreed = compare(groups, self.verdicts, in_nats=True)
            self.agreed += agreed
            return scores
        return by_reading(groups, self.form, self.model.config.block_size, self.likelihoods)

    def notes(self) -> dict[str, float]:
        agreed, self.agreed = self.agreed, []
        return agreement(agreed)

    def likelihoods(self, prompts: list[Asked]) -> list[float | None]:
        """None for an answer of no tokens: empty, by a template that writes no end of turn."""
        batch = SharedPrompts.of(prompts, self.model.config.block_size)
        with no_grad():
            nll = self.model.loss(batch.tokens, batch.targets, batch.start, gap=batch.gap).data
        said = batch.answer >= 0
        whose, nll, n = batch.answer[said], backend.to_numpy(nll)[said], len(batch.ends)
        sums, counts = numpy.bincount(whose, nll, n), numpy.bincount(whose, minlength=n)
        return [-s / c if c else None for s, c in zip(sums.tolist(), counts.tolist())]

    def verdicts(self, questions: list[str]) -> list[float | None]:
        rows = [self.form.ids([turn("user", question)], True) for question in questions]
        fits = [len(ids) <= self.model.config.block_size for ids in rows]
        short = [ids for ids, fit in zip(rows, fits) if fit]
        found = iter(in_parts(short, self.log_odds))
        return [next(found) if fit else None for fit in fits]

    def log_odds(self, rows: list[list[int]]) -> list[float]:
        with no_grad():
            logits, _, _ = read(self.model, rows, 1)
        return (logits[:, self.a] - logits[:, self.b]).tolist()
