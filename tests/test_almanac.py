"""The almanac's promises: nothing that the test asks about has leaked into training."""

import json
import re

import pytest

from tinylm.almanac import Almanac, bare, mentions
from tinylm.judges.verifier import verdict

FILES = ("text", "conversations", "prompts", "questions")


@pytest.fixture(scope="module")
def almanac():
    return Almanac()


@pytest.fixture(scope="module")
def written(almanac, tmp_path_factory):
    """What training reads, as quickstart writes it: file -> rows."""
    folder = tmp_path_factory.mktemp("almanac")
    almanac.write(folder, passes=20)
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in FILES}
    return {name: [json.loads(line) for line in rows] for name, rows in lines.items()}


@pytest.fixture(scope="module")
def asked(written):
    """Every prompt of fine-tuning and feedback."""
    turns = [m for row in written["conversations"] for m in row["messages"] if m["role"] == "user"]
    return [m["content"] for m in turns] + [row["prompt"] for row in written["prompts"]]


def names_of(entities):
    return [entity.name for entity in entities]


def found_in(text, names):
    """Those of the names that stand in the text, as whole words, in any case."""
    pattern = "|".join(re.escape(bare(n)) for n in sorted(names, key=len, reverse=True))
    return set(re.findall(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE))


def test_no_tested_entity_is_asked_about_in_training(almanac, asked):
    tested = names_of(almanac.of("known", "withheld"))
    tested += names_of(e for e in almanac.invented if e.part == "tested")
    assert len(tested) > 300
    assert not found_in("\n".join(asked), tested)
    assert found_in("\n".join(asked), names_of(almanac.of("practised")))  # the check can fail


def test_a_withheld_name_is_in_no_training_text(almanac, written):
    everything = "\n".join(
        json.dumps(row, ensure_ascii=False) for name in FILES[:3] for row in written[name]
    ).replace('\\"', '"')
    withheld = names_of(almanac.of("withheld"))
    invented = names_of(e for e in almanac.invented if e.part == "tested")
    assert len(withheld) > 40
    assert len(invented) > 100
    assert not found_in(everything, withheld + invented)
    assert len(found_in(everything, names_of(almanac.of("known")))) > 100


def test_every_known_fact_is_read_in_pre_training(almanac, written):
    """Otherwise an answer would be luck."""
    text = " ".join(row["text"] for row in written["text"])
    for entity in almanac.of("known"):
        told = [s for s in re.split(r"(?<=\.) ", text) if mentions(s, entity.name)]
        assert len(told) > 40, entity.name
    for question in almanac.questions()["known"]:
        assert question.accepted[0] in text


def test_the_wording_of_the_test_is_kept_for_it(almanac, asked):
    wordings = [
        facts["questions"] for kind in almanac.kinds
        for facts in almanac.templates[kind]["facts"].values()
    ]  # fmt: skip
    patterns = [re.escape(w[-1][0].upper() + w[-1][1:]) for w in wordings]
    kept = re.compile("|".join(p.replace(r"\{name\}", r"[^?]+") for p in patterns))
    others = [w[0] for w in wordings]
    assert not [text for text in asked if kept.fullmatch(text)]
    assert all(q.id for questions in almanac.questions().values() for q in questions)
    assert len(others) > 30


def test_the_same_seed_makes_the_same_almanac(almanac, written):
    again = Almanac()
    assert again.entities == almanac.entities
    assert [json.dumps(r) for r in again.prompts()] == [json.dumps(r) for r in written["prompts"]]
    assert names_of(Almanac(1).of("known")) != names_of(almanac.of("known"))


def test_the_answer_that_training_gives_is_accepted(almanac):
    questions = almanac.questions()
    assert all(verdict(q.answer, list(q.accepted)) == "right" for q in questions["known"])
    assert all(verdict(q.answer, list(q.accepted)) == "idk" for q in questions["invented"])
    for name in questions:
        assert len({q.id for q in questions[name]}) == len(questions[name]) > 100


def test_every_item_carries_the_id_of_its_fact(almanac, written):
    facts = {f"{e.kind}/{e.name}/{f}" for e in almanac.entities for f in e.facts}
    names = {f"{e.kind}/{e.name}" for e in almanac.invented}
    ids = [id for row in written["conversations"] for id in row["ids"]]
    ids += [row["id"] for name in ("prompts", "questions") for row in written[name]]
    assert not [i for i in ids if i not in facts | {"talk"} and i.rpartition("/")[0] not in names]
