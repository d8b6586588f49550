"""Draws the README's curves (needs [plot]).

python docs/plot.py learning RUN PICTURE.png         loss, and bits per byte beside xz
python docs/plot.py outwitted LAB/SEED PICTURE.png   judge and gold against drift, of `tinylm lab`
python docs/plot.py refusal LAB PICTURE.png          what a wrong answer's price does, of the same
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinylm.lab.outwitted import COMPARISONS, FEEDBACK
from tinylm.report import drift
from tinylm.runs import Run
from tinylm.train import read_metrics

STYLE = Path(__file__).with_name("picture.mplstyle")
BLUE, RED, GOLD, GREY, PALE = (f"C{i}" for i in range(5))  # of that style


def learning(run: Path, panels) -> None:
    rows = read_metrics(run)
    steps = [row for row in rows if "lr" in row and row["loss"] is not None]
    x, loss = (np.array([row[key] for row in steps]) for key in ("step", "loss"))
    smooth = np.convolve(np.pad(loss, 15, mode="edge"), np.ones(31) / 31, "valid")
    left, right = panels
    left.plot(x, loss, color=PALE, linewidth=0.8)
    left.plot(x, smooth, color=BLUE)
    left.set(title="Training loss", xlabel="step", ylabel="nats per token")
    left.set_ylim(loss.min() - 0.2, None)

    evals = [row for row in rows if "bits_per_byte" in row]
    at, bits = ([row[key] for row in evals] for key in ("step", "bits_per_byte"))
    right.plot(at, bits, "o-", color=BLUE, label="tinylm")
    right.axhline(evals[-1]["xz_bits_per_byte"], color=RED, linestyle="--", label="xz -9")
    place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
    right.annotate(f"{bits[-1]:.3f}", (at[-1], bits[-1]), **place)
    right.set(title="Held-out text", xlabel="step", ylabel="bits per byte", ylim=(1.3, None))
    right.legend()


def outwitted(seed: Path, panels) -> None:
    titles = "What the judge thinks", "What it was to stand for (gold)"
    for n, shade in zip(COMPARISONS, (RED, GOLD, BLUE)):
        run = Run(seed / "outwitted" / f"feedback-{n}", str(n))
        (x, judged), (_, gold) = (np.array(drift(run, key, 20)).T for key in ("reward", "gold"))
        turned = [row["step"] for row in run.rows if row.get("outwitted")]
        for axes, y, title in zip(panels, (judged, gold), titles):
            axes.plot(x, y, "o-", color=shade, label=f"{n:,} comparisons")
            axes.set(title=title, xlabel="√KL from the fine-tuned model, nats per token")
        if turned:
            at = (turned[0] - 1) * len(x) // FEEDBACK["max_steps"]
            panels[1].plot(x[at], gold[at], "o", mfc="none", mec=shade, markersize=11)
    panels[0].set_ylabel("mean score")
    panels[1].legend(title="ring: the run said so", loc="lower left", alignment="left")


def refusal(lab: Path, panels) -> None:
    (claim,) = (c for c in json.loads((lab / "claims.json").read_text()) if c["claim"] == "refusal")
    of = {m["name"]: m for m in claim["measures"]}
    when = list(dict.fromkeys(name.split(": ")[0] for name in of))
    left, right = panels
    for what, shade in (
        ("known, right", BLUE),
        ("invented, wrong", RED),
        ("withheld, wrong", GOLD),
    ):
        rows = [of[f"{at}: {what}"] for at in when]
        y, low, high = (
            100 * np.array([row[key] for row in rows]) for key in ("value", "low", "high")
        )
        left.errorbar(when, y, [y - low, high - y], fmt="o-", color=shade, label=what)
    left.set(title="Of each kind of question", ylabel="%", ylim=(0, 100))
    left.legend(loc="upper right", bbox_to_anchor=(0.8, 0.88))

    names = ("coverage", "risk")
    by_seed = [100 * np.array([of[f"{at}: {name}"]["by_seed"] for at in when]) for name in names]
    right.plot(*by_seed, "o-", color=PALE, linewidth=1)
    x, y = (100 * np.array([of[f"{at}: {name}"]["value"] for at in when]) for name in names)
    right.plot(x, y, "o-", color=BLUE)
    for at, *place in zip(when, x, y):
        right.annotate(at, place, xytext=(8, -10), textcoords="offset points")
    right.set(title="Of all questions", xlabel="answered, % (coverage)")
    right.set(ylabel="of these wrong, % (risk)", ylim=(0, None), xlim=(20, 100))


def main() -> None:
    draw, source, picture = sys.argv[1:]
    plt.style.use(STYLE)
    figure, panels = plt.subplots(1, 2)
    {"learning": learning, "outwitted": outwitted, "refusal": refusal}[draw](Path(source), panels)
    figure.savefig(picture)


if __name__ == "__main__":
    main()
