"""Small talk is right, friendly, and says nothing that a test asks about."""

import json
import re
from importlib.resources import files

import pytest
import smalltalk
from names import found_in

from tinylm.almanac import Almanac
from tinylm.chat import check_messages

ALMANAC = files("tinylm._data") / "almanac"
GROUPS = json.loads((ALMANAC / "smalltalk.json").read_text())


@pytest.fixture(scope="module")
def rows():
    return list(smalltalk.conversations())


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group["id"])
def test_a_group_has_many_wordings_and_few_answers(group):
    assert len(set(group["user"])) == len(group["user"]) >= 5
    assert 1 <= len(group["assistant"]) <= 3
    places = set(smalltalk.rows_of(group)[0])
    for sentence in [*group["user"], *group["assistant"], *group.get("and", [])]:
        assert set(re.findall(r"{(.*?)}", sentence)) <= places, sentence
        assert sentence == sentence.strip()


def test_conversations_can_be_trained_on(rows):
    for row in rows:
        check_messages(row["messages"], "")
        assert len(row["ids"]) == len(row["messages"]) / 2
        assert not re.search(r"[{}]", "".join(m["content"] for m in row["messages"]))
    assert len(rows) > 1500
    assert sum(len(row["ids"]) > 1 for row in rows) > 300
    assert rows == list(smalltalk.conversations(0)) != list(smalltalk.conversations(1))


def test_sums_are_right(rows):
    """Of every answer that states one."""
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    said = [m["content"] for row in rows for m in row["messages"] if m["role"] == "assistant"]
    stated = [re.fullmatch(r"(\d+) (plus|minus|times) (\d+) is (\d+)\.", text) for text in said]
    stated = [match.groups() for match in stated if match]
    assert len(stated) > 300
    assert all(signs[sign](int(a), int(b)) == int(c) for a, sign, b, c in stated)


def test_answers_of_one_number_fit_the_question(rows):
    ids = {tuple(id.split("/")[1:]) for row in rows for id in row["ids"]}
    assert {("sum", "20", "0"), ("difference", "20", "20"), ("product", "10", "10")} <= ids
    for row in rows:
        for id, answer in zip(row["ids"], row["messages"][1::2]):
            kind, *numbers = id.split("/")[1:]
            if kind == "product" and answer["content"].startswith("That makes"):
                assert answer["content"] == f"That makes {int(numbers[0]) * int(numbers[1])}."


def test_letters_are_those_of_the_word():
    spelling = next(group for group in GROUPS if group["id"] == "spelling")
    for row in smalltalk.rows_of(spelling):
        assert row["letters"].replace("-", "").lower() == row["word"]


def test_small_talk_names_nothing_of_the_almanac(rows):
    """A withheld name in it would be read after all. ("Don" is in "don't", and never withheld.)"""
    text = "\n".join(m["content"] for row in rows for m in row["messages"])
    world = Almanac()
    assert found_in(text, [e.name for e in world.entities]) <= {"the Don"}
    assert not found_in(text, [e.name for e in world.invented])
    assert found_in(text, ["Monday"])  # the check can fail
