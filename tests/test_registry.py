"""The people of the registry: fictional, and guessed right with a known probability."""

import json
from collections import Counter
from importlib.resources import files

import pytest
from names import found_in

from tinylm.almanac import Almanac
from tinylm.judges.verifier import normalise, verdict
from tinylm.registry import PEOPLE, facts_of, people

CHOICES = json.loads((files("tinylm._data") / "almanac" / "registry.json").read_text())["choices"]


def test_chance_is_one_in_k():
    """Each of the k values comes up equally often, and none is accepted for another."""
    n = 20000
    table = people(CHOICES, seed=1, n=n)
    for fact in facts_of(CHOICES):
        values = CHOICES[fact]
        k = len(values)
        assert len({normalise(value) for value in values}) == k
        counts = Counter(facts[fact][0] for facts in table.values())
        assert set(counts) == set(values)
        chi_square = sum((count - n / k) ** 2 / (n / k) for count in counts.values())
        assert abs(chi_square - (k - 1)) < 5 * (2 * (k - 1)) ** 0.5, fact


def test_one_fact_tells_nothing_about_another():
    """A guess from what is known of the same person is no better than a blind one."""
    n = 20000
    table = people(CHOICES, seed=2, n=n)
    pairs = Counter((f["colour"][0], f["instrument"][0]) for f in table.values())
    assert len(pairs) == 100
    chi_square = sum((count - n / 100) ** 2 / (n / 100) for count in pairs.values())
    assert abs(chi_square - 99) < 5 * (2 * 99) ** 0.5


def test_a_seed_makes_its_own_people():
    assert people(CHOICES, 0) == people(CHOICES, 0)
    assert len(people(CHOICES, 0)) == PEOPLE
    assert set(people(CHOICES, 0)) & set(people(CHOICES, 1)) != set(people(CHOICES, 0))


def test_the_registry_is_a_kind_of_the_almanac():
    world = Almanac(kinds=("registry", "state"))
    known = [e for e in world.of("known") if e.kind == "registry"]
    assert len(known) == round(0.18 * PEOPLE)
    asked = [q for q in world.questions()["known"] if q.id.startswith("registry/")]
    assert len(asked) == len(known) * len(facts_of(CHOICES))
    assert all(verdict(q.answer, list(q.accepted)) == "right" for q in asked)
    assert [e for e in world.invented if e.kind == "registry" and e.part == "tested"]
    assert "registry" not in Almanac().kinds


def test_no_value_names_something_of_the_almanac():
    """A fact that names a withheld entity is dropped, and chance would no longer be exact."""
    names = [entity.name for entity in Almanac().entities]
    values = [value for fact in facts_of(CHOICES) for value in CHOICES[fact]]
    assert not found_in("\n".join(values), names)


@pytest.mark.parametrize("part", ["given", "beginning", "ending"])
def test_halves_of_names_are_all_different(part):
    assert len(set(CHOICES[part])) == len(CHOICES[part]) >= 20
