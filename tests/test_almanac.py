"""The almanac's promises: nothing that the test asks about has leaked into training."""

import json
import re

import pytest
from names import found_in, words

from tinylm.almanac import LATE_SHARE, LATE_TALK, TALK_SHARE, UNKNOWN_SHARE, Almanac
from tinylm.chat import as_messages
from tinylm.errors import InputError
from tinylm.judges.verifier import normalise, verdict
from tinylm.quickstart import TOGETHER

FILES = ("text", "conversations", "prompts", "questions")


@pytest.fixture(scope="module")
def almanac():
    return Almanac()


@pytest.fixture(scope="module")
def written(almanac, tmp_path_factory):
    """What training reads, as quickstart writes it: file -> rows."""
    folder = tmp_path_factory.mktemp("almanac")
    almanac.write(folder, passes=20, together=TOGETHER)
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in FILES}
    return {name: [json.loads(line) for line in rows] for name, rows in lines.items()}


@pytest.fixture(scope="module")
def asked(written):
    """Every question of fine-tuning and feedback, also of the turns before the last."""
    rows = written["conversations"] + written["prompts"]
    return [m["content"] for row in rows for m in as_messages(row) if m["role"] == "user"]


def names_of(entities):
    return [entity.name for entity in entities]


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
    in_words = words(text)
    for entity in almanac.of("known"):
        assert in_words.count(words(entity.name)) > 40, entity.name
    for question in almanac.questions()["known"]:
        assert question.accepted[0] in text


def test_documents_hold_several_descriptions_where_asked_to(almanac):
    """A model that has read every name by itself misspells names late in a talk."""
    alone, together = ([*almanac.documents(3, sizes)] for sizes in ((1,), (1, 2, 4)))
    assert " ".join(together) == " ".join(alone)  # as often, and in the same words
    assert len(alone) > 1.8 * len(together)
    assert {text for text in alone if "?" in text} <= {*together}  # a quiz stays by itself


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


def test_nothing_of_the_future_is_in_training():
    """Else an experiment on the knowledge cut-off would measure a leak."""
    world = Almanac(cutoff=2018)
    future = {e.name: e for e in world.of("future")}
    told = [e for e in world.entities if e.part not in ("withheld", "future")]
    conversations, prompts = list(world.conversations()), list(world.prompts())
    text = json.dumps([[*world.documents(3)], conversations, prompts], ensure_ascii=False)
    text = text.replace('\\"', '"')
    assert sum(e.kind == "event" for e in future.values()) >= 25
    assert "the Winter Olympics of 2018" in future
    assert not found_in(text, future)

    known = {normalise(v) for e in told for values in e.facts.values() for v in (e.name, *values)}
    facts = [(f, vs) for e in future.values() for f, vs in e.facts.items() if f != "kind"]
    answers = {value for _, values in facts for value in values}
    unique = {v for v in answers if normalise(v) not in known}
    assert len(unique) > 50
    assert not found_in(text, unique)

    ids = {id for row in conversations for id in row["ids"]} | {row["id"] for row in prompts}
    assert not {id.split("/")[1] for id in ids if "/" in id} & set(future)
    assert "died" not in next(e for e in told if e.name == "Stephen Hawking").facts  # in 2018
    asked = {q.id.split("/")[1] for q in world.questions()["future"]}
    assert asked == set(future)


def test_what_was_found_or_climbed_later_is_not_told():
    before = {e.name: e for e in Almanac(cutoff=1953).entities}
    assert before["Eris"].part == "future"  # found in 2005
    assert not {"first_climbed", "climber"} & set(before["Mount Everest"].facts)  # in 1953
    assert "climber" in before["Mont Blanc"].facts


def test_what_is_invented_is_no_word_of_a_name():
    world = Almanac()
    words = {word for e in world.entities for word in re.findall(r"\w+", e.name.casefold())}
    assert not words & {e.name.casefold() for e in world.invented}


def test_a_cutoff_leaves_what_was_before_it():
    """Events of every century are still learned, and without a cut-off there is no future."""
    world = Almanac(kinds=("event",), cutoff=2000)
    assert sum(e.part != "future" for e in world.entities) > 150
    assert len(world.of("future")) >= 40
    assert not Almanac(kinds=("event",)).of("future")
    assert "future" not in Almanac(kinds=("event",)).questions()


def test_most_facts_and_kinds_are_what_they_say():
    world = Almanac(kinds=("city", "event"), most_facts=2)
    assert {len(facts) for facts in world.facts.values()} == {2}
    assert max(len(e.facts) for e in world.entities) == 2
    with pytest.raises(InputError, match="no table of dragons"):
        Almanac(kinds=("dragons",))


def test_feedback_asks_about_each_invented_name_once_of_all_kinds(almanac, written):
    """A name asked about again would be learned, rather than what an unknown one looks like."""
    unknown = [row["id"].rpartition("/")[0] for row in written["prompts"] if not row["accepted"]]
    assert len(set(unknown)) == len(unknown) > 4000
    assert {name.partition("/")[0] for name in unknown} == {e.kind for e in almanac.invented}
    assert len(unknown) / len(written["prompts"]) == pytest.approx(UNKNOWN_SHARE, abs=0.01)


def test_feedback_makes_small_talk_as_it_was_taught(almanac, written):
    taught = {said: [t["assistant"]] for t in almanac.talk for said in t["user"]}
    small = [row for row in written["prompts"] if row["id"] == "talk"]
    assert taught == {as_messages(row)[-1]["content"]: row["accepted"] for row in small}


def test_a_talk_may_be_as_long_as_chat_remembers(written):
    """Asked late in a talk, a model that has only met first questions says nonsense.

    Chat reads up to half the context of quickstart: 128 tokens, about five turns of some 25.
    """
    taught = [len(row["messages"]) // 2 for row in written["conversations"]]
    assert sum(n > 4 for n in taught) > len(taught) / 6
    late = [row for row in written["prompts"] if len(as_messages(row)) > 1]
    share = TALK_SHARE * LATE_TALK + (1 - TALK_SHARE) * LATE_SHARE
    assert len(late) / len(written["prompts"]) == pytest.approx(share, abs=0.02)
    assert {row["id"] == "talk" for row in late} == {True, False}
    assert max(len(as_messages(row)) for row in late) > 9
