"""Judged answers in an SQLite file: what was asked, what was answered, who judged it and how.

    run          one training run, or one imported file
    item         a prompt and its answers; `kind` is train, compare (the model's answer and that of
                 the fine-tuned model) or imported; `place` is its number among its kind in the run
    response     an answer: its text, token ids and log-probabilities under the model that wrote it
    judgement    somebody's scores of an item's answers, in the order of the answers; null: none

An item is stored before anybody is asked about it, and a judgement as soon as it is made, so that a
process killed at any moment has lost nothing. How far judges agree is computed in agreement.py.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from tinylm.errors import InputError
from tinylm.preferences import Judged

SCHEMA = """
CREATE TABLE IF NOT EXISTS run (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL, began TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS item (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run, kind TEXT NOT NULL,
    place INTEGER NOT NULL, round INTEGER NOT NULL, kl REAL, messages TEXT NOT NULL,
    UNIQUE (run, kind, place));
CREATE TABLE IF NOT EXISTS response (
    item INTEGER NOT NULL REFERENCES item, number INTEGER NOT NULL, text TEXT NOT NULL,
    ids TEXT, logp TEXT, PRIMARY KEY (item, number));
CREATE TABLE IF NOT EXISTS judgement (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES item, judge TEXT NOT NULL,
    scores TEXT NOT NULL, shown TEXT, comment TEXT NOT NULL DEFAULT '', made TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS judgement_of ON judgement (item, judge);
"""
VERSION = 1  # of the schema above, kept in the file as its user_version


@dataclass
class Item:
    """A prompt and its answers, as they lie in the store."""

    id: int
    kind: str
    place: int
    round: int
    kl: float | None
    messages: list[dict]
    answers: list[str]
    ids: list[list[int]] = field(default_factory=list)


@dataclass
class Judgement:
    """Scores of the answers of an item, and the order in which they were shown."""

    item: int
    judge: str
    scores: list[float | None]
    shown: list[int] | None
    comment: str


class Store:
    """The judged answers of one file; made where it does not exist. Every method commits."""

    def __init__(self, path: str | Path):
        """Raises InputError where the file is something else."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.db = sqlite3.connect(self.path, isolation_level=None)
            (version,) = self.db.execute("PRAGMA user_version").fetchone()
            if version not in (0, VERSION):
                raise InputError(f"{path}: written by a newer tinylm")
            found = {name for (name,) in self.db.execute("SELECT name FROM sqlite_master")}
            if found and "judgement" not in found:
                raise sqlite3.DatabaseError("another program's tables are in it")
            if not found:
                self.db.execute("PRAGMA journal_mode = WAL")
                made = f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT"
                self.db.executescript(made)
        except sqlite3.OperationalError as error:  # a directory, or another process writes to it
            remedy = "name a file in it" if self.path.is_dir() else "try again"
            raise InputError(f"{path}: cannot be opened ({error}); {remedy}") from None
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: not a store of judgements ({error})") from None

    def close(self) -> None:
        self.db.close()

    def run(self, name: str) -> int:
        """The number of the latest run of this name, or else of a new one.

        A name says everything that decides what is asked: other prompts are another run.
        """
        query = "SELECT id FROM run WHERE name = ? ORDER BY id DESC LIMIT 1"
        if last := self.db.execute(query, (name,)).fetchone():
            return last[0]
        began = self.db.execute("INSERT INTO run (name, began) VALUES (?, ?)", (name, now()))
        return began.lastrowid

    def add_item(
        self, run: int, messages: list[dict], answers: Sequence[str], kind: str = "train",
        place: int | None = None, round: int = 0, kl: float | None = None,
        ids: Sequence[Sequence[int]] = (), logp: Sequence[Sequence[float]] = (),
    ) -> int:  # fmt: skip
        """Store a prompt and its answers; returns the item's number. place None: the next one."""
        missing = [None] * len(answers)
        texts = [[x and json.dumps([*x]) for x in of or missing] for of in (ids, logp)]
        with self.db:
            self.db.execute("BEGIN IMMEDIATE")
            if place is None:
                found = "SELECT coalesce(max(place) + 1, 0) FROM item WHERE run = ? AND kind = ?"
                (place,) = self.db.execute(found, (run, kind)).fetchone()
            values = (run, kind, place, round, kl, json.dumps(messages))
            columns = "INSERT INTO item (run, kind, place, round, kl, messages)"
            item = self.db.execute(f"{columns} VALUES (?, ?, ?, ?, ?, ?)", values).lastrowid
            rows = [(item, i, *row) for i, row in enumerate(zip(map(whole, answers), *texts))]
            self.db.executemany("INSERT INTO response VALUES (?, ?, ?, ?, ?)", rows)
        return item

    def items(self, **wanted) -> list[Item]:
        """All items, or those of a run, kind or place, in the order in which they were stored."""
        where, values = matching(**wanted)
        columns = "SELECT id, kind, place, round, kl, messages FROM item"
        rows = self.db.execute(f"{columns}{where} ORDER BY id", values).fetchall()
        return [Item(*row, json.loads(said), *self.responses(row[0])) for *row, said in rows]

    def find(self, run: int, kind: str, place: int) -> Item | None:
        return next(iter(self.items(run=run, kind=kind, place=place)), None)

    def responses(self, item: int) -> tuple[list[str], list[list[int]]]:
        query = "SELECT text, ids FROM response WHERE item = ? ORDER BY number"
        rows = self.db.execute(query, (item,)).fetchall()
        return [text for text, _ in rows], [json.loads(ids) for _, ids in rows if ids]

    def judge(
        self, item: int, judge: str, scores: Sequence[float | None],
        shown: Sequence[int] | None = None, comment: str = "",
    ) -> None:  # fmt: skip
        """Store somebody's scores; shown: the answers' numbers in the order of showing."""
        values = (json.dumps([*scores]), shown and json.dumps([*shown]), whole(comment), now())
        columns = "INSERT INTO judgement (item, judge, scores, shown, comment, made)"
        self.db.execute(f"{columns} VALUES (?, ?, ?, ?, ?, ?)", (item, judge, *values))

    def add_all(self, run: str, judged: Sequence[Judged], judge: str) -> int:
        """Store what somebody has judged elsewhere; returns how much it was.

        Answers that are here already get one more judgement, so that judges can be compared.
        """
        number = self.run(run)
        known = {alike(item.messages, item.answers): item for item in self.items()}
        for each in judged:
            item = known.get(alike(each.messages, each.answers))
            if item:
                told = zip(map(whole, each.answers), each.scores)  # of equal ones, the first judged
                of_text = dict(reversed([pair for pair in told if pair[1] is not None]))
                self.judge(item.id, judge, [of_text.get(text) for text in item.answers])
            else:
                new = self.add_item(number, each.messages, each.answers, "imported")
                self.judge(new, judge, each.scores)
        return len(judged)

    def withdraw(self, item: int, judge: str) -> None:
        """Forget what this judge said of an item."""
        self.db.execute("DELETE FROM judgement WHERE item = ? AND judge = ?", (item, judge))

    def judgements(self, item: int | None = None, judge: str | None = None) -> list[Judgement]:
        """Judgements of an item (None: of all) by somebody (None: by all), oldest first."""
        where, values = matching(item=item, judge=judge)
        columns = "SELECT item, judge, scores, shown, comment FROM judgement"
        return [
            Judgement(item, judge, json.loads(scores), shown and json.loads(shown), comment)
            for item, judge, scores, shown, comment in self.db.execute(
                f"{columns}{where} ORDER BY id", values
            )
        ]

    def judged(self, judge: str | None = None) -> Iterator[Judged]:
        """Every judged prompt with each judge's last scores; equal answers are told once.

        What was skipped is left out.
        """
        items = {item.id: item for item in self.items()}
        last = {(j.item, j.judge): j for j in self.judgements(judge=judge)}
        for id, who in sorted(last):
            item, judgement = items[id], last[id, who]
            told = [(a, s) for a, s in zip(item.answers, judgement.scores) if s is not None]
            if told:
                scores, answers = dict(reversed(told)), [*dict.fromkeys(item.answers)]
                yield Judged(item.messages, answers, [scores.get(answer) for answer in answers])


def alike(messages: list[dict], answers: list[str]) -> tuple:
    """Equal for the same answers to the same prompt, in whatever order."""
    return json.dumps(messages, sort_keys=True), *sorted({*map(whole, answers)})


def whole(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which SQLite does not take."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def matching(**wanted) -> tuple[str, list]:
    """The WHERE clause of the columns that are wanted, and its values."""
    wanted = {column: value for column, value in wanted.items() if value is not None}
    return " WHERE " * bool(wanted) + " AND ".join(f"{c} = ?" for c in wanted), [*wanted.values()]


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def place_in(folder: str | Path) -> Path:
    """Where a run directory keeps its store."""
    return Path(folder) / "training" / "judgements.sqlite"


def open_existing(path: str | Path) -> Store:
    """The store of a run directory, or a store by its own name."""
    path = Path(path)
    file = place_in(path) if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{file}: no such file: nobody has judged anything there")
    return Store(file)
