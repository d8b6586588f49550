"""Instruction fine-tuning: a base model learns the form of an answer from conversations.

Loss falls on what the assistant says, the end of its turn included, and on nothing else. Several
conversations share a row, and none sees another. What the model knows is still what pre-training
left in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy
from rich.text import Text

from tinylm import checkpoint
from tinylm.chat import ChatFormat, Row, as_prompt, read_conversations
from tinylm.data import Batch, Example, Packed, is_held_out, packed_batch, source_of
from tinylm.errors import InputError
from tinylm.progress import Progress
from tinylm.settings import EpochConfig, Plan, setting
from tinylm.stage import Stage
from tinylm.tensor import no_grad
from tinylm.tokenizer import Tokenizer
from tinylm.train import train


@dataclass
class SFTConfig(EpochConfig):
    """Fine-tuning: how long, and how fast."""

    epochs: float = setting(3.0, "Times through the data, where no --max-steps or --minutes is.")
    learning_rate: float = setting(5e-4, "Peak learning rate.")
    held_out: float = setting(0.05, "Share of the conversations held out for evaluation.")


class SFT(Stage):
    """The stage: packed conversations, and the loss on their answers."""

    name, recordable = "sft", True
    about = """An assistant made by tinylm

It has been taught to answer; what it knows is from pre-training."""
    others = "another model or other data: name the same ones"
    found = (("loss", "- loss on held-out answers {loss:.4f} nats per token"),)

    def __init__(self, model, tokenizer, rows: list[Row], examples: list[Example], config, source):
        super().__init__(model, tokenizer, config, source)
        out = [is_held_out(i, config.held_out) for i in range(len(examples))]
        self.heldout_rows, self.heldout = [*compress(rows, out)], [*compress(examples, out)]
        train = [example for example, held in zip(examples, out) if not held]
        self.n_train = len(train)
        self.packed = Packed(train, config.block_size, config.seed, model.config.stop_ids[0])
        asked = [as_prompt(row.messages) for row in (self.heldout_rows or rows)[:4]]
        self.shown = {"mask": masked(tokenizer, *examples[0]), "prompts": asked}  # by the report

    def draw(self) -> Batch:
        return self.packed.draw(self.config.batch_size)

    def evaluate(self, final: bool) -> dict:
        """Loss on held-out answers, and what it now says to the first held-out question."""
        if not self.heldout:
            return {}
        total, tokens, size = 0.0, 0, self.config.batch_size
        for i in range(0, len(self.heldout) if final else min(4 * size, len(self.heldout)), size):
            rows = [[example] for example in self.heldout[i : i + size]]
            batch = packed_batch(rows, self.packed.padding)
            with no_grad():
                total += float(self.loss(batch).data.sum(dtype="float64"))
            tokens += batch.trained_tokens()
        asked = as_prompt(self.heldout_rows[0].messages)
        return {"loss": total / tokens, "sample": self.sample(asked)}

    def state(self) -> dict:
        place = {"epoch": self.packed.epoch, "row": self.packed.row}
        return {**place, **super().state(), **self.shown}

    def restore(self, state: dict) -> None:
        if not isinstance(state["source"][0], str):  # of an older run, which did not note its base
            self.source = self.source[1:]
        super().restore(state)
        self.packed.seek(state["epoch"], state["row"])

    def facts(self) -> dict[str, str]:
        parts = f"{self.n_train:,} to train on, {len(self.heldout):,} held out"
        return {**super().facts(), "conversations": parts}


def run(base: Path, data: Path, plan: Plan) -> dict:
    """Fine-tune the model in directory base on a file of conversations; returns the results."""
    model, tokenizer, added = checkpoint.load_for_chat(base)
    plan.progress.given_chat_tokens(base, added)
    plan.open_with(SFT.name, model, base)
    rows, examples = read_examples(data, tokenizer, plan.config.block_size, plan.progress)
    source = [checkpoint.digest(base), *source_of([data])]
    stage = SFT(model, tokenizer, rows, examples, plan.config, source)
    plan.config.end_after_epochs(len(stage.packed.rows))
    plan.progress.say(
        f"{stage.n_train:,} conversations to learn from, {len(stage.heldout):,} held out: "
        f"{sum(sum(learned) for _, learned in examples):,} tokens of answers"
    )
    return train(stage, plan, conversations=stage.n_train)


def read_examples(
    data: Path, tokenizer: Tokenizer, block_size: int, progress: Progress
) -> tuple[list[Row], list[Example]]:
    """The conversations that fit the context, as ids and masks; the others are told by place."""
    form = ChatFormat(tokenizer)
    rows, examples, long, empty = [], [], [], []
    for row in read_conversations(data):
        try:
            example = form.example(row.messages)
        except InputError as error:
            raise InputError(f"{data}, {row.place}: {error}") from None
        if len(example[0]) > block_size + 1:
            long.append(row.place)
        elif not any(example[1][1:]):
            empty.append(row.place)
        else:
            rows.append(row)
            examples.append(example)
    progress.left_out(data, long, f"do not fit the context of {block_size} tokens")
    progress.left_out(data, empty, "leave nothing to learn")
    if not examples:
        raise InputError(
            f"{data}: no conversation fits the context of {block_size} tokens: leave out turns, or "
            "pre-train a base with a longer one, --block-size"
        )
    return rows, examples


def masks(base: Path, data: Path, n: int, progress: Progress) -> list[list[tuple[str, bool]]]:
    """The first n conversations as the model reads them, each in parts: (text, learned)."""
    model, tokenizer, added = checkpoint.load_for_chat(base)
    progress.given_chat_tokens(base, added)
    _, examples = read_examples(data, tokenizer, model.config.block_size, progress)
    return [masked(tokenizer, ids, learned) for ids, learned in examples[:n]]


def coloured(parts: list[tuple[str, bool]]) -> Text:
    """An example with the learned tokens in green."""
    return Text.assemble(*((text, "bold green" if on else "dim") for text, on in parts))


def masked(tokenizer: Tokenizer, ids: list[int], learned: list[bool]) -> list[tuple[str, bool]]:
    """An example cut where what is learned begins and ends: (text, whether it is learned)."""
    edges = numpy.flatnonzero(numpy.diff([-1, *learned, -1]))
    return [
        (tokenizer.decode(ids[first:end], continues=bool(first > 0)), bool(learned[first]))
        for first, end in zip(edges, edges[1:])
    ]
