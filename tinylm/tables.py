"""Reading the almanac: tables of facts, and the wordings that turn them into text.

Whatever is wrong in them raises InputError with file and line, before anything is trained on it.
Who is asked what, and when, is not decided here but in almanac.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tinylm.errors import InputError

Facts = dict[str, tuple[str, ...]]  # fact -> accepted answers, the first one used in sentences
Table = dict[str, Facts]  # name of entity -> its facts


def bare(name: str) -> str:
    return name.removeprefix("the ")


def read_table(path: Path) -> tuple[list[str], Table]:
    """The columns of a .tsv file and its rows; "a|b" in a cell are two accepted answers."""
    lines = path.read_text(encoding="utf-8").splitlines()
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
        at[key] = line
        table[name] = {fact: tuple(cell.split("|")) for fact, cell in zip(facts, cells) if cell}
    return facts, table


def read_wordings(path: Path, facts: list[str]) -> dict:
    """The wordings of a .json file: sentences and questions for each column of its table."""
    try:
        wordings = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    table = path.with_suffix(".tsv")
    for fact in sorted(set(facts) ^ set(wordings["facts"])):
        if fact in facts:
            raise InputError(f"{table}: column {fact!r} has no wordings in {path.name}")
        raise InputError(f"{line_of(path, fact)}{fact!r} is no column of {table.name}")
    for sentence in wordings["opening"]:
        check_fields(path, sentence, ["name"])
    for of_fact in wordings["facts"].values():
        for sentence in of_fact["sentences"]:
            check_fields(path, sentence, ["name", "value"])
        for question in of_fact["questions"]:
            check_fields(path, question, ["name"])
    return wordings


def check_fields(path: Path, sentence: str, expected: list[str]) -> None:
    if sorted(re.findall(r"{(.*?)}", sentence)) != expected:
        fields = " and ".join(f"{{{field}}}" for field in expected)
        raise InputError(f"{line_of(path, sentence)}expected {fields} once in {sentence!r}")


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
