"""Generation with a KV cache, beside `transformers`: one stream, and many at once."""

from __future__ import annotations

import math
from contextlib import ExitStack
from tempfile import TemporaryDirectory

import contestants
from contestants import Session, enter, in_turns, times_faster, typical
from rich.table import Table
from tables import spread
from tasks import NEW, PROMPT, WRITER

from tinylm.progress import table

PEERS = ("torch-stock", "torch-mkl512")
AT_ONCE = {  # prompts, and answers to each
    "one stream": (1, 1),
    "64 prompts": (64, 1),
    "64 answers to one": (1, 64),
}


def compare(session: Session) -> list[dict]:
    """A row for each of AT_ONCE and pair.

    Raises AssertionError where the first tokens written are not the same.
    """
    rows, threads = [], session.threads
    with TemporaryDirectory() as directory, ExitStack() as stack:

        def read(contestant, load: str) -> None:
            contestant(load, directory=directory)
            contestant("write", prompts=1, answers=1)

        with contestants.ours(threads)["float32"] as maker:
            maker("save", directory=directory, shape=WRITER)
        theirs = {name: contestants.theirs(name, threads) for name in PEERS}
        theirs = enter(stack, theirs, lambda c: read(c, "load_transformers"), session.say)
        ours = enter(stack, contestants.ours(threads), lambda c: read(c, "load"), session.say)
        for name, (prompts, answers) in AT_ONCE.items():
            sizes = {"prompts": prompts, "answers": answers}
            found = in_turns(ours | theirs, session.turns, "write", **sizes)
            rows += [pair(name, dtype, peer, found) for dtype in ours for peer in theirs]
    return rows


def pair(name: str, dtype: str, peer: str, found: dict) -> dict:
    firsts = ([row[0] for row in found[who][0]["text"]] for who in (dtype, peer))
    assert dtype == "bfloat16" or len(set(map(tuple, firsts))) == 1, f"{peer} writes other words"
    n, row = math.prod(AT_ONCE[name]), {"what": name, "ours": dtype, "theirs": peer}
    for key, who in (("tokens_per_second", dtype), ("theirs_tokens_per_second", peer)):
        row[key] = round(n * NEW / typical(found[who]))
    return row | times_faster(found[dtype], found[peer])


def writing_table(rows: list[dict]) -> Table:
    title = f"Generation: prompt of {PROMPT}, {NEW} new tokens, greedy, 10.6 M parameters, tokens/s"
    made = table(
        title, "at once", "beside transformers", "tinylm", "", "theirs", "faster by", words=4
    )
    for row in rows:
        mine, their = f"{row['tokens_per_second']:,}", f"{row['theirs_tokens_per_second']:,}"
        made.add_row(row["what"], row["theirs"], row["ours"], mine, their, spread(row))
    return made
