"""Learning a vocabulary and encoding with it, beside `tokenizers` and `tiktoken`."""

from __future__ import annotations

import sysconfig
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from contestants import Contestant, enter, in_turns, times_faster, typical
from rich.table import Table
from tables import spread, table

VOCABULARY = 32768


def python_s_own_text(folder: Path) -> Path:
    """A text that is on every machine: the sources of Python's standard library, in one file."""
    library = Path(sysconfig.get_path("stdlib"))
    found = (p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts)
    made = folder / "library.txt"
    made.write_bytes(b"".join(path.read_bytes() for path in found))
    return made


def compare(text: Path | None, turns: int, most_threads: int, say) -> list[dict]:
    """A row for each task, library and number of threads.

    Raises AssertionError where encodings have not the same number of tokens.
    """
    rows = []
    with TemporaryDirectory() as folder:
        text = text or python_s_own_text(Path(folder))
        files = {"file": str(text), "directory": folder}
        for threads in sorted({1, most_threads}):
            with ExitStack() as stack:
                rows += on_threads(stack, threads, turns, text, files, say)
    return rows


def on_threads(stack: ExitStack, threads: int, turns: int, text: Path, files: dict, say) -> list:
    learn = {"vocab_size": VOCABULARY, **files}
    ours = {"tinylm": Contestant("in_tinylm", threads)}
    theirs = {
        name: Contestant("in_tokenizers", threads, library=name)
        for name in ("tokenizers", "tiktoken")
    }
    ours = enter(stack, ours, lambda contestant: contestant("learn_vocabulary", **learn), say)
    theirs = enter(stack, theirs, lambda contestant: contestant("encode", **files), say)
    learners = {name: theirs[name] for name in theirs if name != "tiktoken"}
    trained = in_turns(ours | learners, turns, "learn_vocabulary", **learn)
    encoded = in_turns(ours | theirs, turns, "encode", **files)
    counts = {answers[0]["tokens"] for answers in encoded.values()}
    assert len(counts) == 1, f"not the same number of tokens: {counts}"
    return [row("train", text, peer, threads, trained) for peer in learners] + [
        row("encode", text, peer, threads, encoded) for peer in theirs
    ]


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
