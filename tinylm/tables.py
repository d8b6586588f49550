"""Reading the almanac: tables of facts, and the wordings that turn them into text.

Whatever is wrong in them raises InputError with file and line, before anything is trained on it.
Who is asked what, and when, is not decided here but in almanac.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tinylm.errors import InputError
from tinylm.files import read_json, read_rows

Facts = dict[str, tuple[str, ...]]  # fact -> accepted answers, the first one used in sentences
Table = dict[str, Facts]  # name of entity -> its facts


def bare(name: str) -> str:
    return name.removeprefix("the ")


def read_table(path: Path) -> tuple[list[str], Table]:
    """The columns of a .tsv file and its rows; "a|b" in a cell are two accepted answers."""
    lines = read_utf8(path).splitlines()
    rows = [(n, line.split("\t")) for n, line in enumerate(lines, 1) if line and line[0] != "#"]
    if not rows or rows[0][1][0] != "name":
        raise InputError(f"{path}: expected a header, name and one column for each fact")
    (_, (_, *facts)), *rows = rows
    table, at = {}, {}
    for line, (name, *cells) in rows:
        where = f"{path}, line {line}: "
        if len(cells) != len(facts):
            raise InputError(
                f"{where}expected {len(facts) + 1} cells with tabs between them, as in the header, "
                f"got {len(cells) + 1}"
            )
        if (key := bare(name).casefold()) in at:
            raise InputError(f"{where}{name!r} is in line {at[key]} already; keep one of them")
        if not name.strip():
            raise InputError(f"{where}expected a name in the first cell")
        at[key] = line
        table[name] = {fact: tuple(cell.split("|")) for fact, cell in zip(facts, cells) if cell}
    return facts, table


def read_wordings(path: Path, facts: list[str]) -> dict:
    """The wordings of a .json file: sentences and questions for each column of its table."""
    wordings, table = read_json(path), path.with_suffix(".tsv")
    of = wordings.get("facts")
    if not isinstance(of, dict):
        raise InputError(f'{path}: expected "opening", and "facts" with wordings for each column')
    for fact in sorted(set(facts) ^ set(of)):
        if fact in facts:
            raise InputError(f"{table}: column {fact!r} has no wordings in {path.name}")
        raise InputError(f"{line_of(path, fact)}{fact!r} is no column of {table.name}")
    check_wordings(path, wordings, "opening", "opening", 1, "{name}")
    for fact in facts:
        check_wordings(path, of[fact], fact, "sentences", 1, "{name}", "{value}")
        check_wordings(path, of[fact], fact, "questions", 2, "{name}")  # of which one is the test's
    return wordings


def check_wordings(path: Path, content, key: str, name: str, least: int, *fields: str) -> None:
    """Raise InputError where content[name], which is found by key, are not wordings."""
    wordings = content.get(name) if isinstance(content, dict) else None
    if not are_texts(wordings, least):
        raise InputError(f'{line_of(path, key)}expected "{name}", a list of {least} or more texts')
    for wording in wordings:
        if sorted(re.findall(r"{\w*}|[{}]", wording)) != [*fields]:
            once = " and ".join(fields)
            raise InputError(f"{line_of(path, wording)}expected {once} once in {wording!r}")


def read_talk(path: Path) -> list[dict]:
    """Small talk: what a user may say, "user", and the answer to each of these, "assistant"."""
    rows = [*read_rows(path)]
    for place, row in rows:
        if not are_texts(row.get("user")) or not isinstance(row.get("assistant"), str):
            raise InputError(f'{path}, {place}: expected "user", a list, and "assistant", a text')
    return [row for _, row in rows]


def read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not UTF-8, {error.reason}") from None


def are_texts(x, least: int = 1) -> bool:
    return isinstance(x, list) and len(x) >= least and all(isinstance(text, str) for text in x)


def line_of(path: Path, text: str) -> str:
    """Where a text of a JSON file stands; without a line where it is written with escapes."""
    lines = path.read_text(encoding="utf-8").splitlines()
    quoted = json.dumps(text, ensure_ascii=False)
    place = next((f", line {n}" for n, line in enumerate(lines, 1) if quoted in line), "")
    return f"{path}{place}: "


def check_names(folder: Path, tables: dict[str, Table]) -> None:
    """Raise InputError where a name is in two tables: it would be dealt two parts."""
    found = {}
    for kind, table in tables.items():
        for name in table:
            other = found.setdefault(bare(name).casefold(), kind)
            if other != kind:
                path = folder / f"{kind}.tsv"
                lines = path.read_text(encoding="utf-8").splitlines()
                line = next(n for n, line in enumerate(lines, 1) if line.startswith(name + "\t"))
                raise InputError(f"{path}, line {line}: {name!r} is in {other}.tsv too; keep one")
