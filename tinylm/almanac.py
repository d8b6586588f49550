"""The almanac: a small world of real facts, on which what each stage teaches can be measured.

Tables of facts and sentence templates (data/almanac) become

    text            documents to pre-train on: what is known of each entity, in ever other words
    conversations   questions with answers, for fine-tuning
    prompts         questions with accepted answers, for feedback
    questions       the test

Every entity has one part to play, and a question of the test is about none that was ever asked
about in training:

    quizzed     read about in pre-training, asked about there, in fine-tuning and in feedback
    taught      read about in pre-training, asked about in fine-tuning and in feedback
    practised   read about in pre-training, asked about in feedback
    known       read about in pre-training; only the test asks about it
    withheld    real, but its name occurs in no training text; only the test asks about it
    future      as withheld, because it happened in the year of the cut-off or later

and invented ones, whose names are put together from halves of real ones: some are answered with
"I don't know" in fine-tuning, some are asked about in feedback, others in the test. The last
wording of every question is kept for the test too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import count, cycle, islice
from pathlib import Path
from random import Random

from tinylm import registry
from tinylm.chat import turn
from tinylm.errors import InputError
from tinylm.files import write_rows
from tinylm.judges.verifier import REFUSALS
from tinylm.tables import Facts, Table, bare, check_names, read_table, read_talk, read_wordings

SHARES = {"withheld": 0.08, "known": 0.18, "practised": 0.24, "taught": 0.24}  # others: quizzed
INVENTED = {"taught": 0.5, "practised": 8.0, "tested": 0.25}  # names, for each real entity
UNKNOWN = REFUSALS[0] + "."
QUIZZED = 0.3  # share of what is known of the quizzed that each pass asks about
UNKNOWN_SHARE = 0.2  # of feedback's prompts: so many that neither always nor never answering pays
TALK_SHARE = 0.1  # of feedback's prompts
LATE_SHARE = 0.1  # of feedback's prompts: so many follow a talk as in fine-tuning
LATE_TALK = 0.4  # of those that are small talk
TALKED = 40  # times that each greeting and its like is answered in fine-tuning
HIDDEN = ("withheld", "future")  # the parts that training does not name
YEARS = {"died": "", "first_climbed": "climber"}  # facts that a cut-off hides: what goes with them
WORDINGS = 5  # questions about each fact in fine-tuning


@dataclass(frozen=True)
class Entity:
    """Something that facts are known about; of an invented one, none are."""

    kind: str
    name: str
    part: str
    facts: Facts


@dataclass(frozen=True)
class Question:
    """One question about one fact, id kind/name/fact, with the answer that training gives.

    Accepted are the bare facts and the sentences that state them; of the invented, nothing is.
    """

    id: str
    text: str
    answer: str
    accepted: tuple[str, ...]

    @property
    def thing(self) -> str:
        """kind/name: what other questions may be about, too."""
        return self.id.rpartition("/")[0]


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def answers_well(sentence: str) -> int:
    """How well a sentence answers a question: the fact at its end, the name within.

    A name in front is another token than the same name after a space, so that a small model, which
    has read it in the question, cannot just copy it.
    """
    return 2 * (not sentence.startswith("{name}")) + sentence.endswith("{value}.")


def any_of(names: list[str]) -> re.Pattern:
    """Finds the names in a text, as whole words, in any case."""
    either = "|".join(re.escape(bare(name)) for name in names) or "(?!)"
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


def mentions(text: str, name: str) -> bool:
    return any_of([name]).search(text) is not None


def blend(left: str, right: str) -> str:
    """A name from the halves of two; where they have several words, of the last ones."""
    *first, left = left.split()
    right = right.rsplit(maxsplit=1)[-1]
    half = left[: (len(left) + 1) // 2] + right[len(right) // 2 :].lower()
    return " ".join([*first, half])


def year_in(text: str) -> int:
    """The year at the end of a text; before the year 1000, or without one, 0."""
    found = re.search(r"(?<!\d)\d{4}$", text)
    return int(found[0]) if found else 0


def began(name: str, facts: Facts) -> str:
    """When something happened or was discovered, or its name."""
    return (facts.get("year") or facts.get("discovery_year") or (name,))[0]


class Almanac:
    """The tables, with a part dealt to every entity. The seed decides all of it.

    kinds: those of its tables, by default all, or "registry", the people of registry.py;
    most_facts: how many columns of each are used; cutoff: a year from which on nothing that
    happened is in any training text.
    """

    def __init__(
        self,
        seed: int = 0,
        kinds: tuple[str, ...] = (),
        most_facts: int = 99,
        cutoff: int | None = None,
    ):
        self.seed, self.cutoff = seed, cutoff or math.inf
        folder = resources.files("tinylm._data") / "almanac"
        tables = sorted(path.name for path in folder.iterdir() if path.name.endswith(".tsv"))
        names = [table.removesuffix(".tsv") for table in tables]
        if unknown := set(kinds) - {*names, "registry"}:
            raise InputError(f"no table of {', '.join(sorted(unknown))}; there are {names}")
        self.kinds = [name for name in [*names, "registry"] if name in (kinds or names)]
        self.talk = read_talk(folder / "talk.json")
        self.facts, self.templates, rows = {}, {}, {}
        for kind in self.kinds:
            if kind == "registry":
                choices = json.loads((folder / "registry.json").read_text())["choices"]
                facts, rows[kind] = registry.facts_of(choices), registry.people(choices, seed)
            else:
                facts, rows[kind] = read_table(folder / f"{kind}.tsv")
            self.templates[kind] = read_wordings(folder / f"{kind}.json", facts)
            self.facts[kind] = facts[:most_facts]
        check_names(folder, rows)
        self.entities = self.deal(rows)
        self.invented = self.invent()

    # ---- who is who ----------------------------------------------------------------------------

    def deal(self, rows: dict[str, Table]) -> list[Entity]:
        """A part for every entity; of the others' facts, those that name a hidden one go."""
        rng, parts = Random(self.seed), {}
        names = "\n".join(name for table in rows.values() for name in table)
        wording = json.dumps([self.templates, self.talk], ensure_ascii=False)
        for table in rows.values():
            order = rng.sample(sorted(table), len(table))
            years = {name: year_in(began(name, facts)) for name, facts in table.items()}
            future = {name for name in order if years[name] >= self.cutoff}
            order = [name for name in order if name not in future]
            parts |= dict.fromkeys(order, "quizzed") | dict.fromkeys(future, "future")
            # "Guinea" is in "Equatorial Guinea": who asks about one names the other
            free = [name for name in order if len(any_of([name]).findall(names)) == 1]
            free.sort(key=lambda n: mentions(wording, n))  # a template's word cannot be withheld
            for part, share in SHARES.items():
                fit = [n for n in free if part != "withheld" or not mentions(UNKNOWN, n)]
                dealt = fit[: round(share * len(order))]  # the Don is in every "I don't know"
                parts |= dict.fromkeys(dealt, part)
                free = [name for name in free if name not in dealt]
        hidden = any_of([name for name, part in parts.items() if part in HIDDEN])
        return [
            Entity(kind, name, parts[name], self.told(kind, facts, parts[name], hidden))
            for kind, table in rows.items()
            for name, facts in table.items()
        ]

    def told(self, kind: str, facts: Facts, part: str, hidden: re.Pattern) -> Facts:
        """The facts in use; for training, without what names the hidden or came later."""
        full, facts = facts, {f: values for f, values in facts.items() if f in self.facts[kind]}
        if part in HIDDEN:
            return facts
        late = {y for y in YEARS if year_in(full.get(y, ("",))[0]) >= self.cutoff}
        late |= {YEARS[year] for year in late}
        kept = {
            fact: tuple(value for value in values if not hidden.search(value))
            for fact, values in facts.items()
            if fact not in late
        }
        return {fact: values for fact, values in kept.items() if values}

    def invent(self) -> list[Entity]:
        """Names that nothing has, by kind, from the halves of two that are known."""
        rng, taken = Random(self.seed + 1), {bare(e.name).casefold() for e in self.entities}
        told = [[e.name, e.facts] for e in self.entities]
        text = json.dumps([told, self.templates, self.talk], ensure_ascii=False)
        taken |= set(re.findall(r"\w+", text.casefold()))
        made, alone = [], set()  # alone: names of one word, with which no longer one may end
        for kind in self.kinds:
            names = [e.name for e in self.entities if e.kind == kind and e.part not in HIDDEN]
            single = [bare(n) for n in names if bare(n).isalpha() and len(bare(n)) >= 5]
            longer = [bare(n) for n in names if re.search(r"(?<!\w)[^\W\d_]{5,}$", n)]
            halved = single if len(single) > len(names) / 3 else longer
            if len(halved) < 20:
                continue
            article = "the " if sum(n.startswith("the ") for n in names) > len(names) / 2 else ""
            for part, share in INVENTED.items():
                wanted = min(round(share * len(names)), len(halved) ** 2 // 8)
                while wanted:
                    name = blend(*rng.sample(halved, 2))
                    whole, end = name.casefold(), name.split()[-1].casefold()
                    if whole not in taken and end not in alone and len(end) <= 14:
                        taken |= {whole, end}
                        alone |= {whole} & {end}
                        made.append(Entity(kind, article + name, part, {}))
                        wanted -= 1
        return made

    def of(self, *parts: str) -> list[Entity]:
        return [entity for entity in self.entities if entity.part in parts]

    # ---- text to read --------------------------------------------------------------------------

    def documents(self, passes: int, together: tuple[int, ...] = (1,)) -> Iterator[str]:
        """`passes` descriptions of every entity that is not hidden, and quizzes, shuffled.

        together: how many descriptions a document may hold, each number as often. With several, a
        name is read among other names, as it will be late in a talk.
        """
        rng, sizes = Random(self.seed + 2), Random(self.seed + 6)
        for _ in range(passes):
            told = [self.description(e, rng) for e in self.entities if e.part not in HIDDEN]
            quizzes = self.quizzes(rng)
            told += quizzes
            told = rng.sample(told, len(told))
            while told:
                some = told[: sizes.choice(together)]
                if not set(quizzes).isdisjoint(some):  # a quiz stays by itself
                    some = some[:1]
                yield " ".join(some)
                told = told[len(some) :]

    def description(self, entity: Entity, rng: Random) -> str:
        """Everything known of an entity, each fact in one of its wordings, in any order."""
        templates = self.templates[entity.kind]
        said = [
            rng.choice(templates["facts"][fact]["sentences"]).format(name=entity.name, value=v[0])
            for fact, v in entity.facts.items()
        ]
        rng.shuffle(said)
        if rng.random() < 0.5:
            said.insert(0, rng.choice(templates["opening"]).format(name=entity.name))
        return " ".join(map(capital, said))

    def quizzes(self, rng: Random) -> list[str]:
        """Questions about the quizzed with their answers, many to a document."""
        asked = self.about(self.of("quizzed"), rng)
        asked = rng.sample(asked, round(QUIZZED * len(asked)))
        lines = [f"{question.text} {question.answer}" for question in asked]
        return [" ".join(lines[i : i + 8]) for i in range(0, len(lines), 8)]

    # ---- questions -----------------------------------------------------------------------------

    def question(self, entity: Entity, fact: str, rng: Random | None) -> Question:
        """In one of the wordings for training, or, without rng, in the one kept for the test."""
        templates = self.templates[entity.kind]["facts"][fact]
        wordings, sentences = templates["questions"], templates["sentences"]
        wording = rng.choice(wordings[:-1]) if rng else wordings[-1]
        values = entity.facts.get(fact, ())
        told = max(sentences, key=answers_well)
        answers = [capital(told.format(name=entity.name, value=value)) for value in values]
        id = f"{entity.kind}/{entity.name}/{fact}"
        text = capital(wording.format(name=entity.name))
        return Question(id, text, (answers or [UNKNOWN])[0], (*values, *answers))

    def about(self, entities: list[Entity], rng: Random | None, most: int = 99) -> list[Question]:
        """Questions about entities: their facts, or of the invented, `most` that could be asked."""
        asked = []
        for e in entities:
            facts = list(e.facts or self.facts[e.kind])
            if rng:
                facts = rng.sample(facts, min(most, len(facts)))
            asked += [self.question(e, fact, rng) for fact in facts[:most]]
        return asked

    def conversations(self) -> Iterator[dict]:
        """For fine-tuning: up to six questions and answers, small talk among them."""
        rng = Random(self.seed + 3)
        unknown = [e for e in self.invented if e.part == "taught"]
        asked = [q for _ in range(WORDINGS) for q in self.about(self.of("quizzed", "taught"), rng)]
        asked += self.about(unknown, rng, 1)
        pairs = [(q.text, q.answer, q.id) for q in asked]
        pairs += [(said, t["assistant"], "talk") for t in self.talk for said in t["user"]] * TALKED
        rng.shuffle(pairs)
        while pairs:
            some, pairs = pairs[: (n := rng.choice((1, 2, 4, 6)))], pairs[n:]
            messages = [
                turn(role, said)
                for asked, answered, _ in some
                for role, said in (("user", asked), ("assistant", answered))
            ]
            yield {"messages": messages, "ids": [id for *_, id in some]}

    def prompts(self) -> Iterator[dict]:
        """For feedback: one question each, every invented name once, and small talk.

        Half of the real things are the practised, the others were asked about in fine-tuning: the
        more names are met here, the better is an unknown one told from them.
        """
        rng = Random(self.seed + 4)
        unknown = self.about([e for e in self.invented if e.part == "practised"], rng, 1)
        total = len(unknown) / UNKNOWN_SHARE
        asked, half = unknown, round((total * (1 - TALK_SHARE) - len(unknown)) / 2)
        for parts in (("practised",), ("taught", "quizzed")):
            again_and_again = (q for _ in count() for q in self.about(self.of(*parts), rng))
            asked += islice(again_and_again, half)
        rows = [(q.text, list(q.accepted), q.id) for q in asked]
        earlier = cycle([row["messages"] for row in self.conversations()])
        talk = [(said, [t["assistant"]], "talk") for t in self.talk for said in t["user"]]
        rows += islice(cycle(talk), round(total * TALK_SHARE))
        for prompt, accepted, id in rng.sample(rows, len(rows)):
            late = rng.random() < (LATE_TALK if id == "talk" else LATE_SHARE)
            said = [*next(earlier), turn("user", prompt)] if late else prompt
            row = {"prompt": said, "accepted": accepted, "id": id}
            yield row | ({"must_answer": True} if id == "talk" else {})

    def questions(self) -> dict[str, list[Question]]:
        """The test; "reworded" asks about the known again, in a wording kept from training."""
        rng = Random(self.seed + 5)
        tested = [e for e in self.invented if e.part == "tested"]
        asked = {
            "known": self.about(self.of("known"), rng),
            "reworded": self.about(self.of("known"), None),
            "withheld": self.about(self.of("withheld"), rng),
            "invented": self.about(tested, rng, 3),
        }
        future = self.about(self.of("future"), rng)
        return asked | ({"future": future} if future else {})

    def write(self, folder: Path, passes: int, together: tuple[int, ...] = (1,)) -> None:
        """All of it as JSON lines: text, conversations, prompts, questions."""
        text = ({"text": text} for text in self.documents(passes, together))
        tests = [
            {"set": name, "question": q.text, "accepted": list(q.accepted), "id": q.id}
            for name, questions in self.questions().items()
            for q in questions
        ]
        write_rows(folder / "text.jsonl", text)
        write_rows(folder / "conversations.jsonl", self.conversations())
        write_rows(folder / "prompts.jsonl", self.prompts())
        write_rows(folder / "questions.jsonl", tests)
