"""Feedback teaches to say "I don't know", at a price, and --confidence sets the price.

Expected  Where a wrong answer costs t / (1 − t), the best policy answers only what it is surer of
          than t. So the higher t, the fewer questions are answered (coverage), and the fewer of
          the answers are wrong (risk). At t = 0.5 at most a quarter of what cannot be known is
          still answered, and 5 points of what is known are lost.
Varied    --confidence.
Measured  questions about things read of but never asked about (known), real ones never read of
          (withheld), and names that nothing has (invented); risk and coverage over all of them.

The things are real: countries, elements, states, animals and their like. Among the people of the
registry it does not work: these have names of the same halves, of which a small model remembers
only so much as tells those apart that it has met (docs/log.md).
"""

from __future__ import annotations

from pathlib import Path

from tinylm import quickstart
from tinylm.almanac import Almanac, Question
from tinylm.lab.workshop import Measure, Workshop, share, verdicts

TITLE = "Feedback teaches to answer only what is known"
SAYS = "Answers before feedback and after, by the confidence t from which on answering pays."
CONFIDENCES = (0.5, 0.8)


def measures(title: str, model: Path, tests: dict[str, list[Question]]) -> list[Measure]:
    found = {name: [*zip(asked, verdicts(model, asked))] for name, asked in tests.items()}
    every = [pair for pairs in found.values() for pair in pairs]
    answered = [(q, v) for q, v in every if v != "idk"] or [(every[0][0], "idk")]  # then no risk

    def part(name: str, pairs: list[tuple[Question, str]], *kinds: str) -> Measure:
        hits = [verdict in kinds for _, verdict in pairs]
        return share(f"{title}: {name}", hits, asked=[question for question, _ in pairs])

    return [
        part("known, right", found["known"], "right"),
        part("withheld, wrong", found["withheld"], "wrong"),
        part("invented, wrong", found["invented"], "wrong"),
        part("coverage", every, "right", "wrong"),
        part("risk", answered, "wrong"),
    ]


def measure(workshop: Workshop) -> list[Measure]:
    almanac = Almanac(workshop.seed, quickstart.KINDS, quickstart.FACTS)
    tests = {name: almanac.questions()[name] for name in ("known", "withheld", "invented")}
    text = ({"text": text} for text in almanac.documents(quickstart.PASSES))
    text = workshop.rows("real/text", text)
    base = workshop.pretrain("real/base", text, **quickstart.PRETRAIN)
    data = workshop.rows("real/conversations", almanac.conversations())
    sft = workshop.sft("real/sft", base, data, **quickstart.SFT)
    prompts = workshop.rows("real/prompts", almanac.prompts())
    found = measures("before", sft, tests)
    for t in CONFIDENCES:
        # its text tells of one thing a document; the quickstart's own needs a lower rate
        settings = quickstart.FEEDBACK | {"learning_rate": 4e-4, "confidence": t}
        model = workshop.feedback(f"real/feedback-{t}", sft, prompts, **settings)
        found += measures(f"t = {t}", model, tests)
    return found


def holds(value: dict[str, float]) -> bool:
    lost = value["before: known, right"] - value["t = 0.5: known, right"]
    wrong = [value[f"t = 0.5: {part}, wrong"] for part in ("withheld", "invented")]
    return max(wrong) <= 0.25 and lost <= 0.05
