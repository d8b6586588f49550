"""What a stage brings to the loop of train.py: its model, its data and its loss.

Here is what the stages have in common; each of them is a class in stages/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from tinylm.data import Batch
from tinylm.errors import InputError
from tinylm.generate import answers
from tinylm.model import Transformer
from tinylm.settings import TrainConfig
from tinylm.tensor import Tensor
from tinylm.tokenizer import Tokenizer


class Stage(ABC):
    """What the loop needs to know of a stage; the config's numbers mean the same to all of them.

    source: what is learned from, by which a resumed run knows it again: name and bytes of files,
    and perhaps, in front, the digest of a model.
    """

    name: str
    about: str  # of its models, for the card: a title, and a paragraph
    others: str  # what a run was begun with if its source is another one, and what to do about it
    found: tuple[tuple[str, str], ...] = ()  # (a result, the line of the card if it is there)
    cautious = False  # after harm, the loop goes back to earlier weights and calls recover()
    stopping = False  # the loop was asked to stop after this step: nobody is waited for
    recordable = False  # its loss depends on a batch's tokens, targets and start alone

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, config: TrainConfig, source: list
    ):  # fmt: skip
        self.model, self.tokenizer, self.config, self.source = model, tokenizer, config, source

    @abstractmethod
    def draw(self) -> Batch:
        """The next rows; advances the position in the data."""

    def loss(self, batch: Batch) -> Tensor:
        """Loss per token, (B, T)."""
        return self.model.loss(batch.tokens, batch.targets, batch.start)

    @abstractmethod
    def evaluate(self, final: bool) -> dict[str, Any]:
        """Numbers on held-out data, and perhaps a sample; must not touch the state below."""

    def memory(self) -> tuple[int, int, int]:
        """Tokens to a row of --batch-size, at the most; floats kept besides, and of these more for
        each row: what a run takes is foreseen by these."""
        return self.config.block_size, 0, 0

    def sample(self, messages: list[dict]) -> str:
        """What the model now answers, for people to see."""
        (said,) = answers(self.model, self.tokenizer, [messages], max_new_tokens=60)
        return f"{messages[-1]['content']} -> {said}"

    def state(self) -> dict:
        """Position in the data and random states, as JSON."""
        return {"source": self.source}

    def restore(self, state: dict) -> None:
        """Continue from such a state. Raises InputError where it is of other data."""
        if state["source"] != self.source:
            raise InputError(f"this run was begun with {self.others}")

    def facts(self) -> dict[str, str]:
        """What the model card says before there are results; what is empty is left out."""
        return {
            "stage": self.name,
            "parameters": f"{self.model.n_parameters():,}",
            "context": f"{self.model.config.block_size} tokens",
            "knowledge cut-off": self.config.cutoff,
        }

    def numbers(self, results: dict) -> list[str]:
        """Lines of the model card about the results."""
        found = ("steps", "- {steps} steps, {seconds:.0f} seconds"), *self.found
        return [line.format(**results) for key, line in found if key in results]

    def card(self, results: dict) -> str:
        """The model card, Markdown: what a run directory says of itself to people."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in self.facts().items() if value)
        found = "\n".join(self.numbers(results)) if results else "not finished yet"
        files = [each for each in self.source if not isinstance(each, str)]
        data = "\n".join(f"- {name}, {size:,} bytes" for name, size in files[:50])
        data += f"\n- and {len(files) - 50:,} more" if files[50:] else ""
        return f"""# {self.about}

| | |
|---|---|
{rows}

## Numbers
{found}

## Data
{data}
"""
