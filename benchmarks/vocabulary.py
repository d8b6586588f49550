"""Learning a vocabulary and encoding with it, beside `tokenizers` and `tiktoken`."""

from __future__ import annotations

import sysconfig
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from contestants import Contestant, Session, enter, in_turns, times_faster, typical
from rich.table import Table
from tables import spread

from tinylm.progress import table

VOCABULARY = 32768


def python_s_own_text(folder: Path) -> Path:
    """A text that is on every machine: the sources of Python's standard library, in one file."""
    library = Path(sysconfig.get_path("stdlib"))
    found = (p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts)
    made = folder / "library.txt"
    made.write_bytes(b"".join(path.read_bytes() for path in found))
    return made


def compare(session: Session) -> list[dict]:
    """A row for each task, library and number of threads.

    Raises AssertionError where encodings have not the same number of tokens.
    """
    rows = []
    with TemporaryDirectory() as folder:
        text = session.text or python_s_own_text(Path(folder))
        files = {"file": str(text), "directory": folder}
        for threads in sorted({1, session.threads}):
            with ExitStack() as stack:
                found = on_threads(stack, threads, session, files)
            for task, answers in found.items():
                peers = [who for who in answers if who != "tinylm"]
                rows += [row(task, text, peer, threads, answers) for peer in peers]
    return rows


def on_threads(stack: ExitStack, threads: int, session: Session, files: dict) -> dict[str, dict]:
    """The answers of all contestants by task."""
    learn = {"vocab_size": VOCABULARY, **files}
    ours = {"tinylm": Contestant("in_tinylm", threads)}
    theirs = {
        name: Contestant("in_tokenizers", threads, library=name)
        for name in ("tokenizers", "tiktoken")
    }
    ours = enter(stack, ours, lambda c: c("learn_vocabulary", **learn), session.say)
    theirs = enter(stack, theirs, lambda c: c("encode", **files), session.say)
    learners = ours | {name: theirs[name] for name in theirs if name == "tokenizers"}
    trained = in_turns(learners, session.turns, "learn_vocabulary", **learn)
    encoded = in_turns(ours | theirs, session.turns, "encode", **files)
    counts = {answers[0]["tokens"] for answers in encoded.values()}
    assert len(counts) == 1, f"not the same number of tokens: {counts}"
    return {"train": trained, "encode": encoded}


def row(task: str, text: Path, peer: str, threads: int, found: dict) -> dict:
    size = text.stat().st_size / 1e6
    made = {"task": task, "theirs": peer, "threads": threads, "megabytes": round(size, 1)}
    for key, who in (("mb_per_second", "tinylm"), ("theirs_mb_per_second", peer)):
        made[key] = round(size / typical(found[who]), 2)
    return made | times_faster(found["tinylm"], found[peer])


def vocabulary_table(rows: list[dict]) -> Table:
    title = f"Vocabulary of {VOCABULARY:,}, {rows[0]['megabytes']} MB of text, MB/s"
    made = table(title, "", "beside", "threads", "tinylm", "theirs", "faster by", words=2)
    for row in rows:
        speeds = (f"{row[key]:.1f}" for key in ("mb_per_second", "theirs_mb_per_second"))
        made.add_row(row["task"], row["theirs"], str(row["threads"]), *speeds, spread(row))
    return made
