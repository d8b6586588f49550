"""A model that practised filling blanks fills them; what that costs the next word.

Expected  Whoever learned to fill blanks (arXiv 2207.14255) finds the missing word at least as well
          as a next-word model that may try every candidate and take the likeliest sentence; and
          practising both costs the next-word loss a little.
Varied    the objective of pre-training, on one text.
Measured  a fact of somebody read about is missing from a sentence; which of all its values is the
          likeliest there? And bits per byte of held-out text, as next words.
"""

from __future__ import annotations

from random import Random

import numpy

from tinylm import checkpoint
from tinylm.almanac import Almanac, capital
from tinylm.data import Example, packed_batch
from tinylm.generate import BLANK, blank_ids
from tinylm.lab import extraction
from tinylm.lab.workshop import Claim, Measure, Workshop, results_of, share
from tinylm.stages.pretrain import OBJECTIVES
from tinylm.tensor import no_grad

BLANKS = 400  # sentences asked about


def blanks(almanac: Almanac, rng: Random) -> list[tuple[str, str, list[str]]]:
    """(sentence with a blank, what is missing, all candidates), in any of the known wordings."""
    people = [e for e in almanac.entities if e.part != "withheld"]
    values = {
        fact: sorted({e.facts[fact][0] for e in people}) for fact in almanac.facts["registry"]
    }
    asked = []
    for entity in people:
        for fact, (value, *_) in entity.facts.items():
            wordings = almanac.templates["registry"]["facts"][fact]["sentences"]
            text = rng.choice(wordings).format(name=entity.name, value=BLANK)
            asked.append((capital(text), value, values[fact]))
    return rng.sample(asked, BLANKS)


def example(tokenizer, text: str, candidate: str, objective: str) -> Example:
    """What is read, and the part of it whose likelihood ranks the candidate.

    The next-word model reads the whole sentence; the others read what surrounds the blank.
    """
    if objective == "next":
        ids = [tokenizer.special["<|begin|>"], *tokenizer.encode(text.replace(BLANK, candidate))]
        return ids, [True] * len(ids)
    given = blank_ids(tokenizer, text)
    space = "" if text.startswith(BLANK) else " "
    middle = [*tokenizer.encode(space + candidate), tokenizer.special["<|end|>"]]
    return [*given, *middle], [False] * len(given) + [True] * len(middle)


def likeliest(model, tokenizer, text: str, candidates: list[str], objective: str) -> str:
    rows = [[example(tokenizer, text, c, objective)] for c in candidates]
    batch = packed_batch(rows, tokenizer.special["<|end|>"])
    with no_grad():
        nats = model.loss(batch.tokens, batch.targets, batch.start).data.sum(1)
    return candidates[int(numpy.argmin(nats))]


def measure(workshop: Workshop) -> list[Measure]:
    almanac = extraction.world_of(workshop.seed)
    asked = blanks(almanac, Random(workshop.seed))
    guess = sum(1 / len(candidates) for *_, candidates in asked) / len(asked)
    found, bits = [], {}
    for objective in OBJECTIVES:
        folder = extraction.base(workshop, "shuffled", objective=objective)
        bits[objective] = results_of(folder)["bits_per_byte"]
        model, tokenizer = checkpoint.load(folder)
        hits = (likeliest(model, tokenizer, text, c, objective) == v for text, v, c in asked)
        found.append(share(f"{objective}: blanks filled", hits, guess))
    found += [Measure(f"{name}: next-word bits per byte", value) for name, value in bits.items()]
    return [*found, Measure("what mixed costs the next word", bits["mixed"] / bits["next"] - 1)]


def holds(value: dict[str, float]) -> bool:
    filled = {name: value[f"{name}: blanks filled"] for name in OBJECTIVES}
    return min(filled["missing"], filled["mixed"]) >= filled["next"] - 0.02


CLAIM = Claim(
    "missing",
    "Who practised filling blanks fills them, at a small price for the next word",
    "The same text, three objectives; the next-word model takes the likeliest whole sentence.",
    measure,
    holds,
)
