"""New facts that only fine-tuning teaches are learned less well, and old ones are forgotten.

Expected  A fact met only in the answers of fine-tuning can be told in answer to the questions that
          were practised, less well to others, and hardly when a sentence about it is to be ended.
Varied    whether people's descriptions were read in pre-training; questions about both kinds of
          people are asked equally often in fine-tuning.
Measured  questions in a wording that was practised, and in one kept from all training; sentences
          to be ended, in a wording that no answer has. The ledger: facts known of people that
          fine-tuning never mentions, by sentences to be ended, after each stage, with and without
          new facts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

from tinylm.almanac import Almanac, Question, answers_well, capital
from tinylm.lab import world
from tinylm.lab.workshop import Measure, Workshop, chance, recalled, right_answers, share

TITLE = "Facts taught only in fine-tuning are learned less well"
SAYS = "The same kind of facts, read about before or not, after equally many questions about both."


def tuned(workshop: Workshop, name: str, almanac: Almanac, *parts: str) -> Path:
    """The base model, fine-tuned on questions about these parts of the registry."""
    people, rng = world.people(almanac, *parts), Random(almanac.seed)
    data = workshop.questions(f"newfacts/{name}", almanac, people, rng)
    return workshop.sft(f"newfacts/{name}", world.base(workshop), data, **world.SFT)


def reworded(almanac: Almanac, questions: list[Question]) -> list[Question]:
    """The same facts in the sentence, among those that end with the fact, that answers worst."""
    found = []
    for q in questions:
        kind, name, fact = q.id.split("/")
        sentences = almanac.templates[kind]["facts"][fact]["sentences"]
        ending = [s for s in sentences if s.endswith("{value}.")]
        told = min(ending, key=answers_well).format(name=name, value=q.accepted[0])
        found.append(replace(q, answer=capital(told)))
    return found


def measure(workshop: Workshop) -> list[Measure]:
    almanac = world.world_of(workshop.seed)
    plain = tuned(workshop, "old", almanac, "quizzed", "taught")
    taught = tuned(workshop, "new", almanac, "quizzed", "taught", "withheld")
    found = []
    for name, part in (("read and asked about", "taught"), ("only asked about", "withheld")):
        practised = almanac.about(world.people(almanac, part), Random(workshop.seed))
        asked = almanac.about(world.people(almanac, part), None)
        told, guess = reworded(almanac, asked), chance(almanac, asked)
        found += [
            share(
                f"{name}: practised question", right_answers(taught, practised), guess, practised
            ),
            share(f"{name}: other question", right_answers(taught, asked), guess, asked),
            share(f"{name}: sentence ended", recalled(taught, told), guess, told),
        ]
    kept = reworded(almanac, almanac.about(world.people(almanac, "known", "practised"), None))
    guess = chance(almanac, kept)
    stages = {"pre-training": world.base(workshop), "fine-tuning": plain, "new facts": taught}
    return found + [
        share(f"ledger: known after {stage}", recalled(model, kept), guess, kept)
        for stage, model in stages.items()
    ]


def holds(value: dict[str, float]) -> bool:
    return all(
        value[f"read and asked about: {how}"] - value[f"only asked about: {how}"] >= 0.1
        for how in ("other question", "sentence ended")
    )
