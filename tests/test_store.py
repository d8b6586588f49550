"""The store of judgements, the files that it is exported to, and how far judges agree."""

import json
import math
import sqlite3

import pytest
from commands import refused, succeeds, tinylm
from persons import log_probabilities
from rich.console import Console

from tinylm.agreement import kappa, outcomes, statistics, tables
from tinylm.chat import turn
from tinylm.errors import InputError
from tinylm.preferences import FORMS, Judged, read_preferences
from tinylm.store import Store

ASKED = [turn("user", "How are you?")]
TEXTS = ["Well.", "Very well, thank you.", "Well."]


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store.sqlite")
    yield store
    store.close()


def test_what_was_stored_comes_back_after_a_restart(store):
    """To the bit: float32 log-probabilities survive as JSON numbers."""
    ids, logp = [[5, 1], [7, 8, 1], [5, 1]], [[-0.1, -1 / 3], [-2.5, -1e-7, 0.0], [-0.1, -1 / 3]]
    run = store.run("a")
    item = store.add_item(run, ASKED, TEXTS, "train", 7, 2, 0.25, ids, logp)
    store.judge(item, "person", [1.0, 0.0, 1.0], [1, 0], "short <b>is</b> good")
    again = Store(store.path)
    found = again.find(again.run("a"), "train", 7)
    assert (found.messages, found.answers, found.ids, found.kl) == (ASKED, TEXTS, ids, 0.25)
    assert log_probabilities(again, item) == logp
    (judgement,) = again.judgements(item, "person")
    assert judgement.scores == [1.0, 0.0, 1.0]
    assert (judgement.shown, judgement.comment) == ([1, 0], "short <b>is</b> good")
    assert again.find(run, "train", 8) is None


def test_another_name_is_another_run(store):
    """What was asked of another model or about other prompts is not taken for an answer here."""
    store.add_item(store.run("a"), ASKED, TEXTS)
    assert store.run("a") == store.run("a")
    assert store.find(store.run("b"), "train", 0) is None
    assert store.find(store.run("a"), "train", 0)  # whatever came in between


def test_a_place_is_taken_once(store):
    run = store.run("a")
    store.add_item(run, ASKED, TEXTS, place=3)
    with pytest.raises(sqlite3.IntegrityError):
        store.add_item(run, ASKED, TEXTS, place=3)
    assert [item.answers for item in store.items()] == [TEXTS]  # and no half of the second


def test_a_judgement_can_be_withdrawn(store):
    item = store.add_item(store.run("a"), ASKED, TEXTS)
    store.judge(item, "person", [1.0, 0.0, 1.0])
    store.judge(item, "verifier", [0.0, 1.0, 0.0])
    store.withdraw(item, "person")
    assert [j.judge for j in store.judgements(item)] == ["verifier"]


def test_half_of_a_character_is_stored_as_a_replacement(store):
    """An emoji that was cut in two: SQLite takes no lone surrogates."""
    judged = Judged(ASKED, ["cut \ud83d", "whole"], [0.0, 1.0])
    for judge in ("one", "other"):
        store.add_all("file", [judged], judge)
    (item,) = store.items()
    assert item.answers == ["cut \ufffd", "whole"]
    store.judge(item.id, "person", [1.0, 0.0], comment="\ud83d")
    assert [j.scores for j in store.judgements()] == [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]


def test_of_equal_answers_the_one_that_was_judged_counts(store):
    store.add_all("file", [Judged(ASKED, ["a", "a", "b"], [None, 1.0, 0.0])], "judge")
    (judged,) = store.judged()
    assert (judged.answers, judged.scores) == (["a", "b"], [1.0, 0.0])
    store.add_all("file", [Judged(ASKED, ["b", "a", "b"], [0.5, 1.0, None])], "other")
    assert store.judgements()[-1].scores == [1.0, 1.0, 0.5]


def test_messages_are_the_same_in_whatever_order_their_fields_stand(store):
    for fields in (ASKED[0].items(), reversed(ASKED[0].items())):
        store.add_all("file", [Judged([dict(fields)], ["a", "b"], [0.0, 1.0])], "judge")
    assert len(store.items()) == 1


def test_another_file_is_not_a_store(tmp_path):
    (tmp_path / "x").write_text("no database" * 100)
    with pytest.raises(InputError, match="not a store"):
        Store(tmp_path / "x")
    foreign = sqlite3.connect(tmp_path / "z")
    foreign.execute("CREATE TABLE bookmark (url)")
    for version in (0, 1):  # it counts its versions too
        foreign.execute(f"PRAGMA user_version = {version}")
        with pytest.raises(InputError, match="another program's"):
            Store(tmp_path / "z")
    assert foreign.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmark",)]
    foreign.close()
    newer = sqlite3.connect(tmp_path / "y")
    newer.execute("PRAGMA user_version = 9")
    newer.close()
    with pytest.raises(InputError, match="newer"):
        Store(tmp_path / "y")
    with pytest.raises(InputError, match="name a file in it"):
        Store(tmp_path)


def test_an_import_makes_the_folder_of_its_store_and_none_of_a_wrong_file(tmp_path):
    row = {"prompt": "Hi", "answers": TEXTS[:2], "scores": [1, 0]}
    for name, content in (("good", json.dumps(row)), ("bad", '{"text": "a"}')):
        (tmp_path / name).write_text(content)
    out = tmp_path / "new" / "store.sqlite"
    refused("preferences", "import", tmp_path / "bad", "--out", out, saying="line 1: expected")
    assert not out.exists()
    succeeds("preferences", "import", tmp_path / "good", "--out", out)
    assert out.exists()


# ---- files -------------------------------------------------------------------------------------


@pytest.fixture
def judged(store):
    """A run's store: one picked, one tied, one skipped."""
    run = store.run("a")
    for scores in ([1.0, 0.0, 1.0], [0.5, 0.5, 0.5], [None, None, None]):
        store.judge(store.add_item(run, ASKED, TEXTS), "person", scores, [0, 1])
    store.close()
    return store.path


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_exported(judged, form, tmp_path):
    out = tmp_path / "out.jsonl"
    done = tinylm("preferences", "export", judged, "--form", form, "--out", out, "--json")
    found = rows(out)
    assert json.loads(done.stdout) == {"file": str(out), "rows": len(found)}
    short, long = ([turn("assistant", text)] for text in TEXTS[:2])
    assert found == {
        "preference": [{"prompt": ASKED, "chosen": short, "rejected": long}],
        "unpaired": [
            {"prompt": ASKED, "completion": short, "label": True},
            {"prompt": ASKED, "completion": long, "label": False},
        ],
        "ranking": [
            {"prompt": ASKED, "answers": TEXTS[:2], "scores": [1.0, 0.0]},
            {"prompt": ASKED, "answers": TEXTS[:2], "scores": [0.5, 0.5]},
        ],
        "conversations": [{"messages": [*ASKED, *short]}],
    }[form]  # fmt: skip


@pytest.mark.parametrize("form", ["preference", "unpaired", "ranking"])
def test_what_is_imported_is_what_was_exported(judged, form, tmp_path):
    first, second, copy = (tmp_path / name for name in ("1.jsonl", "2.jsonl", "copy.sqlite"))
    for command in (
        ["export", judged, "--form", form, "--out", first],
        ["import", first, "--out", copy, "--judge", "someone"],
        ["export", copy, "--form", form, "--out", second, "--judge", "someone"],
    ):
        succeeds("preferences", *command)
    assert [j.scores for j in read_preferences(first)] == [
        j.scores for j in read_preferences(second)
    ]
    if form != "ranking":  # there, answers with two judgements are one item, whose last one counts
        assert first.read_bytes() == second.read_bytes()


def test_judges_of_two_files_are_compared(tmp_path):
    """The second file's answers stand in another order; they are found to be the same."""
    for name, order, scores in (("a", [0, 1], [1, 0]), ("b", [1, 0], [0, 1])):
        row = {"prompt": "Hi", "answers": [TEXTS[i] for i in order], "scores": scores}
        (tmp_path / name).write_text(json.dumps(row))
        out = tmp_path / "s.sqlite"
        tinylm("preferences", "import", tmp_path / name, "--out", out, "--judge", name)
    found = json.loads(tinylm("preferences", "stats", tmp_path / "s.sqlite", "--json").stdout)
    assert found["items"] == 1
    assert found["agreement"][0]["judges"] == ["a", "b"]
    assert (found["agreement"][0]["agreement"], found["agreement"][0]["n"]) == (1.0, 1)


@pytest.mark.parametrize("command", [["stats"], ["export", "--out", "x"]])
def test_where_nobody_has_judged_it_says_so(command, tmp_path):
    refused("preferences", *command, tmp_path, cwd=tmp_path, saying="nobody has judged")
    assert not (tmp_path / "training").exists()


# ---- agreement ---------------------------------------------------------------------------------


def test_kappa_of_cohen_s_own_kind_of_table():
    """By hand. 50 cases: both yes 20, yes/no 5, no/yes 10, both no 15.

    p_o = 0.7; p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5; κ = 0.4. With p = (.4, .1, .2, .3), the terms of
    the variance: on the diagonal .4 (1 − 1.1 · .6)² + .3 (1 − .9 · .6)² = .04624 + .06348 = .10972;
    off it .6² (.1 (.6 + .5)² + .2 (.4 + .5)²) = .36 · .283 = .10188 (columns .6 and .4, rows .5
    each, so yes/no has column yes .6 + row no .5); less (κ − p_e (1 − κ))² = .01. Their sum is
    .2016; the standard error √(.2016 / 50) / .5 = .12700.
    """
    pairs = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    found = kappa(pairs)
    assert found["kappa"] == pytest.approx(0.4, abs=1e-12)
    assert found["agreement"] == pytest.approx(0.7)
    error = math.sqrt(0.2016 / 50) / 0.5
    assert found["low"] == pytest.approx(0.4 - 1.96 * error, abs=1e-9)
    assert found["high"] == pytest.approx(0.4 + 1.96 * error, abs=1e-9)


def test_kappa_at_its_ends():
    assert kappa([(1, 1), (-1, -1)])["kappa"] == 1
    assert kappa([(1, -1), (-1, 1)])["kappa"] == -1
    assert kappa([])["kappa"] is None
    assert kappa([(1, 1)] * 9) == {"kappa": None, "low": None, "high": None, "agreement": 1, "n": 9}


def test_what_was_not_picked_was_not_compared():
    assert outcomes([1.0, 0.0, 0.0]) == {(0, 1): 1, (0, 2): 1}
    assert outcomes([0.5, 0.5]) == {(0, 1): 0}
    assert outcomes([None, 0.0, 1.0]) == {(1, 2): -1}
    assert outcomes([None, None]) == {}


def test_a_judge_s_name_is_shown_as_it_is(store):
    """Brackets are no markup."""
    store.add_all("file", [Judged(ASKED, TEXTS[:2], [1.0, 0.0])], "wise [rubric]")
    store.add_all("file", [Judged(ASKED, TEXTS[:2], [1.0, 0.0])], "[/b]")
    console = Console(width=200)
    with console.capture() as told:
        console.print(*tables(statistics(store)))
    assert "wise [rubric] and [/b]" in told.get()


def test_counts_and_position(store):
    """One judge asked in both orders: alike once, by position once."""
    run = store.run("a")
    items = [store.add_item(run, ASKED, TEXTS[:2]) for _ in range(3)]
    for item, first, second in ((items[0], [1, 0], [1, 0]), (items[1], [1, 0], [0, 1])):
        store.judge(item, "model", first, [0, 1])
        store.judge(item, "model", second, [1, 0])
    store.judge(items[2], "person", [0.5, 0.5], [0, 1])
    found = statistics(store)["judges"]
    assert found["model"]["position_consistency"]["share"] == 0.5
    assert (found["model"]["judgements"], found["model"]["preferred"]) == (4, 2)
    assert (found["person"]["tied"], found["person"]["position_consistency"]) == (1, None)
