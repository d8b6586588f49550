"""The report card: one HTML file of what runs have learned and what it took, to be read offline.

Everything is read from run directories (and results.json and claims.json beside them) and asked of
the models there; charts.py makes paths of curves, templates/ lay it all out. No HTML is made here.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median

from jinja2 import Environment, PackageLoader

from tinylm import checkpoint, xray
from tinylm.bench import flops_per_token
from tinylm.charts import Chart, Points, smooth
from tinylm.chat import template_of, turn
from tinylm.checkpoint import Checkpoint, read_json, write_text
from tinylm.data import Corpus
from tinylm.errors import InputError
from tinylm.evaluate import wilson
from tinylm.progress import Progress, clock
from tinylm.train import read_metrics

STAGES = {"objective": "pretrain", "epochs": "sft", "judge": "feedback"}  # by a setting of its own
GREETING = "Hello!"
READ = 140  # tokens of held-out text that are shown
HASHED = 1 << 28  # bytes: what is larger is not hashed, for a report must not take minutes


@dataclass
class Run:
    """One run directory: its metrics, its last state, its model."""

    folder: Path
    name: str

    @cached_property
    def rows(self) -> list[dict]:
        return checked_metrics(self.folder)

    @cached_property
    def state(self) -> dict:
        return Checkpoint(self.folder).state()

    @cached_property
    def loaded(self):
        return checkpoint.load(self.folder)

    @cached_property
    def stage(self) -> str:
        return next(name for key, name in STAGES.items() if key in self.config)

    @property
    def config(self) -> dict:
        return self.state["config"]

    @property
    def environment(self) -> dict:
        return self.state.get("environment", {})

    @property
    def steps(self) -> list[dict]:
        return [row for row in self.rows if "lr" in row]

    def points(self, key: str) -> Points:
        return [(row["step"], row[key]) for row in self.steps if finite(row.get(key))]

    def evaluations(self, key: str) -> list[tuple]:
        found = [row for row in self.rows if "lr" not in row and finite(row.get(key))]
        return [(row["step"], row[key], f"step {row['step']}: {row[key]:.4g}") for row in found]

    def utilisation(self) -> float | None:
        """Share of the multiply-adds that its threads can do: of a median step without evaluation.

        What feedback computes besides training (sampling, judging) is not counted, so None.
        """
        c, peak = self.config, self.environment.get("peak_gflops")
        plain = [(a, b) for a, b in pairwise(self.rows) if "lr" in a and "lr" in b]
        if self.stage == "feedback" or not peak or not plain:
            return None
        tokens = c["batch_size"] * c["accumulate"] * c["block_size"]
        seconds = median(b["seconds"] - a["seconds"] for a, b in plain)
        return flops_per_token(self.loaded[0].config, c["block_size"]) * tokens / seconds / peak / 1e9


def finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def checked_metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl. Raises InputError for a broken line that is not the last."""
    path = folder / "training" / "metrics.jsonl"
    rows, lines = read_metrics(folder), path.read_text().splitlines()
    good = next((i for i, r in enumerate(rows) if not isinstance(r, dict) or "step" not in r), None)
    broken = len(rows) if good is None and len(rows) < len(lines) - 1 else good
    if broken is not None:
        raise InputError(f"{path}, line {broken + 1}: not a JSON object with a step")
    return rows


# ---- what there is to show ---------------------------------------------------------------------


def find_runs(folders: list[Path]) -> list[Run]:
    """The runs in these directories, or in the directories within them, by stage."""
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such directory")
        inner = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
        runs = [path for path in inner if (path / "training" / "metrics.jsonl").exists()]
        if not runs and not (folder / "claims.json").exists():
            raise InputError(f"{folder}: no run in it: expected training/metrics.jsonl, or runs")
        found |= {path: Run(path, path.name) for path in runs}
    if len({run.name for run in found.values()}) < len(found):
        for run in found.values():
            run.name = str(run.folder)
    return sorted(found.values(), key=lambda run: [*STAGES.values()].index(run.stage))


def charts(run: Run, runs: list[Run]) -> list[Chart]:
    """What happened in a run; the other runs of its stage in grey."""
    others = [other for other in runs if other.stage == run.stage and other is not run]
    by = lambda key, of=run: smooth(of.points(key))
    if run.stage == "feedback":
        main = Chart("Reward", "step", "mean score of the sampled answers; dots: of held-out ones")
        drift = lambda of: [
            (math.sqrt(max(kl, 0)), r) for (_, kl), (_, r) in zip(by("kl", of), by("reward", of))
        ]
        paid = Chart("Reward bought with drift", "√KL from the fine-tuned model, nats per token")
        paid.lines = [("other", drift(other)) for other in others] + [("run", drift(run))]
        share = Chart("Scores", "step", "share of answers above zero (line) and below it (dashed)")
        share.lines = [("run", by("positive")), ("dashed", by("negative"))]
        key, held, more = "reward", "held_out_reward", [paid, share]
    else:
        main = Chart("Loss", "step", "nats per token; dots: held out", log=True)
        key, held, more = "loss", "loss", []
    main.lines = [("other", by(key, other)) for other in others]
    main.lines += [("raw", run.points(key)), ("run", by(key))]
    main.dots = run.evaluations(held)
    main.marks = [
        (row["step"], row["event"], row.get("reason", "resumed"))
        for row in run.rows
        if row.get("event") in ("skip", "resume")
    ]
    rate = Chart("Learning rate", "step", lines=[("run", run.points("lr"))])
    speed = Chart("Tokens per second", "step", speed_note(run))
    speed.lines = [("raw", run.points("tokens_per_second")), ("run", by("tokens_per_second"))]
    return [chart for chart in (main, *more, rate, speed) if chart.points]


def speed_note(run: Run) -> str:
    share = run.utilisation()
    if share is None:
        return "of answers" if run.stage == "feedback" else ""
    peak = f"{run.environment['peak_gflops']:,.0f} GFLOP/s of multiply-adds measured beside it"
    return f"{share:.0%} of the {peak}"


def figures(runs: list[Run]) -> list[tuple[str, str]]:
    """The few numbers that sum it up: (number, what it is)."""
    found = []
    for run in runs:
        r = {key: value for key, value in run.state["results"].items() if finite(value)}
        if "bits_per_byte" in r:
            xz = f"; xz needs {r['xz_bits_per_byte']:.3f}" if "xz_bits_per_byte" in r else ""
            number, what = f"{r['bits_per_byte']:.3f}", f"bits per byte of held-out text{xz}"
        elif "held_out_reward" in r:
            number = f"{r['reward_before']:.2f} → {r['held_out_reward']:.2f}"
            what = "mean score on held-out prompts, before and after"
        elif "loss" in r:
            number, what = f"{r['loss']:.3f}", "nats per token of held-out answers"
        else:
            continue
        found.append((number, f"{run.name}: {what}"))
    if runs:
        weights = sum((run.folder / "model.safetensors").stat().st_size for run in runs[:1])
        found.insert(0, (f"{runs[0].loaded[0].n_parameters():,}", f"parameters, {weights / 1e6:.1f} MB"))
        seconds = sum(run.state["seconds"] for run in runs)
        found.append((clock(seconds), "of training" + (", all runs together" if runs[1:] else "")))
    return found


def verdicts(results: dict) -> list[dict]:
    """results.json of a quickstart: for each set of questions, every stage's shares."""
    stages = results.get("stages", {})
    sets: dict[str, dict] = {}
    for stage, found in stages.items():
        for name, shares in found.items():
            if isinstance(shares, dict):
                n = shares["n"]
                shares = [(v, shares[v], *wilson(shares[v], n)) for v in ("right", "wrong", "idk")]
                sets.setdefault(name, {"n": n, "stages": {}})["stages"][stage] = shares
    titles = results.get("sets", {})
    return [{"name": titles.get(name, name), **found} for name, found in sets.items()]


def read_claims(path: Path) -> list[dict]:
    try:
        claims = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        for claim in claims:
            values = [v for m in claim["measures"] for v in (m["high"], m["value"]) if finite(v)]
            claim["top"] = max([1.0, *values])
            claim["title"], claim["says"], claim["holds"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a list of claims ({type(error).__name__}: {error})") from None
    return claims


def prompts(runs: list[Run], results: dict, ask: list[str]) -> list[tuple[str, list[dict]]]:
    """(what it is, conversation) of everything that the models are asked."""
    asked = [(row["set"], row["question"]) for row in results.get("asked", [])]
    if asked:
        found = [(about, [turn("user", question)]) for about, question in asked]
    else:
        rows = [messages for run in runs for messages in run.state["stage"].get("prompts", [])]
        found = [("held out from training", m) for i, m in enumerate(rows) if m not in rows[:i]][:6]
    chats = any(template_of(run.loaded[1]) for run in runs if run.loaded[1])
    own = [*([GREETING] if chats else []), *ask]
    return [*found, *(("", [turn("user", text)]) for text in own)]


def facts(run: Run) -> dict[str, str]:
    """What it was, and what it took."""
    (model, _), state, where = run.loaded, run.state, run.environment
    c, n, threads = model.config, model.n_parameters(), where.get("threads")
    weights = run.folder / "model.safetensors"
    tokens = run.folder / "training" / "tokens"
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
        "weights": f"{weights.stat().st_size / 1e6:.1f} MB · {sha256([weights])}",
        "data": text + (f" · tokens {sha256(sorted(tokens.glob('*.bin')))}" if corpus else ""),
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
    return f"sha256 {digest.hexdigest()[:12]}"


def heldout_text(run: Run) -> list[xray.Piece]:
    """The beginning of what pre-training held out, as its model reads it."""
    tokens = run.folder / "training" / "tokens"
    corpus, (model, tokenizer) = Corpus.load(tokens), run.loaded
    shards = corpus.shards(tokens, "heldout") if corpus else []
    text = shards[0][: min(READ, model.config.block_size)] if shards else []
    return xray.reading(model, tokenizer, text.astype("int64")) if len(text) > 1 else []


# ---- the page ----------------------------------------------------------------------------------


def content(folders: list[Path], ask: list[str]) -> dict:
    """Everything that templates/report.html shows."""
    runs = find_runs(folders)
    paths = [folder / "results.json" for folder in folders]
    results = next((read_json(path) for path in paths if path.exists()), {})
    asked = prompts(runs, results, ask)
    said = [xray.answers(*run.loaded, [m for _, m in asked]) if asked else [] for run in runs]
    return {
        "title": " · ".join(folder.resolve().name for folder in folders),
        "runs": runs,
        "compared": len({run.stage for run in runs}) < len(runs),
        "figures": figures(runs),
        "settings": list(dict.fromkeys(key for run in runs for key in run.config)),
        "facts": [facts(run) for run in runs],
        "charts": [charts(run, runs) for run in runs],
        "xray": [
            (about, messages[-1]["content"], [of_run[i] for of_run in said])
            for i, (about, messages) in enumerate(asked)
        ],
        "verdicts": verdicts(results),
        "claims": [c for folder in folders for c in read_claims(folder / "claims.json")],
        "masks": [(run, run.state["stage"]["mask"]) for run in runs if "mask" in run.state["stage"]],
        "reading": [(run, text) for run in runs if (text := heldout_text(run))],
    }


def write(folders: list[Path], out: Path | None = None, ask: list[str] = ()) -> Path:
    """Draw the report card of some run directories; returns its path.

    Raises InputError naming the file (and line) that is missing or broken.
    """
    out = out or folders[0] / "report.html"
    templates = Environment(
        loader=PackageLoader("tinylm"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    write_text(out, templates.get_template("report.html").render(content(folders, [*ask])))
    return out


def attempt(folders: list[Path], progress: Progress) -> None:
    """`write` at the end of a run, which a picture that fails must not spoil."""
    try:
        write(folders)
    except Exception as error:  # noqa: BLE001
        progress.say(f"the report could not be drawn: {error}", "yellow")
