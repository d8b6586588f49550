"""Runs feedback with a person as the judge, who replies in the terminal."""

import json
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


def log_probabilities(store: Store, item: int) -> list[list[float]]:
    """log π of each token of each answer, as the store keeps them: float32 numbers."""
    query = "SELECT logp FROM response WHERE item = ? ORDER BY number"
    return [json.loads(logp) for (logp,) in store.db.execute(query, (item,))]


def judgements(out) -> int:
    store = Store(place_in(out))
    try:
        return len(store.judgements())
    finally:
        store.close()
