"""The claims about the three stages, each measured at a size so small that it takes seconds."""

import json
import re
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from commands import weights

from tinylm import backend, cli, lab, quickstart, registry
from tinylm.lab import assistant, cutoff, extraction, missing, outwitted, world
from tinylm.lab.workshop import Measure, chance, pooled, share
from tinylm.progress import Progress
from tinylm.stages.pretrain import OBJECTIVES
from tinylm.train import read_metrics

TINY = {
    "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 400, "batch_size": 2, "answers": 2,
    "max_steps": 4, "save_every": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(world, "PASSES", 2)
    monkeypatch.setattr(world, "FACTS", 1)
    monkeypatch.setattr(extraction, "PASSES", 2)
    monkeypatch.setattr(extraction, "FACTS", 2)
    monkeypatch.setattr(missing, "PASSES", 10)
    monkeypatch.setattr(outwitted, "COMPARISONS", {6: 2, 12: 2})
    monkeypatch.setattr(quickstart, "PASSES", 1)
    monkeypatch.setitem(quickstart.PRETRAIN, "block_size", 512)  # so few merges make long prompts
    monkeypatch.setattr(registry, "people", partial(registry.people, n=60))
    before = backend.threads()
    backend.set_threads(1)  # of matrices this small, two threads only wait for each other
    yield
    backend.set_threads(before)


@pytest.mark.parametrize("name", lab.CLAIMS)
def test_every_claim_can_be_measured_by_itself(small, name, tmp_path):
    (row,) = lab.run(name, tmp_path, Progress(), seeds=1, **TINY)
    assert json.loads((tmp_path / "claims.json").read_text()) == [row]
    assert row["claim"] == name
    assert isinstance(row["holds"], bool)
    names = [measure["name"] for measure in row["measures"]]
    assert len(set(names)) == len(names) >= 4
    for measure in row["measures"]:
        assert measure["low"] <= measure["value"] <= measure["high"]
        assert len(measure["by_seed"]) == 1


def test_a_claim_goes_on_where_it_stopped_and_keeps_the_others(small, tmp_path):
    lab.run("compression", tmp_path, Progress(), seeds=1, **TINY)
    before = lab.run("extraction", tmp_path, Progress(), seeds=1, **TINY)
    runs = tmp_path / "seed0" / "registry"
    told = weights(runs / "sft-mixed")
    shutil.rmtree(runs / "sft-mixed")  # as if it had been killed there
    assert lab.run("extraction", tmp_path, Progress(), seeds=1, **TINY) == before
    assert weights(runs / "sft-mixed") == told
    resumed = [
        row for row in read_metrics(runs / "base-shuffled-64") if row.get("event") == "resume"
    ]
    assert not resumed  # it was finished, and served both claims
    claims = json.loads((tmp_path / "claims.json").read_text())
    assert [row["claim"] for row in claims] == ["compression", "extraction"]


def test_an_unknown_claim_is_told_in_one_sentence(tmp_path, capsys):
    assert cli.run(["lab", "astrology", "--out", str(tmp_path / "lab")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "astrology" in line
    assert "extraction" in line
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize("content", ["{", "3", "[{}]", "[" * 100_000])
def test_broken_claims_are_told_before_anything_is_measured(tmp_path, capsys, content):
    (tmp_path / "claims.json").write_text(content)
    assert cli.run(["lab", "cutoff", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/claims.json: not a list of claims" in line
    assert [path.name for path in tmp_path.iterdir()] == ["claims.json"]


def test_the_command_prints_what_it_measured(monkeypatch, tmp_path, capsys):
    def measure(workshop):
        return [Measure("share", 0.5 + workshop.seed / 4, 2 + workshop.seed, 4, 0.25)]

    toy = SimpleNamespace(TITLE="A toy", SAYS="It is one.", measure=measure)
    toy.holds = lambda value: value["share"] > 0.6
    monkeypatch.setattr(lab, "CLAIMS", {"toy": toy})
    assert cli.run(["lab", "all", "--out", str(tmp_path), "--seeds", "2", "--json"]) == 0
    told = capsys.readouterr()
    (row,) = json.loads(told.out)["claims"]
    (measured,) = row.pop("measures")
    assert row == {"claim": "toy", "title": "A toy", "says": "It is one.", "holds": True}
    assert measured.pop("low") < measured.pop("value") == 5 / 8 < measured.pop("high")
    assert measured == {"name": "share", "n": 8, "chance": 0.25, "by_seed": [0.5, 0.75]}
    assert "A toy: it holds" in told.err


def test_numbers_that_are_no_shares_are_told_with_their_spread():
    row = pooled([Measure("bits", 1.0), Measure("bits", 2.0), Measure("bits", 4.5)])
    assert (row["value"], row["low"], row["high"], row["n"]) == (2.5, 1.0, 4.5, 3)
    assert row["chance"] is None


def test_questions_about_one_person_count_as_one_where_they_are_answered_alike():
    people = extraction.world_of(0)
    asked = people.about(people.of("known")[:20], None)
    things = sorted({q.thing for q in asked})
    alike = share("alike", [things.index(q.thing) % 2 == 0 for q in asked], asked=asked)
    apart = share("apart", [i % 2 == 0 for i in range(len(asked))], asked=asked)
    assert (alike.n, apart.n) == (80, 80)
    assert alike.n_effective == pytest.approx(19)  # 20 people, one of them lost to the mean
    assert apart.n_effective == 80
    narrow, wide = pooled([apart, apart]), pooled([alike, alike])
    assert narrow["n"] == wide["n"] == 160
    assert wide["high"] - wide["low"] > 1.8 * (narrow["high"] - narrow["low"])


def test_only_the_fixed_text_tells_the_same_in_the_same_words(small):
    people = extraction.world_of(0)
    for kind in extraction.TEXTS:
        text = "\n".join(row["text"] for row in extraction.texts(people, kind))
        times = Counter(re.findall(r"[^.?\s][^.?]*", text))
        assert (set(times.values()) == {extraction.PASSES}) == (kind == "fixed")
        assert ("?" in text) == (kind == "mixed")
        assert not any(entity.name in text for entity in people.of("withheld"))


def test_chance_is_that_of_the_registry():
    people = extraction.world_of(0)
    asked = [q for q in people.about(people.of("known"), None) if q.id.endswith("/town")]
    values = {entity.facts["town"] for entity in people.entities}
    assert chance(people, asked) == pytest.approx(1 / len(values))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("The capital of Chad is N'Djamena.", True),
        (" I don't know.", True),
        ("It is Bangui. What is the currency of", False),
        ("The source of the", False),
        ("Which one?", False),
    ],
)
def test_a_direct_answer_is_one_sentence(said, expected):
    assert assistant.direct(said) is expected


def test_blanks_are_ranked_by_the_blank_alone_where_blanks_were_practised(small, tmp_path):
    people = extraction.world_of(0)
    text, value, candidates = missing.blanks(people)[0]
    assert value in candidates
    assert text.count("___") == 1
    from tinylm.tokenizer import train_bpe

    tokenizer = train_bpe([text, *candidates], 300)
    for objective in OBJECTIVES:
        ids, learned = missing.example(tokenizer, text, value, objective)
        counted = tokenizer.decode(ids[learned.index(True) :], skip_special=True).strip()
        assert counted == (text.replace("___", value) if objective == "next" else value)


def test_the_card_and_the_assistant_s_lessons_carry_the_cut_off(small, tmp_path):
    workshop = lab.Workshop(tmp_path, 0, Progress(), TINY)
    assert cutoff.dated(world.assistant(workshop))
    lessons = (tmp_path / "world" / "conversations.jsonl").read_text()
    assert world.ENDS in lessons
    assert not any(asked in lessons for asked in world.WHEN[-2:])
