"""Everyday conversation: what people say to an assistant besides questions about the world.

data/almanac/smalltalk.json holds groups, each with what a user may say and what may be answered. A
group with rows is said for each of them: "How do you spell {word}?" Rows of numbers, and the
letters of a word, are made here. Nothing in it names anything that the almanac's tests ask about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from random import Random

from tinylm.almanac import capital
from tinylm.chat import turn

THANKED = 0.2  # share of conversations in which the user says thank you at the end
SUMS = 20  # sums and differences reach up to it, the times table up to 10 x 10


def rows_of(group: dict) -> list[dict]:
    """What the places of a group's sentences stand for, in turn; {} where they have none."""
    pairs = [(a, b) for a in range(SUMS + 1) for b in range(SUMS + 1)]
    if group["id"] == "sum":
        return [{"a": a, "b": b, "c": a + b} for a, b in pairs if a + b <= SUMS]
    if group["id"] == "difference":
        return [{"a": a, "b": b, "c": a - b} for a, b in pairs if a >= b]
    if group["id"] == "product":
        return [{"a": a, "b": b, "c": a * b} for a, b in pairs if 1 <= a <= 10 and 1 <= b <= 10]
    rows = [dict(zip(group.get("places", []), row)) for row in group.get("rows", [[]])]
    if group["id"] == "spelling":
        return [row | {"letters": "-".join(row["word"].upper())} for row in rows]
    return rows


def conversations(seed: int = 0, wordings: int = 2) -> Iterator[dict]:
    """Rows for fine-tuning, as Almanac.conversations writes them, in an order that is shuffled.

    Every row of a group is asked in `wordings` of its wordings, a group without rows in all. Some
    go on: with the same question about another row ("And big?"), or with thanks. The ids
    "talk/sum/3/4" tell what is asked, so that rows can be kept for a test.
    """
    path = resources.files("tinylm._data") / "almanac" / "smalltalk.json"
    groups = json.loads(path.read_text(encoding="utf-8"))
    rng = Random(f"smalltalk {seed}")
    thanks = next(group for group in groups if group["id"] == "thanks")
    made = []
    for group in groups:
        rows = rows_of(group)
        for row in rows:
            for said in rng.sample(group["user"], wordings if row else len(group["user"])):
                turns = [exchange(group, said, row, rng)]
                if "and" in group and rng.random() < 0.5:
                    turns.append(exchange(group, rng.choice(group["and"]), rng.choice(rows), rng))
                if group is not thanks and rng.random() < THANKED:
                    turns.append(exchange(thanks, rng.choice(thanks["user"]), {}, rng))
                made.append(turns)
    for turns in rng.sample(made, len(made)):
        yield {
            "messages": [message for messages, _ in turns for message in messages],
            "ids": [id for _, id in turns],
        }


def exchange(group: dict, said: str, row: dict, rng: Random) -> tuple[list[dict], str]:
    """(what the user says and what is answered, id) for one row of a group."""
    answer = rng.choice(group["assistant"])
    messages = [turn("user", said.format(**row)), turn("assistant", capital(answer.format(**row)))]
    asked = [str(row[place]) for place in row if f"{{{place}}}" in said]
    return messages, "/".join(["talk", group["id"], *asked])
