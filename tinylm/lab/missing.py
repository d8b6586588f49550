"""Practising blanks teaches to fill them, at a small price for the next word.

Expected  A model that learned to fill blanks (arXiv 2207.14255) as well as to go on writing finds
          the missing fact by itself, which a next-word model cannot; and its next-word loss is
          hardly worse. With all candidates at hand, the next-word model can take the likeliest
          sentence. (It was expected to do that worse than who practised blanks. It does it better.)
Varied    the objective of pre-training, on one text. It tells of few people, because a blank
          teaches one or a few words of a row, where the next word teaches all of them.
Measured  a fact is missing from a sentence, at its end or within it: which of all the values of
          this fact is the likeliest there, and what does `tinylm fill` find without being given
          any? And bits per byte of held-out text, as next words.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from statistics import mean

from tinylm import checkpoint
from tinylm.almanac import Almanac, capital
from tinylm.data import Example, packed_batch
from tinylm.generate import BLANK, blank_ids, fill
from tinylm.lab import extraction
from tinylm.lab.workshop import Measure, Workshop, results_of, share, values_of
from tinylm.stages.pretrain import OBJECTIVES
from tinylm.tensor import no_grad

TITLE = "Practising blanks teaches to fill them, at a small price for the next word"
SAYS = "The same text, three objectives; the next-word model takes the likeliest whole sentence."
PASSES = 200  # tellings of everything, each another
PRETRAIN = {**extraction.PRETRAIN, "n_embd": extraction.WIDTH, "vocab_size": 1000}  # fewer people


def text(almanac: Almanac) -> Iterator[dict]:
    rng = Random(almanac.seed)
    for _ in range(PASSES):
        told = [almanac.description(entity, rng) for entity in almanac.of("known")]
        yield from ({"text": text} for text in rng.sample(told, len(told)))


def blanks(almanac: Almanac) -> list[tuple[str, str, list[str]]]:
    """(sentence with a blank, what is missing, all candidates), in any of the known wordings."""
    rng, asked, values = Random(almanac.seed + 1), [], values_of(almanac)
    for entity in almanac.of("known"):
        for fact, (value, *_) in entity.facts.items():
            wordings = almanac.templates["registry"]["facts"][fact]["sentences"]
            text = rng.choice(wordings).format(name=entity.name, value=BLANK)
            asked.append((capital(text), value, values[fact]))
    return asked


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
    return candidates[int(nats.argmin())]


def measure(workshop: Workshop) -> list[Measure]:
    almanac = extraction.world_of(workshop.seed)
    asked, rows = blanks(almanac), workshop.rows("missing/text", text(almanac))
    found, bits = [], []
    for objective in OBJECTIVES:
        folder = workshop.pretrain(f"missing/{objective}", rows, **PRETRAIN, objective=objective)
        model, tokenizer = checkpoint.load(folder)
        filled = [(likeliest(model, tokenizer, t, c, objective) == v, t, c) for t, v, c in asked]
        for place, last in (("at the end", True), ("within", False)):
            here = [(hit, c) for hit, t, c in filled if t.endswith(f"{BLANK}.") == last]
            guess = mean(1 / len(candidates) for _, candidates in here)
            found.append(share(f"{objective}: blank {place}", (hit for hit, _ in here), guess))
        if objective != "next":
            free = (fill(model, tokenizer, t)[0][0].strip() == v for t, v, _ in asked)
            found.append(share(f"{objective}: without candidates", free))
        bits.append(results_of(folder)["bits_per_byte"])
    found += [Measure(f"{o}: next-word bits per byte", b) for o, b in zip(OBJECTIVES, bits)]
    return found


def holds(value: dict[str, float]) -> bool:
    bits = [value[f"{objective}: next-word bits per byte"] for objective in ("mixed", "next")]
    return value["mixed: without candidates"] >= 0.5 and bits[0] <= 1.05 * bits[1]
