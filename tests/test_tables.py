"""What is wrong in a table or its wordings is told with file and line, before training."""

import json

import pytest

from tinylm.errors import InputError
from tinylm.tables import check_names, read_table, read_talk, read_wordings

TABLE = "# Dragons.\nname\tlair\tage\nSmoky\ta cave|a hole\t900\nthe Worm\tthe sea\t\n"
WORDINGS = {
    "opening": ["{name} is a dragon."],
    "facts": {
        "lair": {
            "sentences": ["{name} lives in {value}."],
            "questions": ["Where is {name}?", "{name}?"],
        },
        "age": {
            "sentences": ["{name} is {value}."],
            "questions": ["How old is {name}?", "{name}?"],
        },
    },
}


@pytest.fixture
def dragons(tmp_path):
    path = tmp_path / "dragon.tsv"
    path.write_text(TABLE)
    return path


def wordings(tmp_path, change=lambda wordings: None):
    """The path of the wordings, changed."""
    changed = json.loads(json.dumps(WORDINGS))
    change(changed)
    path = tmp_path / "dragon.json"
    path.write_text(json.dumps(changed, indent=2))
    return path


def test_a_table_is_read_with_its_alternatives_and_gaps(dragons, tmp_path):
    facts, table = read_table(dragons)
    assert facts == ["lair", "age"]
    assert table["Smoky"] == {"lair": ("a cave", "a hole"), "age": ("900",)}
    assert table["the Worm"] == {"lair": ("the sea",)}
    assert read_wordings(wordings(tmp_path), facts) == WORDINGS


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("\t900\n", "\n", r"dragon.tsv, line 3: expected 3 cells .* got 2"),
        ("\tthe sea\t\n", "\tthe sea\t\t8\n", r"dragon.tsv, line 4: expected 3 cells .* got 4"),
        ("the Worm", "smoky", r"dragon.tsv, line 4: 'smoky' is in line 3 already"),
        ("the Worm", "the Smoky", r"dragon.tsv, line 4: 'the Smoky' is in line 3 already"),
        ("name\tlair", "dragon\tlair", r"dragon.tsv: expected a header"),
        ("the Worm", " ", r"dragon.tsv, line 4: expected a name"),
    ],
)
def test_a_table_that_is_wrong(dragons, old, new, complaint):
    assert old in TABLE
    dragons.write_text(TABLE.replace(old, new))
    with pytest.raises(InputError, match=complaint):
        read_table(dragons)


def test_a_table_that_another_program_saved(dragons):
    dragons.write_text(TABLE, "utf-8-sig")
    assert "Smoky" in read_table(dragons)[1]
    dragons.write_text(TABLE.replace("Smoky", "Drachenkönig"), "cp1252")
    with pytest.raises(InputError, match=r"dragon.tsv, line 3: not UTF-8"):
        read_table(dragons)


def test_a_missing_column(tmp_path):
    """Columns and wordings have to be the same, or facts would silently be left out."""
    path = wordings(tmp_path)
    with pytest.raises(InputError, match=r"dragon.json, line 15: 'age' is no column of dragon.tsv"):
        read_wordings(path, ["lair"])
    with pytest.raises(InputError, match=r"dragon.tsv: column 'hoard' has no wordings"):
        read_wordings(path, ["lair", "age", "hoard"])


@pytest.mark.parametrize(
    "sentence",
    ["{nmae} is {value}.", "{name} is old.", "{name} {name}, {value}", "{name} is {value} }."],
)
def test_a_template_with_an_unknown_or_missing_field(tmp_path, sentence):
    def change(wordings):
        wordings["facts"]["lair"]["sentences"] = ["{name} lives in {value}.", sentence]

    path = wordings(tmp_path, change)
    with pytest.raises(InputError, match=r"dragon.json, line 9: expected {name} and {value} once"):
        read_wordings(path, ["lair", "age"])


def test_a_template_that_is_written_with_escapes(tmp_path):
    path = wordings(tmp_path, lambda wordings: wordings["opening"].append("Voilà {nmae}."))
    assert "\\u00e0" in path.read_text()
    with pytest.raises(InputError, match=r"dragon.json: expected {name} once in 'Voilà {nmae}.'"):
        read_wordings(path, ["lair", "age"])


def test_wordings_that_are_not_json(tmp_path):
    path = tmp_path / "dragon.json"
    path.write_text('{\n "opening": [}\n')
    with pytest.raises(InputError, match=r"dragon.json: cannot be read as JSON \(.*: line 2 "):
        read_wordings(path, [])
    path.write_text('{"opening": ' + "9" * 5000 + "}")
    with pytest.raises(InputError, match=r"dragon.json: cannot be read as JSON .*digits"):
        read_wordings(path, [])


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda w: w.pop("opening"), r'dragon.json: expected "opening", a list of 1'),
        (lambda w: w.pop("facts"), r'dragon.json: expected .* "facts" with wordings'),
        (lambda w: w["facts"].update(age=[]), 'line 15: expected "sentences", a list of 1'),
        (lambda w: w["facts"]["lair"].update(sentences=[5]), 'line 6: expected "sentences"'),
        (lambda w: w["facts"]["age"]["questions"].pop(), 'line 15: expected "questions", .* of 2'),
    ],
)
def test_wordings_that_are_missing(tmp_path, change, complaint):
    """Of two questions, one is kept for the test."""
    with pytest.raises(InputError, match=complaint):
        read_wordings(wordings(tmp_path, change), ["lair", "age"])


def test_small_talk_without_an_answer(tmp_path):
    path = tmp_path / "talk.json"
    path.write_text('[{"user": ["Hi."], "assistant": "Hello."}, {"user": ["Who are you?"]}]')
    with pytest.raises(InputError, match=r'talk.json, row 2: expected "user", a list, and'):
        read_talk(path)


def test_a_name_in_two_tables(dragons, tmp_path):
    """It would be dealt two parts: trained on as one, tested as the other."""
    (tmp_path / "snake.tsv").write_text("name\tlength\nworm\t2\n")
    tables = {kind: read_table(tmp_path / f"{kind}.tsv")[1] for kind in ("dragon", "snake")}
    with pytest.raises(InputError, match=r"snake.tsv, line 2: 'worm' is in dragon.tsv too"):
        check_names(tmp_path, tables)
