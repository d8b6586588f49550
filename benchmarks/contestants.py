"""The contestants as seen by the command: processes that take turns.

Measuring in turns (each contestant a moment, then all again) makes a drifting machine hit all of
them alike: a ratio is formed within each turn, and its median, lowest and highest are told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

from tinylm.environment import fma_peak

HERE = Path(__file__).parent
OURS = ("float32", "bfloat16")
THEIRS = ("torch-stock", "torch-mkl512", "torch-bfloat16")


@dataclass
class Session:
    """What holds for a whole run of the command."""

    threads: int
    turns: int
    say: Callable[[str], None]
    text: Path | None = None  # for the tokenizer
    shakespeare: Path | None = None  # for the time to quality
    peak: float = 0.0  # multiply-adds, GFLOP/s: the most that was seen

    def look_at_the_peak(self) -> None:
        """A busy moment shows less than the machine can do."""
        self.peak = max(self.peak, fma_peak(self.threads))


class Unavailable(Exception):
    """A contestant cannot run here; says why."""


class Contestant:
    """A process that does tasks while it is entered: contestant("train", seconds=1) -> dict."""

    def __init__(self, module: str, threads: int, environment: dict | None = None, **options):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), str(threads))
        self.environment = {**os.environ, **limits, **(environment or {})}
        arguments = json.dumps({"threads": threads, **options})
        self.command = [sys.executable, str(HERE / "serve.py"), module, arguments]

    def __enter__(self) -> Contestant:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(self.command, env=self.environment, **pipes)
        return self

    def __exit__(self, *error) -> None:
        self.process.kill()
        self.process.communicate()

    def __call__(self, task: str, **arguments) -> dict:
        """Raises Unavailable where the contestant says so, or dies."""
        print(json.dumps({"do": task, **arguments}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"unavailable": "its process died"}
        if "unavailable" in answer:
            raise Unavailable(answer["unavailable"])
        return answer


@cache
def full_width() -> dict:
    """The environment in which PyTorch's MKL uses the widest vectors on an AMD chip as well.

    MKL asks this function whether the chip is one of its maker's; if not, it stops at AVX2.
    """
    folder = Path(mkdtemp(prefix="mkl512-"))
    source, library = folder / "mkl512.c", folder / "mkl512.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return {"LD_PRELOAD": str(library)}


def ours(threads: int) -> dict[str, Contestant]:
    """tinylm by the dtype of its products."""
    return {dtype: Contestant("in_tinylm", threads, dtype=dtype) for dtype in OURS}


def peers(ours: dict) -> list[str]:
    """THEIRS in the dtypes of ours: where the chip has no bfloat16, PyTorch's takes minutes."""
    return [name for name in THEIRS if name != "torch-bfloat16" or "bfloat16" in ours]


def theirs(name: str, threads: int, **options) -> Contestant:
    """One of THEIRS; bfloat16 gets the wide vectors too, for what it leaves in float32."""
    environment = {} if name == "torch-stock" else full_width()
    dtype = "bfloat16" if name == "torch-bfloat16" else "float32"
    return Contestant("in_torch", threads, environment, dtype=dtype, **options)


def enter(stack: ExitStack, entrants: dict, prepare: Callable, say: Callable) -> dict:
    """Start processes and prepare(contestant) each; returns those that can run here."""
    ready = {}
    for name, contestant in entrants.items():
        try:
            prepare(stack.enter_context(contestant))
        except Unavailable as reason:
            say(f"{name} is left out: {reason}")
        else:
            ready[name] = contestant
    return ready


# ---- taking turns ------------------------------------------------------------------------------


def in_turns(contestants: dict, turns: int, task: str, **arguments) -> dict[str, list[dict]]:
    """Each contestant's answers, one a turn."""
    answers = {name: [] for name in contestants}
    for _ in range(turns):
        for name, contestant in contestants.items():
            answers[name].append(contestant(task, **arguments))
    return answers


def typical(answers: list[dict]) -> float:
    """The median seconds of a contestant's answers."""
    return median(answer["seconds"] for answer in answers)


def times_faster(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
    """How many times as fast ours is, turn by turn: the median, the lowest, the highest."""
    ratios = [t["seconds"] / o["seconds"] for o, t in zip(ours, theirs, strict=True)]
    found = {"speed": median(ratios), "low": min(ratios), "high": max(ratios)}
    return {name: round(value, 3) for name, value in found.items()}
