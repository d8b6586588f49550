"""Runs feedback with a person as the judge, who replies in the terminal."""

import subprocess

from commands import tinylm

from tinylm.store import Store, place_in

ROUNDS = ["--max-steps", "3", "--threads", "1"]
REPLIES = ["1", "2 too long", "1", "2", "t", "s", "1", "2"]  # the fourth and the last compare


def arguments(assistant, out, *more):
    return ["feedback", assistant / "sft", "--prompts", assistant / "prompts", "--judge", "human",
            "--out", out, "--answers", "3", "--batch-size", "9", "--max-new-tokens", "60",
            *ROUNDS, *more]  # fmt: skip


def judge(assistant, out, replies, *more) -> subprocess.CompletedProcess:
    """Run the command in the terminal variant, with these lines on its standard input."""
    said = "".join(line + "\n" for line in replies)
    return tinylm(*arguments(assistant, out, "--page", "none", *more), said=said)


def judgements(out) -> int:
    store = Store(place_in(out))
    try:
        return len(store.judgements())
    finally:
        store.close()
