"""What happened after the cut-off is not known, and the model says when that was.

Expected  Questions about events before the cut-off are answered; about later ones no better than
          by who always names the commonest answer of all that was read.
Varied    when an event happened; no question in any training was about any of them.
Measured  right answers, beside that commonest answer; whether the model card carries the date; and
          whether the assistant gives it, asked in a wording kept from training.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tinylm import evaluate
from tinylm.almanac import Almanac, Question
from tinylm.checkpoint import load
from tinylm.lab import world
from tinylm.lab.workshop import Measure, Workshop, right_answers, share

TITLE = "What happened after the cut-off is not known"
SAYS = (
    f"Questions about events before {world.CUTOFF} and since; chance: always the commonest answer."
)


def commonest(almanac: Almanac, questions: list[Question]) -> float:
    """The share that one answer for each fact gets right: the one most often read."""
    read: dict[str, Counter] = {}
    for entity in almanac.entities:
        if entity.kind == "event" and entity.part not in ("withheld", "future"):
            for fact, values in entity.facts.items():
                read.setdefault(fact, Counter())[values[0]] += 1
    guess = {fact: counts.most_common(1)[0][0] for fact, counts in read.items()}
    return sum(guess[q.id.rpartition("/")[2]] in q.accepted for q in questions) / len(questions)


def dated(model: Path) -> bool:
    return f"knowledge cut-off | {world.CUTOFF} |" in (model / "README.md").read_text()


def measure(workshop: Workshop) -> list[Measure]:
    almanac, model = world.world_of(workshop.seed), world.assistant(workshop)
    tests, found = almanac.questions(), []
    for name, part in (("before", "known"), ("after", "future")):
        asked = [q for q in tests[part] if q.id.startswith("event/")]
        guess = commonest(almanac, asked)
        found.append(share(f"events {name} the cut-off", right_answers(model, asked), guess, asked))
    said = evaluate.ask(*load(model), world.WHEN[-2:])
    cards = [dated(folder) for folder in (world.base(workshop), model)]
    return [
        *found,
        share("the model cards carry the date", cards),
        share("the assistant gives it", (text == world.ENDS for text in said)),
    ]


def holds(value: dict[str, float]) -> bool:
    gap = value["events before the cut-off"] - value["events after the cut-off"]
    return gap >= 0.5 and value["the model cards carry the date"] == 1
