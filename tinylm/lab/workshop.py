"""What the experiments share: runs that are made once, and measures with their intervals.

An experiment asks a Workshop for the models that it needs. Each lies in a run directory with a
name, is made by the stage that the command line would run, and is made once: whoever asks for it
again, a claim later or after an interruption, gets what is there, or what was left to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from random import Random
from statistics import mean

from tinylm import checkpoint, evaluate
from tinylm.almanac import WORDINGS, Almanac, Entity, Question
from tinylm.chat import turn
from tinylm.checkpoint import Checkpoint
from tinylm.files import write_rows
from tinylm.judges.verifier import normalise, verdict
from tinylm.progress import Progress
from tinylm.settings import Plan
from tinylm.stages import feedback, preference, pretrain, sft


@dataclass(frozen=True)
class Measure:
    """One number of one seed: `value`, or as a share, `right` of n, beside what chance would do.

    n_effective: how many independent trials these n are worth, if not n.
    """

    name: str
    value: float
    right: int | None = None
    n: int = 1
    chance: float | None = None
    n_effective: float | None = None


def share(
    name: str,
    hits: Iterable[bool],
    chance: float | None = None,
    asked: list[Question] | None = None,
) -> Measure:
    """The share of hits; asked: the questions, of which several may be about one thing."""
    hits = list(hits)
    worth = asked and evaluate.effective_n(hits, [question.thing for question in asked])
    return Measure(name, sum(hits) / len(hits), sum(hits), len(hits), chance, worth)


def pooled(measures: list[Measure]) -> dict:
    """The same measure of several seeds as one row of claims.json.

    Shares: of all questions together, with the Wilson interval of so many trials as these are
    worth. Other numbers: the mean, and from the least to the greatest.
    """
    values, first = [m.value for m in measures], measures[0]
    value, low, high, n = mean(values), min(values), max(values), len(values)
    if first.right is not None:
        right, n = sum(m.right for m in measures), sum(m.n for m in measures)
        value = right / n
        low, high = evaluate.wilson(value, sum(m.n_effective or m.n for m in measures))
    row = {"name": first.name, "value": value, "low": low, "high": high, "n": n}
    chances = [m.chance for m in measures if m.chance is not None]
    return {**row, "chance": mean(chances) if chances else None, "by_seed": values}


class Workshop:
    """The runs of one seed, in folders of `folder`; `smaller` overrides settings of all of them."""

    def __init__(self, folder: Path, seed: int, progress: Progress, smaller: dict):
        self.folder, self.seed, self.progress, self.smaller = folder, seed, progress, smaller

    def pretrain(self, name: str, text: Path, **settings) -> Path:
        return self.make(pretrain, pretrain.PretrainConfig, [[str(text)]], name, settings)

    def sft(self, name: str, base: Path, conversations: Path, **settings) -> Path:
        return self.make(sft, sft.SFTConfig, [base, conversations], name, settings)

    def feedback(self, name: str, model: Path, prompts: Path, **settings) -> Path:
        return self.make(feedback, feedback.FeedbackConfig, [model, prompts], name, settings)

    def reward(self, name: str, model: Path, preferences: Path, **settings) -> Path:
        return self.make(preference, preference.RewardConfig, [model, preferences], name, settings)

    def make(self, stage, Config, inputs: list, name: str, settings: dict) -> Path:
        """Run a stage in the folder `name`, or what is left of it."""
        out, known = self.folder / name, {field.name for field in fields(Config)}
        smaller = {key: value for key, value in self.smaller.items() if key in known}
        config = Config(**{"seed": self.seed, **settings, **smaller})
        self.progress.heading(str(out))
        stage.run(*inputs, Plan(out, config, self.progress, out.exists()))
        return out

    def rows(self, name: str, rows: Iterable[dict]) -> Path:
        """JSON lines for a stage to read; rows is asked only where they are not there yet."""
        path = self.folder / f"{name}.jsonl"
        if not path.exists():
            write_rows(path, rows)
        return path

    def questions(self, name: str, world: Almanac, entities: list[Entity], rng: Random) -> Path:
        """Conversations about each fact of these entities, in several wordings, shuffled."""
        asked = world.about(entities * WORDINGS, rng)
        rows = [{"messages": [turn("user", q.text), turn("assistant", q.answer)]} for q in asked]
        return self.rows(name, rng.sample(rows, len(rows)))


def results_of(run: Path) -> dict:
    """What the finished run reports of itself."""
    return Checkpoint(run).state()["results"]


def values_of(world: Almanac) -> dict[str, list[str]]:
    """All values of each fact of the registry."""
    people = [e for e in world.entities if e.kind == "registry"]
    return {fact: sorted({e.facts[fact][0] for e in people}) for fact in world.facts["registry"]}


def chance(world: Almanac, questions: list[Question]) -> float:
    """How often a blind guess among the values of each fact of the registry is right."""
    values = values_of(world)
    return mean(1 / len(values[q.id.rpartition("/")[2]]) for q in questions)


def answers(model: Path, questions: list[Question]) -> list[str]:
    return evaluate.ask(*checkpoint.load(model), [q.text for q in questions])


def verdicts(model: Path, questions: list[Question]) -> list[str]:
    """What the model's answer to each question is: "right", "wrong" or "idk"."""
    return [verdict(said, q.accepted) for q, said in zip(questions, answers(model, questions))]


def right_answers(model: Path, questions: list[Question]) -> list[bool]:
    """Whether the model, asked each question, gives an accepted answer and stops."""
    return [said == "right" for said in verdicts(model, questions)]


def recalled(model: Path, questions: list[Question]) -> list[bool]:
    """Whether the model, where nothing is asked, ends each sentence that answers with the fact."""
    facts = [q.accepted[0] for q in questions]
    begun = [q.answer.removesuffix(f"{fact}.") for q, fact in zip(questions, facts)]
    return completed(model, list(zip(begun, facts)))


def completed(model: Path, begun: list[tuple[str, str]]) -> list[bool]:
    """Whether the model, as a mere writer of text, goes on after each beginning as expected.

    Works alike before and after fine-tuning.
    """
    texts = [text.rstrip() for text, _ in begun]
    said = evaluate.continuations(*checkpoint.load(model), texts, max_new_tokens=12)
    return [
        f"{normalise(text)} ".startswith(f"{normalise(expected)} ")
        for (_, expected), text in zip(begun, said)
    ]
