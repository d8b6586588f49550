"""A base model only continues text; fine-tuning makes it answer, out of what it has read.

Expected  Asked a question, a base model goes on writing, though it knows the fact: it ends a
          sentence about it rightly. Fine-tuned it gives a direct answer, about things, too, that
          fine-tuning never mentioned.
Varied    the stage: one model before and after fine-tuning.
Measured  direct answers: one sentence, and then it stops; right ones: equal to an accepted answer;
          facts known: a sentence that is begun ends with them. All of people and events that no
          question in any training was about.
"""

from __future__ import annotations

import re

from tinylm.lab import world
from tinylm.lab.workshop import Measure, Workshop, answers, recalled, right_answers, share

TITLE = "Fine-tuning teaches the form of an answer; the knowledge is from pre-training"
SAYS = "The same questions put to a model before and after fine-tuning that was about other things."


def direct(said: str) -> bool:
    """One sentence, and no question. Who writes on has begun another before 32 tokens are over."""
    return re.fullmatch(r"[^?!]+\.", said.strip()) is not None and ". " not in said.strip()


def measure(workshop: Workshop) -> list[Measure]:
    asked = world.world_of(workshop.seed).questions()["known"]
    models = {"base": world.base(workshop), "assistant": world.assistant(workshop)}
    found = []
    for name, model in models.items():
        found += [
            share(f"{name}: {what}", hits, asked=asked)
            for what, hits in (
                ("direct answers", map(direct, answers(model, asked))),
                ("right answers", right_answers(model, asked)),
                ("facts known", recalled(model, asked)),
            )
        ]
    return found


def holds(value: dict[str, float]) -> bool:
    usable = value["assistant: direct answers"] - value["base: direct answers"] >= 0.8
    return usable and value["assistant: right answers"] >= 0.8 * value["base: facts known"]
