"""Knowledge extraction: reading is not enough to answer ("Physics of Language Models 3.1",
arXiv 2309.14316).

Expected  A model that has read one and the same text about each person can say it word for word,
          and yet not answer a question about it. It can if it read the facts in ever other words
          and order, and better still if questions about other people stood among the texts.
Varied    only what is read in pre-training; its length, the model, and the fine-tuning are equal.
Measured  questions about the people of a registry that never lived, whom no question in any
          training was about, after fine-tuning on questions about the others; and, where the
          text was fixed, whether the model goes on with it word for word before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from tinylm.almanac import Almanac, Question
from tinylm.lab.workshop import Measure, Workshop, chance, completed, right_answers, share

TITLE = "What was read can be asked for only if it was read in several wordings"
SAYS = "Questions about people that no question in training was about, by what was read of them."
FACTS = 4
PASSES = 40  # tellings of everything, each another; the fixed text is told in another order
TOGETHER = 6  # people in a document
WIDTH = 64  # of the model
PRETRAIN = {
    "vocab_size": 1024, "n_layer": 3, "n_head": 2, "block_size": 128, "batch_size": 16,
    "learning_rate": 4e-3, "max_steps": 2000, "held_out": 0.02, "eval_every": 1000,
    "save_every": 500,
}  # fmt: skip
SFT = {"epochs": 4.0, "learning_rate": 1e-3, "eval_every": 100, "save_every": 100}
TEXTS = {
    "fixed": "one fixed text: questions",
    "shuffled": "ever other words: questions",
    "mixed": "… and questions about others: questions",
}


def world_of(seed: int) -> Almanac:
    return Almanac(seed, ("registry",), FACTS)


def fixed_texts(world: Almanac) -> dict[str, str]:
    """The one text about each person, by name."""
    rng = Random(world.seed + 2)
    return {e.name: world.description(e, rng) for e in world.entities if e.part != "withheld"}


def recited(world: Almanac, questions: list[Question]) -> list[tuple[str, str]]:
    """The fixed texts about the same facts: (all that stands before the fact, the fact)."""
    told = fixed_texts(world)
    pairs = [(told[q.id.split("/")[1]], q.accepted[0]) for q in questions]
    found = [(text[: text.casefold().index(fact.casefold())], fact) for text, fact in pairs]
    return [(before, fact) for before, fact in found if before]


def texts(world: Almanac, kind: str) -> Iterator[dict]:
    """Documents of several people each; in the mixed text also of questions about the quizzed."""
    rng, told = Random(world.seed + 2), list(fixed_texts(world).values())
    for _ in range(PASSES):
        if kind != "fixed":
            told = [world.description(e, rng) for e in world.entities if e.part != "withheld"]
        quizzes = world.quizzes(rng) if kind == "mixed" else []
        order = rng.sample(told, len(told))
        together = [" ".join(order[i : i + TOGETHER]) for i in range(0, len(order), TOGETHER)]
        documents = together + quizzes
        yield from ({"text": text} for text in rng.sample(documents, len(documents)))


def base(workshop: Workshop, kind: str, width: int = WIDTH) -> Path:
    """A model that has read this kind of text."""
    text = workshop.rows(f"registry/{kind}", texts(world_of(workshop.seed), kind))
    return workshop.pretrain(f"registry/base-{kind}-{width}", text, **PRETRAIN, n_embd=width)


def measure(workshop: Workshop) -> list[Measure]:
    world = world_of(workshop.seed)
    rng = Random(workshop.seed)
    data = workshop.questions("registry/questions", world, world.of("quizzed", "taught"), rng)
    tested = world.about(world.of("practised", "known"), rng)
    guess, lines = chance(world, tested), recited(world, tested)
    said = completed(base(workshop, "fixed"), lines)
    found = [share("one fixed text, word for word", said, guess)]
    for kind, title in TEXTS.items():
        model = workshop.sft(f"registry/sft-{kind}", base(workshop, kind), data, **SFT)
        found.append(share(title, right_answers(model, tested), guess, tested))
    return found


def holds(value: dict[str, float]) -> bool:
    return value[TEXTS["mixed"]] - value[TEXTS["fixed"]] >= 0.6
