"""Preferences: every form in a file becomes the same thing, and comes back."""

import math

import pytest
from commands import write_rows

from tinylm.errors import InputError
from tinylm.preferences import FORMS, read_preferences

ASKED = [{"role": "user", "content": "Hello?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


ROWS = [
    [{"prompt": "Hello?", "chosen": "good", "rejected": "bad"}],
    [{"prompt": ASKED, "chosen": said("good"), "rejected": said("bad")}],
    [{"chosen": ASKED + said("good"), "rejected": ASKED + said("bad")}],
    [
        {"prompt": "Hello?", "completion": "good", "label": True},
        {"prompt": "Hello?", "completion": "bad", "label": False},
    ],
    [{"prompt": "Hello?", "answers": ["bad", "good", "unseen"], "scores": [1, 2.5, None]}],
    [
        {
            "prompt": {
                "role": "prompter",
                "text": "Hello?",
                "replies": [
                    {"role": "assistant", "text": "bad", "rank": 1, "replies": []},
                    {"role": "assistant", "text": "good", "rank": 0, "replies": []},
                ],
            }
        }
    ],
]


@pytest.mark.parametrize("rows", ROWS)
def test_every_form_says_the_same(rows, tmp_path):
    (judged,) = read_preferences(write_rows(tmp_path / "p.jsonl", rows))
    assert judged.messages == ASKED
    ((better, worse),) = judged.pairs()
    assert (judged.answers[better], judged.answers[worse]) == ("good", "bad")


@pytest.mark.parametrize("form", ["preference", "unpaired", "ranking"])
def test_what_is_written_can_be_read(form, tmp_path):
    rows = [{"prompt": "Hello?", "answers": ["a", "b", "c"], "scores": [0, 3, 1]}]
    judged = read_preferences(write_rows(tmp_path / "p.jsonl", rows))
    again = read_preferences(write_rows(tmp_path / "q.jsonl", FORMS[form](judged[0])))
    pairs = {(j.answers[w], j.answers[l]) for j in again for w, l in j.pairs()}
    full = {("b", "a"), ("c", "a"), ("b", "c")}
    assert pairs == (full if form != "unpaired" else {("b", "a"), ("b", "c")})


def test_the_best_answer_becomes_a_conversation(tmp_path):
    rows = [{"prompt": "Hello?", "answers": ["a", "b", "b2"], "scores": [0, 3, 3]}]
    judged = read_preferences(write_rows(tmp_path / "p.jsonl", rows))
    assert list(FORMS["conversations"](judged[0])) == [{"messages": ASKED + said("b")}]


def test_an_empty_answer_is_no_conversation_to_learn_from(tmp_path):
    rows = [{"prompt": "Hello?", "answers": ["a", " "], "scores": [0, 3]}]
    judged = read_preferences(write_rows(tmp_path / "p.jsonl", rows))
    assert list(FORMS["conversations"](judged[0])) == []


def tree_of(text, *replies):
    return {"prompt": {"role": "prompter", "text": text, "replies": [*replies]}}


def test_pairs_that_have_a_label_too_stay_pairs(tmp_path):
    pair = {"prompt": "x", "chosen": "a", "rejected": "b", "label": 1}
    judged = read_preferences(write_rows(tmp_path / "p.jsonl", [pair, pair | {"chosen": "c"}]))
    assert [each.answers for each in judged] == [["a", "b"], ["c", "b"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x", "chosen": 3, "rejected": "b"}, "an answer must be a text"),
        ({"chosen": "a", "rejected": "b"}, "lists of messages"),
        ({"chosen": said("a"), "rejected": said("b")}, "do not begin alike"),
        (
            {"chosen": ASKED + said("a") + ASKED, "rejected": ASKED + said("b") + ASKED},
            "one message, got",  # they begin alike, though what follows is no single answer
        ),
        ({"prompt": "x"}, 'expected "prompt", "chosen" and "rejected"'),
        ({"prompt": "x", "completion": "a", "label": "false"}, "true or false, got 'false'"),
        ({"prompt": said("x"), "chosen": "a", "rejected": "b"}, "before the user"),
        ({"prompt": ASKED + said("x"), "chosen": "a", "rejected": "b"}, "must end with"),
        ({"prompt": "x", "answers": ["a"], "scores": [1, 2]}, "same length"),
        ({"prompt": "x", "answers": ["a"], "scores": ["1"]}, "a number or null"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [math.nan, 1]}, "a number or null"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [10**400, 1]}, "a number or null"),
        ({"chosen": ASKED + said("a"), "rejected": ASKED + said("a")}, "are the same"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1, 1]}, "no answer in it is preferred"),
        ({"prompt": {"role": "system", "replies": []}}, "not a conversation tree"),
        (tree_of("a", {"text": "b", "rank": "first", "replies": []}), "not a conversation tree"),
        (tree_of("a", "b"), "not a conversation tree"),
        (tree_of(None, {"text": "b", "rank": 0, "replies": []}), '"content" must be a text'),
    ],
)
def test_bad_rows_are_told_by_line(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_preferences(write_rows(tmp_path / "p.jsonl", [row]))
