"""Answers compared two at a time, each two in both orders, whoever it is that compares.

Judges prefer a place (arXiv 2306.05685). A verdict in words counts only where it stays the same
when the two answers change places, and is a tie otherwise; of verdicts in nats, the preference for
a place cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

from tinylm.judges import Group

QUESTION = """Here is a request, and two answers to it.

Request:
{request}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Reply with one letter: A, or B, or T for a tie."""

Verdicts = Callable[[list[str]], list[float | None]]
"""Questions -> for each a number above 0 where A is better, below 0 where B is, 0 for a tie, or
None where there is no verdict."""


def request(messages: list[dict]) -> str:
    """What was asked: a single message as it is, several with who said them."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def compare(
    groups: list[Group], verdicts: Verdicts, in_nats: bool = False
) -> tuple[list[list[float | None]], list[bool]]:
    """Scores by group, and of every two answers with both verdicts whether these agree.

    A score is an answer's mean result against the others to its prompt: 1 won, −1 lost, 0 a tie,
    which equal answers are unasked. None where it was not compared with any.
    """
    asked: dict[str, float | None] = {}
    for group in groups:
        for a, b in combinations(dict.fromkeys(group.answers), 2):
            asked |= {question(group, a, b): None, question(group, b, a): None}
    asked = dict(zip(asked, verdicts([*asked])))
    agreed: list[bool] = []

    def results(group: Group) -> dict[tuple[str, str], float]:
        found = {(text, text): 0.0 for text in group.answers}
        for a, b in combinations(dict.fromkeys(group.answers), 2):
            first, second = asked[question(group, a, b)], asked[question(group, b, a)]
            if None not in (first, second):
                agreed.append(first * second < 0 or first == second == 0)
                won = float((first > second) - (first < second)) if in_nats or agreed[-1] else 0.0
                found |= {(a, b): won, (b, a): -won}
        return found

    return [mean_results(group.answers, results(group)) for group in groups], agreed


def agreement(agreed: list[bool]) -> dict[str, float]:
    """For the log: the share of comparisons whose verdicts agree, if there were any."""
    return {"position_consistency": sum(agreed) / len(agreed)} if agreed else {}


def question(group: Group, a: str, b: str) -> str:
    return QUESTION.format(request=request(group.row.messages), a=a, b=b)


def mean_results(texts: list[str], results: dict[tuple[str, str], float]) -> list[float | None]:
    """Each answer's mean result against all others that it was compared with."""
    found: list[float | None] = []
    for i, text in enumerate(texts):
        others = [(text, other) for j, other in enumerate(texts) if j != i]
        of = [results[pair] for pair in others if pair in results]
        found.append(sum(of) / len(of) if of else None)
    return found
