"""From a text to a model of the same quality: wall time, start-up and all.

nanoGPT's recipe in PyTorch (torch_recipe.py) beside tinylm's preset for the same text, seed by
seed. Losses are nats per character of the last tenth, whole, in windows of 64.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from contestants import HERE, Session, Unavailable, times_faster
from rich.table import Table
from tables import spread

from tinylm.progress import table

PRESET, BLOCK, SEEDS = "shakespeare", 64, 3


def compare(session: Session) -> dict:
    """Medians over seeds, or {} where the text is missing or one of the two cannot run."""
    file, threads = session.shakespeare, session.threads
    runs: dict[str, list[dict]] = {"ours": [], "theirs": []}
    try:
        if file is None:
            raise Unavailable("name its text with --shakespeare FILE")
        for seed in range(SEEDS):
            runs["ours"].append(ours(file, seed, threads))
            runs["theirs"].append(theirs(file, seed, threads))
    except Unavailable as reason:
        session.say(f"time to quality is left out: {reason}")
        return {}
    found = {who: middle(part) for who, part in runs.items()}
    return {"preset": PRESET, **found, **times_faster(runs["ours"], runs["theirs"])}


def middle(runs: list[dict]) -> dict:
    return {key: round(median(run[key] for run in runs), 4) for key in ("seconds", "loss")}


def ours(file: Path, seed: int, threads: int) -> dict:
    limits = ("--threads", threads, "--json")
    with TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ("tinylm", "pretrain", file, "--preset", PRESET, "--out", out, "--seed", seed)
        seconds, _ = timed("-m", *command, *limits)
        _, found = timed("-m", "tinylm", "eval", out, "--block-size", BLOCK, *limits)
    return {"seconds": seconds, "loss": found["bits_per_byte"] * math.log(2)}  # a byte a character


def theirs(file: Path, seed: int, threads: int) -> dict:
    seconds, found = timed(HERE / "torch_recipe.py", file, seed, OMP_NUM_THREADS=str(threads))
    return {"seconds": seconds, **found}


def timed(*arguments, **environment) -> tuple[float, dict]:
    """Seconds of a Python command, and the JSON that it printed. Raises Unavailable."""
    tick = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - tick
    if done.returncode:
        raise Unavailable(done.stderr.strip().splitlines()[-1])
    return seconds, json.loads(done.stdout)


def quality_table(found: dict) -> Table:
    made = table("Time to quality, medians of seeds", "", "seconds", "loss", "faster by")
    mine, their = found["ours"], found["theirs"]
    made.add_row("PyTorch", f"{their['seconds']:.1f}", f"{their['loss']:.4f}", "")
    preset = f"tinylm, preset {found['preset']}"
    made.add_row(preset, f"{mine['seconds']:.1f}", f"{mine['loss']:.4f}", spread(found))
    return made
