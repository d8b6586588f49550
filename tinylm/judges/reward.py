"""The judge that was trained: a reward model, made by `tinylm reward` from preferences.

It reads each answer by itself, with its own tokenizer and chat template, and gives a score in nats:
of two answers, the one with a score of s more is preferred with a probability of σ(s).
"""

from __future__ import annotations

from tinylm import backend, checkpoint
from tinylm.chat import ChatFormat
from tinylm.data import Asked, SharedPrompts
from tinylm.errors import InputError
from tinylm.judges import Group, Judge, by_reading
from tinylm.model import Transformer
from tinylm.tensor import no_grad


def to_be_read(prompts: list[Asked]) -> list[Asked]:
    """So that answers are read to their last token, though none is predicted from it."""
    return [(prompt, [[*ids, 0] for ids in answers]) for prompt, answers in prompts]


def scores(model: Transformer, prompts: list[Asked]) -> list[float]:
    """A reward model's score of every answer."""
    batch = SharedPrompts.of(to_be_read(prompts), model.config.block_size)
    with no_grad():
        made = model.scores(batch.tokens, batch.ends, batch.start, batch.gap).data
    return backend.to_numpy(made).astype("float64").tolist()


class RewardModel(Judge):
    """An answer that does not fit its context gets no judgement."""

    trouble = "too long for the context of --reward-model"

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
        self.form = ChatFormat(tokenizer, f"the chat template of --reward-model {folder}")

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        most = self.model.config.block_size
        return by_reading(groups, self.form, most, lambda prompts: scores(self.model, prompts))
