"""How often a judge behind an endpoint agrees with the verifier, on questions with known answers.

    python benchmarks/judge_agreement.py --url http://127.0.0.1:8080/v1 --name NAME

Of each question about a fact of the almanac it judges two answers, the same sentence with the right
fact and with a wrong one, which is right about another thing of the same kind.
"""

from __future__ import annotations

import argparse
import json
from random import Random

from tinylm import almanac
from tinylm.chat import Row, turn
from tinylm.evaluate import wilson
from tinylm.judges import Group
from tinylm.judges.endpoint import MODES, Endpoint

KINDS, FACTS = ("country", "element", "state", "animal", "world"), 4


def right_and_wrong(n: int, seed: int = 0) -> list[Group]:
    """n questions, each with its answer, and with that answer after one fact has been exchanged."""
    rng, by_fact = Random(seed), {}
    for question in almanac.Almanac(seed, KINDS, FACTS).questions()["known"]:
        kind, _, fact = question.id.split("/")
        by_fact.setdefault((kind, fact), []).append(question)
    groups = []
    for questions in by_fact.values():
        for question in questions:
            fact = question.accepted[0]
            others = [q.accepted[0] for q in questions if q.accepted[0] not in question.accepted]
            if others and fact in question.answer:
                wrong = question.answer.replace(fact, rng.choice(others))
                row = Row("line 1", [turn("user", question.text)], {})
                groups.append(Group(row, [question.answer, wrong]))
    return rng.sample(groups, min(n, len(groups)))


def measure(judge: Endpoint, groups: list[Group]) -> dict:
    """Shares of questions where the judge finds the right answer better, worse, or neither."""
    scores = [pair for pair in judge(groups) if None not in pair]
    n = len(scores)
    right, tie = (sum(test(a, b) for a, b in scores) for test in (float.__gt__, float.__eq__))
    decided = n - tie
    found = {
        "questions": len(groups), "judged": n, "agrees": right, "ties": tie,
        "disagrees": decided - right, **judge.notes(),
    }  # fmt: skip
    if decided:
        found["agreement_where_decided"] = right / decided
        found["interval"] = wilson(right / decided, decided)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=1)
    given = parser.parse_args()
    groups = right_and_wrong(given.n)
    found = {}
    for mode in MODES:
        judge = Endpoint(given.url, given.name, mode, given.concurrency, 300.0)
        found[mode] = measure(judge, groups)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
