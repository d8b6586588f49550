"""Preferences: prompts, several answers to each, and how someone scored them; their file formats.

Whatever the form in a file, a `Judged` comes out of it. Only the order of the scores of one prompt
means something: the better answers are preferred to the worse.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tinylm.chat import as_prompt, as_turns, check_messages, turn
from tinylm.errors import InputError
from tinylm.files import read_rows


@dataclass
class Judged:
    """One prompt (messages up to the user's turn), its answers, and their scores."""

    messages: list[dict]
    answers: list[str]
    scores: list[float | None]  # None: no judgement
    place: str = ""  # in the file that it was read from: "line 3", or of an array "row 3"

    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) numbers of every two answers of which one was found better."""
        judged = [(score, i) for i, score in enumerate(self.scores) if score is not None]
        return [(i, j) for a, i in judged for b, j in judged if a > b]


def read_preferences(path: str | Path, ties: bool = False) -> list[Judged]:
    """The judged prompts of a file of JSON lines (or one array), in which some pair is ordered.

    With ties, also those in which none is.

    A row has `prompt`, `chosen` and `rejected`; or `chosen` and `rejected` conversations that begin
    alike; or `prompt`, `completion` and a `label` that is true or false, several rows to a prompt;
    or `prompt`, `answers` and `scores`; or it is a tree of OpenAssistant's, with ranked `replies`.
    Prompts and answers are texts or lists of messages. Raises InputError with file and place.
    """
    judged = []
    unpaired: dict[str, Judged] = {}  # by prompt
    for place, row in read_rows(Path(path)):
        where = f"{path}, {place}: "
        for found in as_judged(row, where):
            found.place = place
            if "label" in row and len(found.answers) == 1:
                known = unpaired.setdefault(json.dumps(found.messages), found)
                if known is not found:
                    known.answers += found.answers
                    known.scores += found.scores
                    continue
            judged.append(found)
    judged = [each for each in judged if ties or each.pairs()]
    if not judged:
        raise InputError(f"{path}: no answer in it is preferred to another one to the same prompt")
    return judged


def as_judged(row: dict, where: str) -> Iterator[Judged]:
    """What one row of any form says. Raises InputError, which begins with where."""
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        found = tree([], row["prompt"], where)
    elif "chosen" in row and "rejected" in row:
        pair = [row["chosen"], row["rejected"]]
        prompt, answers = (row["prompt"], pair) if "prompt" in row else divided(*pair, where)
        found = [(prompt, answers, [1.0, 0.0])]
    elif {"prompt", "completion", "label"} <= set(row):
        if row["label"] not in (True, False):
            raise InputError(f'{where}"label" must be true or false, got {row["label"]!r:.60}')
        found = [(row["prompt"], [row["completion"]], [float(row["label"])])]
    elif {"prompt", "answers", "scores"} <= set(row):
        found = [(row["prompt"], row["answers"], row["scores"])]
    else:
        raise InputError(
            where + 'expected "prompt", "chosen" and "rejected"; "prompt", "completion" and '
            f'"label"; or "prompt", "answers" and "scores"; found {", ".join(map(repr, row))}'
        )
    for prompt, answers, scores in found:
        messages = as_turns("user", prompt)
        check_messages(messages, where)
        if as_prompt(messages) != messages:
            raise InputError(where + "the prompt must end with what the user says")
        check_ranking(answers, scores, where)
        yield Judged(messages, [text_of(answer, where) for answer in answers], scores)


def divided(chosen, rejected, where: str) -> tuple[list[dict], list[list[dict]]]:
    """The messages with which two conversations begin alike, and the rest of each."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise InputError(where + 'without "prompt", "chosen" and "rejected" are lists of messages')
    n = len([*takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))])
    if not n:
        raise InputError(where + '"chosen" and "rejected" do not begin alike: there is no prompt')
    if n == len(chosen) == len(rejected):
        raise InputError(where + '"chosen" and "rejected" are the same, so neither is preferred')
    return chosen[:n], [chosen[n:], rejected[n:]]


def check_ranking(answers, scores, where: str) -> None:
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        raise InputError(where + '"answers" and "scores" must be lists of the same length')
    for score in scores:
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number and abs(score) <= sys.float_info.max):
            raise InputError(f"{where}a score must be a number or null, got {score!r:.60}")


def text_of(answer, where: str) -> str:
    """An answer is a text, or one assistant message in a list."""
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        answer = answer[0].get("content")
    if not isinstance(answer, str):
        raise InputError(f"{where}an answer must be a text or one message, got {answer!r:.60}")
    return answer


def tree(before: list[dict], node: dict, where: str) -> Iterator[tuple[list, list, list]]:
    """(prompt, answers, scores) of every turn with ranked replies in a conversation tree of
    OpenAssistant's (arXiv 2304.07327)."""
    try:
        role = {"prompter": "user", "assistant": "assistant"}[node["role"]]
        messages, replies = [*before, turn(role, node["text"])], node["replies"]
        if role == "user" and replies:
            ranks = [reply.get("rank") for reply in replies]
            scores = [None if rank is None else -rank for rank in ranks]
            yield messages, [reply["text"] for reply in replies], scores
        for reply in replies:
            yield from tree(messages, reply, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}not a conversation tree ({error!r})") from None


# ---- written -----------------------------------------------------------------------------------


def as_pairs(judged: Judged) -> Iterator[dict]:
    """TRL's preference form: every ordered pair of answers."""
    for better, worse in judged.pairs():
        chosen, rejected = ([turn("assistant", judged.answers[i])] for i in (better, worse))
        yield {"prompt": judged.messages, "chosen": chosen, "rejected": rejected}


def as_unpaired(judged: Judged) -> Iterator[dict]:
    """TRL's unpaired form: is an answer one of the better half of its prompt's?"""
    scores = [score for score in judged.scores if score is not None]
    middle = (min(scores) + max(scores)) / 2 if scores else 0.0
    for answer, score in zip(judged.answers, judged.scores):
        if score is not None and score != middle:
            completion = [turn("assistant", answer)]
            yield {"prompt": judged.messages, "completion": completion, "label": score > middle}


def as_ranking(judged: Judged) -> Iterator[dict]:
    """All that is known: answers and scores."""
    yield {"prompt": judged.messages, "answers": judged.answers, "scores": judged.scores}


def as_conversation(judged: Judged) -> Iterator[dict]:
    """The best answer, for `tinylm sft`: best-of-n, learned (arXiv 2009.01325); sft takes no empty
    one."""
    if judged.pairs():
        _, best = max((s, -i) for i, s in enumerate(judged.scores) if s is not None)
        messages = [*judged.messages, turn("assistant", judged.answers[-best])]
        if all(each["content"].strip() for each in messages if each["role"] == "assistant"):
            yield {"messages": messages}


FORMS = {
    "preference": as_pairs,
    "unpaired": as_unpaired,
    "ranking": as_ranking,
    "conversations": as_conversation,
}
