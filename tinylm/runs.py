"""Finished (or interrupted) runs as a report needs them: metrics, last state, model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

from tinylm import checkpoint, xray
from tinylm.charts import Points
from tinylm.checkpoint import Checkpoint
from tinylm.config import flops_per_token
from tinylm.corpus import Corpus
from tinylm.errors import InputError
from tinylm.progress import clock
from tinylm.train import NOTHING, read_metrics

STAGES = {  # by a setting that it alone has, or that those before it lack
    "objective": "pretrain", "center": "reward", "beta": "dpo", "epochs": "sft",
    "judge": "feedback",
}  # fmt: skip
SPEED = "tokens_per_second"
HASHED = 1 << 28  # bytes: what is larger is not hashed, for a report must not take minutes


@dataclass
class Run:
    """One run directory: its metrics, its last state, its model."""

    folder: Path
    name: str

    @cached_property
    def rows(self) -> list[dict]:
        """Of metrics.jsonl. Raises InputError for a broken line that is not the last."""
        path = self.folder / "training" / "metrics.jsonl"
        rows, lines = read_metrics(self.folder), path.read_bytes().splitlines()
        if len(rows) < len(lines) - 1:
            raise InputError(f"{path}, line {len(rows) + 1}: not a JSON object with a step")
        return rows

    @cached_property
    def state(self) -> dict:
        return Checkpoint(self.folder).state()

    @cached_property
    def loaded(self):
        return checkpoint.load_for_text(self.folder, writes=False)

    @cached_property
    def stage(self) -> str:
        return next(name for key, name in STAGES.items() if key in self.config)

    def answers(self, asked: list[list[dict]]) -> list[list[xray.Piece]]:
        """What its model says in each conversation; a reward model says nothing."""
        writes = asked and not self.loaded[0].config.scores
        return xray.answering(*self.loaded, asked) if writes else [[] for _ in asked]

    @property
    def config(self) -> dict:
        return self.state["config"]

    @property
    def environment(self) -> dict:
        return self.state.get("environment", {})

    def points(self, key: str, evaluations: bool = False) -> Points:
        """(step, number) of all updates made, or of all evaluations, that have such a number."""
        rows = [row for row in self.rows if ("lr" not in row) == evaluations and not refused(row)]
        return [(row["step"], row[key]) for row in rows if finite(row.get(key))]

    def marks(self) -> list[tuple[float, str, str]]:
        """(step, event, what happened) of updates that were refused, and of resumes."""
        rows = [row for row in self.rows if refused(row) or row.get("event") == "resume"]
        marks = [(row["step"], row["event"], row.get("reason", "resumed")) for row in rows]
        turned = next((row["step"] for row in self.rows if row.get("outwitted")), None)
        return marks + ([(turned, "skip", "the judge is outwitted")] if turned else [])

    def utilisation(self) -> float | None:
        """Share of what its threads can multiply and add, at the median speed.

        Of next-word training alone: elsewhere a row is only partly learned from.
        """
        peak, speeds = self.environment.get("peak_gflops"), self.points(SPEED)
        if self.config.get("objective") != "next" or not peak or not speeds:
            return None
        flops = flops_per_token(self.loaded[0].config, self.config["block_size"])
        return flops * median(speed for _, speed in speeds) / peak / 1e9


def find_runs(folders: list[Path]) -> list[Run]:
    """The runs in these directories, or in the directories within them, by stage.

    Of a directory with claims.json, which its runs were summed up in, the claims are enough.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such directory")
        if (folder / "claims.json").exists():
            continue
        inner = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        runs = [path for path in inner if (path / "training" / "metrics.jsonl").exists()]
        if not runs:
            raise InputError(f"{folder}: no run in it: expected training/metrics.jsonl, or runs")
        found |= {path: Run(path, path.name) for path in runs}
    if len({run.name for run in found.values()}) < len(found):
        shared = os.path.commonpath([path.resolve().parent for path in found])
        for path, run in found.items():
            run.name = str(path.resolve().relative_to(shared))
    return sorted(found.values(), key=lambda run: [*STAGES.values()].index(run.stage))


def refused(row: dict) -> bool:
    return row.get("event") == "skip" and row.get("reason") != NOTHING


def finite(value) -> bool:
    """A number that can be drawn, and added up with others."""
    return isinstance(value, int | float) and abs(value) < 1e100


def facts(run: Run) -> dict[str, str]:
    """What it was, and what it took."""
    (model, _), state, where = run.loaded, run.state, run.environment
    c, n, threads = model.config, model.n_parameters(), where.get("threads")
    weights, tokens = run.folder / "model.safetensors", run.folder / "training" / "tokens"
    corpus = Corpus.load(tokens)
    sources = corpus.source if corpus else state["stage"].get("source", [])
    sources = [of for of in sources if isinstance(of, list)]
    text = ", ".join(f"{name} {size:,} bytes" for name, size in sources[:4])
    cost = f" · {threads * state['seconds'] / 60:.1f} core-minutes" if threads else ""
    software = " · ".join(f"{k} {where[k]}" for k in ("tinylm", "python", "numpy") if k in where)
    shape = f"{c.architecture}, {c.n_layer} layers, {c.n_embd} wide, context {c.block_size}"
    return {
        "model": shape,
        "parameters": f"{n:,}",
        "size": f"{weights.stat().st_size / 1e6:.1f} MB",
        "sha256 of weights": sha256([weights]),
        "data": text,
        "sha256 of tokens": sha256(sorted(tokens.glob("*.bin"))) if corpus else "",
        "seed": str(run.config["seed"]),
        "steps": f"{state['step']:,}, {state['guard']['refused']} refused",
        "time": clock(state["seconds"]) + cost,
        "ran on": ", ".join(filter(None, (where.get("processor"), where.get("backend")))),
        "software": software,
        "date": where.get("date", ""),
    }


def sha256(files: list[Path]) -> str:
    """The first twelve digits of the hash of these files, one after another."""
    if sum(file.stat().st_size for file in files) > HASHED:
        return "too large to hash"
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
