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
NAME = ("given", "beginning", "ending")


def people(choices: dict[str, list[str]], seed: int, n: int = PEOPLE) -> Table:
    """n people: a given name, a family name of two halves that is nobody else's, and facts.

    choices: "given", "beginning" and "ending" of names; all others are facts and their k values.
    """
    rng = Random(f"registry {seed}")
    return {
        f"{rng.choice(choices['given'])} {family}": {
            fact: (rng.choice(choices[fact]),) for fact in facts_of(choices)
        }
        for family in rng.sample(families(choices), n)
    }


def strangers(choices: dict[str, list[str]], people: Table, rng: Random) -> list[str]:
    """Names of nobody: one of each family that is not in the registry.

    A name of a family that is there would be answered for: as family names are all different, they
    alone tell people apart, and a model learns no more of a name than it needs.
    """
    known = {name.split()[-1] for name in people}
    unknown = [family for family in families(choices) if family not in known]
    return [f"{rng.choice(choices['given'])} {name}" for name in rng.sample(unknown, len(unknown))]


def families(choices: dict[str, list[str]]) -> list[str]:
    return [first + last for first, last in product(choices["beginning"], choices["ending"])]


def facts_of(choices: dict[str, list[str]]) -> list[str]:
    return [name for name in choices if name not in NAME]
