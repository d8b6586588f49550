"""A registry of people who never lived, for whom chance is exact.

Each fact is drawn for each person on its own, uniformly from k values (data/almanac/registry.json).
So whoever has not read about a person guesses right with a probability of exactly 1/k, whatever
else was read; and nothing that another corpus says can help or hurt.
"""

from __future__ import annotations

from itertools import product
from random import Random

from tinylm.tables import Table

PEOPLE = 300
NAME = ("given", "beginning", "ending")  # its parts; all other choices are facts


def people(choices: dict[str, list[str]], seed: int, n: int = PEOPLE) -> Table:
    """n people with names of their own: a given name, and a family name of two halves.

    choices: "given", "beginning" and "ending" of names; all others are facts and their k values.
    """
    rng, facts = Random(f"registry {seed}"), facts_of(choices)
    names = rng.sample(list(product(*(choices[part] for part in NAME))), n)
    return {
        f"{first} {beginning}{ending}": {fact: (rng.choice(choices[fact]),) for fact in facts}
        for first, beginning, ending in names
    }


def facts_of(choices: dict[str, list[str]]) -> list[str]:
    return [name for name in choices if name not in NAME]
