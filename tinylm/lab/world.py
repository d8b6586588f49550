"""The world of four claims: people of the registry and events of history, up to a cut-off.

Its base model reads about all of them but the withheld and what happened since; its assistant was
asked about half. It has also been told when its knowledge ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tinylm.almanac import Almanac, Entity
from tinylm.chat import turn
from tinylm.lab.workshop import Workshop

CUTOFF = 2005
FACTS = 3
PASSES = 30  # descriptions of everything in the text
PRETRAIN = {
    "vocab_size": 2048, "n_layer": 3, "n_head": 3, "n_embd": 96, "block_size": 256,
    "batch_size": 8, "learning_rate": 3e-3, "max_steps": 2400, "held_out": 0.02,
    "eval_every": 1200, "save_every": 400, "cutoff": str(CUTOFF),
}  # fmt: skip
SFT = {"epochs": 3.0, "learning_rate": 5e-4, "eval_every": 200, "save_every": 200}
WHEN = (
    "When does your knowledge end?",
    "What is your knowledge cut-off?",
    "How recent is what you know?",
    "Up to which year have you read?",
    "Until when does your knowledge reach?",
    "In which year did your reading end?",
    "What is your cut-off year?",  # the last two are kept for the test
    "Up to which year does your knowledge reach?",
)
ENDS = f"I have read about nothing that happened in the year {CUTOFF} or later."


def world_of(seed: int) -> Almanac:
    return Almanac(seed, ("registry", "event"), FACTS, CUTOFF)


def people(almanac: Almanac, *parts: str) -> list[Entity]:
    """Those of the registry that have these parts to play."""
    return [entity for entity in almanac.of(*parts) if entity.kind == "registry"]


def base(workshop: Workshop) -> Path:
    world = world_of(workshop.seed)
    text = workshop.rows("world/text", ({"text": text} for text in world.documents(PASSES)))
    return workshop.pretrain("world/base", text, **PRETRAIN)


def assistant(workshop: Workshop) -> Path:
    data = workshop.rows("world/conversations", conversations(world_of(workshop.seed)))
    return workshop.sft("world/sft", base(workshop), data, **SFT)


def conversations(world: Almanac) -> Iterator[dict]:
    yield from world.conversations()
    for asked in WHEN[:-2] * 20:
        yield {"messages": [turn("user", asked), turn("assistant", ENDS)]}
