"""The judge that knows: a Python function scores each answer by itself.

The default function compares with the accepted answers of the prompt's row. It pays +1 for a right
answer, nothing for "I don't know", and takes λ = t / (1 − t) for a wrong one, so that answering
pays exactly where the model is right with a probability of more than t, its confidence.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

from tinylm.chat import Row
from tinylm.errors import InputError
from tinylm.judges import Group, Judge

REFUSALS = ("I don't know", "I do not know", "I'm not sure", "I have no idea")

Score = Callable[[str, str, dict], float | None]


@lru_cache(1 << 14)  # the same answers are given again and again
def normalise(text: str) -> str:
    """Lower case, without accents, punctuation, articles in front, and superfluous space."""
    text = unicodedata.normalize("NFKD", text.replace("’", "'")).casefold()
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = " ".join(re.sub(r"[^\w\s+]", " ", text.replace("'", "")).split())
    return re.sub(r"^(the|a|an) (?=\w)", "", text)


REFUSED = {normalise(text) for text in REFUSALS}


def verdict(answer: str, accepted: Iterable[str]) -> str:
    """Whether the answer, normalised, is an accepted one: "right"; a refusal: "idk"; or "wrong"."""
    said = normalise(answer)
    if said in REFUSED:
        return "idk"
    return "right" if said in map(normalise, accepted) else "wrong"


def exact(confidence: float) -> Score:
    """The default function. Rows need "accepted", a list of texts; an empty one: none is right.

    Where a row says "must_answer", a refusal is as bad as a wrong answer: we all know who we are.
    """
    paid = {"right": 1.0, "idk": 0.0, "wrong": -confidence / (1 - confidence)}

    def score(prompt: str, answer: str, row: dict) -> float:
        accepted = row.get("accepted")
        if not isinstance(accepted, list) or not all(isinstance(text, str) for text in accepted):
            raise InputError('the row has no "accepted", a list of right answers as texts')
        found = verdict(answer, accepted)
        return paid["wrong" if found == "idk" and row.get("must_answer") else found]

    return score


def load(name: str) -> Score:
    """The function called `file.py:function` or `module:function`."""
    place, _, function = name.rpartition(":")
    if not place:
        raise InputError(f"--verifier {name}: expected file.py:function or module:function")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(place, place)
            module = importlib.util.module_from_spec(spec)
            sys.modules[place] = module  # where a dataclass in it looks for its types
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--verifier {name}: cannot be loaded ({reason})") from error
    if not callable(getattr(module, function, None)):
        raise InputError(f"--verifier {name}: there is no function {function} in {place}")
    return getattr(module, function)


class Verifier(Judge):
    """The judge that is a function of one answer: score(prompt, answer, row) -> number."""

    def __init__(self, score: Score):
        self.score = score

    def __call__(self, groups: list[Group]) -> list[list[float | None]]:
        return [[checked(self.score, g.row, answer) for answer in g.answers] for g in groups]


def checked(score: Score, row: Row, answer: str) -> float | None:
    """score's judgement. Raises InputError where it fails or gives something else than a number."""
    prompt = row.messages[-1]["content"]
    where = f"the verifier, asked about {row.place} of the prompts ({prompt!r:.60})"
    try:
        found = score(prompt, answer, row.content)
    except (Exception, SystemExit) as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{where}, failed: {kind}{error}") from error
    if found is None:
        return None
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(found, str):
        raise InputError(f"{where}, gave {found!r}: expected a number, or None for no judgement")
    return number
