"""The report card: one HTML file of what runs have learned and what it took, to be read offline.

Everything is read from run directories (runs.py) and results.json and claims.json beside them, and
asked of the models there (xray.py); charts.py makes paths of curves, and templates/ lay it all out.
No HTML is made here.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, PackageLoader

from tinylm import xray
from tinylm.charts import Chart, Points, smooth
from tinylm.chat import template_of, turn
from tinylm.corpus import Corpus
from tinylm.evaluate import wilson
from tinylm.files import expected, read_json, write_text
from tinylm.progress import Progress, clock
from tinylm.runs import SPEED, Run, facts, find_runs, finite

GREETING = "Hello!"
CLAIM = ("title", "says", "holds", "measures")
QUICKSTART = "what a quickstart found"
READ = 140  # tokens of held-out text that are shown
FIGURES = (  # the number that sums up a run of each stage: what is needed for it, itself, its name
    ("bits_per_byte", "{bits_per_byte:.3f}",
     "bits per byte of held-out text; xz needs {xz_bits_per_byte:.3f}"),
    ("win_rate", "{win_rate:.0%}",
     "of the last {win_n:.0f} blind comparisons won against the fine-tuned model"),
    ("held_out_reward", "{reward_before:.2f} → {held_out_reward:.2f}",
     "mean score on held-out prompts, before and after"),
    ("accuracy", "{accuracy:.1%}", "of {pairs:,} pairs of held-out answers told apart"),
    ("loss", "{loss:.3f}", "nats per token of held-out answers"),
)  # fmt: skip


def charts(run: Run, runs: list[Run]) -> list[Chart]:
    """What happened in a run; the other runs of its stage in grey."""
    others = [other for other in runs if other.stage == run.stage and other is not run]
    if run.stage == "feedback":
        key, held, more = "reward", "held_out_reward", of_feedback(run, others)
        main = Chart("Reward", "step", "mean score of the sampled answers; dots: of held-out ones")
    else:
        key, held, more = "loss", "loss", []
        main = Chart("Loss", "step", "nats per token; dots: held out", log=True)
    main.lines = [("other", smooth(other.points(key))) for other in others]
    main.lines += [("raw", run.points(key)), ("run", smooth(run.points(key)))]
    main.dots = [(x, y, f"step {x}: {y:.4g}") for x, y in run.points(held, evaluations=True)]
    main.marks = run.marks()
    rate = Chart("Learning rate", "step", "in thousandths")
    rate.lines = [("run", [(step, 1000 * lr) for step, lr in run.points("lr")])]
    speed, speeds = Chart("Tokens per second", "step", speed_note(run)), run.points(SPEED)
    speed.lines = [("raw", speeds), ("run", smooth(speeds))]
    return [chart for chart in (main, *more, rate, speed) if chart.points]


def of_feedback(run: Run, others: list[Run]) -> list[Chart]:
    """What the reward was bought with, and what it was made of."""
    paid = Chart("Reward by drift", "√KL from the fine-tuned model, nats per token")
    paid.note = "by twelfths of the run"
    paid.lines = [("other", drift(other)) for other in others] + [("run", drift(run))]
    if run.points("gold"):
        paid.note += "; dashed: gold, which checks the judge"
        paid.lines.append(("dashed", drift(run, "gold")))
    scores = Chart("Scores", "step", "share of answers above zero (line) and below it (dashed)")
    above, below = (smooth(run.points(key)) for key in ("positive", "negative"))
    scores.lines = [("run", above), ("dashed", below)]
    won = Chart(
        "Win rate", "step", "share of the latest comparisons won against the fine-tuned model"
    )
    won.lines = [("dashed", run.points(f"win_{end}")) for end in ("low", "high")]
    won.lines.append(("run", run.points("win_rate")))
    return [paid, won if won.points else scores]


def drift(run: Run, scores: str = "reward", parts: int = 12) -> Points:
    """(√KL, scores), each the mean of one of so many parts (the axes of arXiv 2210.10760).

    Of the steps with such a score: gold may have nothing to say on all the answers of one.
    """
    drifts = dict(run.points("kl"))
    found = [(drifts[step], score) for step, score in run.points(scores) if step in drifts]
    size = max(1, math.ceil(len(found) / parts))
    means = (map(fmean, zip(*found[i : i + size])) for i in range(0, len(found), size))
    return [(math.sqrt(max(0.0, kl)), score) for kl, score in means]


def speed_note(run: Run) -> str:
    share = run.utilisation()
    if share is None:
        return "of answers" if run.stage == "feedback" else ""
    peak = run.environment["peak_gflops"]
    return f"at {100 * share:.0f} % of the {peak:,.0f} GFLOP/s that its threads can do"


def figures(runs: list[Run]) -> list[tuple[str, str]]:
    """The few numbers that sum it up: (number, what it is)."""
    found = []
    for run in runs:
        numbers = {k: v for k, v in run.state["results"].items() if finite(v)}
        numbers.setdefault("xz_bits_per_byte", math.nan)
        for key, number, what in FIGURES:
            if key in numbers:
                found.append((number.format(**numbers), f"{run.name}: {what.format(**numbers)}"))
                break
    if runs:
        sizes = [run.loaded[0].n_parameters() for run in runs]
        shown = " – ".join(f"{n:,}" for n in sorted({min(sizes), max(sizes)}))
        found.insert(0, (shown, "parameters"))
        seconds = sum(run.state["seconds"] for run in runs)
        found.append((clock(seconds), "of training" + (", all runs together" if runs[1:] else "")))
    return found


def tested(results: dict[Path, dict]) -> list[dict]:
    """results.json of quickstarts: for each set of questions, every stage's shares."""
    sets: dict[tuple, dict] = {}
    for path, content in results.items():
        inside = path.parent.relative_to(os.path.commonpath([of.parent for of in results]))
        with expected(path, QUICKSTART):
            for stage, found in content.get("stages", {}).items():
                for part, about in content.get("sets", {}).items():
                    n = found[part]["n"]
                    worth = found[part].get("n_effective", {})
                    sets.setdefault((about, n), {})[str(inside / stage)] = [
                        (v, found[part][v], *wilson(found[part][v], worth.get(v, n)))
                        for v in ("right", "wrong", "idk")
                    ]
    return [{"name": about, "n": n, "stages": stages} for (about, n), stages in sets.items()]


def read_claims(path: Path) -> list[dict]:
    """claims.json of a lab, each with the ends of its scale. Raises InputError where it is not."""
    if not path.exists():
        return []
    with expected(path, "a list of claims"):
        claims = json.loads(path.read_text(encoding="utf-8"))
        claims = [{key: claim[key] for key in CLAIM} for claim in claims]
        for claim in claims:
            ends = [m.get(end) for m in claim["measures"] for end in ("value", "low", "high")]
            claim["bottom"] = min([0.0, *filter(finite, ends)])
            claim["top"] = max([1.0, *filter(finite, ends)])
    return claims


def prompts(runs: list[Run], results: dict, ask: list[str]) -> list[tuple[str, list[dict]]]:
    """(what it is, conversation) of everything that the models are asked.

    That is what a quickstart's test has picked, or else what the runs themselves held out.
    """
    found: list[tuple[str, list[dict]]] = []
    for path in [path for path, content in results.items() if "asked" in content][:1]:
        with expected(path, QUICKSTART):
            for row in results[path]["asked"]:
                about = " · ".join(filter(None, (row["set"], row.get("answer"))))
                found.append((about, [turn("user", row["question"])]))
    if not found:
        rows = [messages for run in runs for messages in run.state["stage"].get("prompts", [])]
        found = [("held out from training", m) for i, m in enumerate(rows) if m not in rows[:i]][:6]
    chats = any(template_of(run.loaded[1]) for run in runs)
    own = [*([GREETING] if chats else []), *ask]
    return [*found, *(("", [turn("user", text)]) for text in own)]


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
    results = {path.resolve(): read_json(path) for path in paths if path.exists()}
    asked = prompts(runs, results, ask)
    said = [run.answers([m for _, m in asked]) for run in runs]
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
        "tested": tested(results),
        "claims": [c for folder in folders for c in read_claims(folder / "claims.json")],
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
    templates.tests["finite"] = finite
    write_text(out, templates.get_template("report.html").render(content(folders, ask)))
    return out


def attempt(folders: list[Path], progress: Progress) -> None:
    """`write` at the end of a run, which a picture that fails must not spoil."""
    try:
        write(folders)
    except Exception as error:
        progress.say(f"the report could not be drawn: {error}", "yellow")
