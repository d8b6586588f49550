"""Bias and variance of policy-gradient estimators, from the same rollouts.

    python benchmarks/estimators.py                        a table
    python benchmarks/estimators.py --picture FILE.png     and a picture (needs matplotlib)
    python benchmarks/estimators.py --json

A tiny Transformer answers three prompts, one nearly always right, one half the time, one hardly
ever. It has so few possible answers that all of them can be listed: the gradient of the expected
score is known exactly. Each estimator turns the scores of the same sampled groups into advantages;
the mean of its gradients over many groups shows its bias, their scatter its variance. The scale of
a gradient is the learning rate's business, so a bias is given as an angle too.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy
from rich.console import Console
from rich.table import Table

import tinylm
from tinylm.data import packed_batch
from tinylm.estimators import RunningMean, advantages
from tinylm.progress import table

STYLE = Path(__file__).parents[1] / "docs" / "picture.mplstyle"
LETTERS, LONGEST, END = 5, 3, 5  # answers: up to three of five letters, then the end
ASKED = (0.95, 0.5, 0.05)  # how often each prompt is answered rightly, about
ANSWERS = 8  # in a group


def policy() -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """p (prompts, answers), the gradients of log p (prompts, answers, parameters), lengths."""
    config = tinylm.ModelConfig(LETTERS + 1, 1, 2, 2, 16, 32, 8)
    tinylm.use("reference")  # one answer at a time is small work, and float64 is exact
    model, rng = tinylm.Transformer(config, 0), numpy.random.default_rng(0)
    for p in model.parameters().values():
        p.data = p.data.astype("float64") + 0.15 * rng.standard_normal(p.shape)
    said = [
        (*letters, END)[:LONGEST]
        for n in range(LONGEST + 1)
        for letters in itertools.product(range(LETTERS), repeat=n)
    ]
    logp, gradients = [], []
    for prompt in range(len(ASKED)):
        for answer in said:
            learned = [False] + [True] * len(answer)
            batch = packed_batch([[([prompt, *answer], learned)]], END)
            nll = model.loss(batch.tokens, batch.targets, batch.start, even=False)
            (-nll).sum().backward()
            logp.append(-nll.data.sum())
            parts = [p.grad.ravel() for p in model.parameters().values() if p.grad is not None]
            gradients.append(numpy.concatenate(parts))
            for p in model.parameters().values():
                p.grad = None
    shape = (len(ASKED), len(said))
    lengths = numpy.array([len(answer) for answer in said])
    return numpy.exp(logp).reshape(shape), numpy.array(gradients).reshape(*shape, -1), lengths


def scores(p: numpy.ndarray) -> numpy.ndarray:
    """1 for right answers, 0 for others: such a random set that each prompt is about as hard."""
    rng, right = numpy.random.default_rng(1), numpy.zeros_like(p)
    for row, of, wanted in zip(right, p, ASKED):
        for i in rng.permutation(len(of)):
            if row @ of + of[i] <= wanted * 1.02:
                row[i] = 1
    return right


def ours(name: str, r: numpy.ndarray) -> numpy.ndarray:
    """The estimator of that name, step after step, as feedback has it."""
    baseline = RunningMean()
    return numpy.array([advantages(name, step, baseline) for step in r.tolist()]).reshape(r.shape)


def grpo(r: numpy.ndarray) -> numpy.ndarray:
    return (r - r.mean(-1, keepdims=True)) / (r.std(-1, keepdims=True) + 1e-4)


ESTIMATORS = {  # scores (steps, prompts, answers), lengths of the same shape -> advantages
    "reinforce, no baseline": lambda r, n: r,
    "reinforce": lambda r, n: ours("reinforce", r),
    "rloo": lambda r, n: ours("rloo", r),
    "grpo": lambda r, n: grpo(r),
    "rloo / length": lambda r, n: ours("rloo", r) / n * n.mean(),
}


def measure(steps: int) -> list[dict]:
    p, gradients, lengths = policy()
    assert numpy.allclose(p.sum(1), 1), "the answers listed are not all there are"
    right = scores(p)
    truth = numpy.einsum("xa,xa,xak->k", p, right, gradients) / len(ASKED)
    rng = numpy.random.default_rng(2)
    drawn = numpy.stack(
        [rng.choice(p.shape[1], (steps, ANSWERS), p=of / of.sum()) for of in p], 1
    )  # (steps, prompts, answers): an answer's number
    prompts = numpy.arange(len(ASKED))[:, None]
    r, n = right[prompts, drawn], lengths[drawn]
    found = []
    for name, estimate in ESTIMATORS.items():
        A = estimate(r, n)
        mean, square = numpy.zeros_like(truth), 0.0
        for a, at in zip(A, drawn):
            g = numpy.einsum("xi,xik->k", a, gradients[prompts, at]) / a.size
            mean, square = mean + g / steps, square + g @ g / steps
        size = truth @ truth
        variance = (square - mean @ mean) / size
        along = mean @ truth / size  # the scale at which it points along the truth
        across = max(mean @ mean / size - along**2, 0.0)
        found.append({
            "estimator": name, "scale": along, "variance": variance / along**2,
            "angle": float(numpy.degrees(numpy.arctan2(across**0.5, along))),
            "noise": float(numpy.degrees(numpy.arctan((variance / steps) ** 0.5 / along))),
            "pull": [float(x) for x in pulls(A, r, p, right)],
        })  # fmt: skip
    return found


def pulls(A, r, p, right) -> numpy.ndarray:
    """How hard each prompt is pulled at, beside what the truth would do, the half-right one as 1.

    The truth pulls a right answer's probability s by s (1 − s).
    """
    s = (p * right).sum(1)
    pull = (A * (r - s[:, None])).mean((0, 2)) / (s * (1 - s))
    return pull / pull[1]


def told(found: list[dict], steps: int) -> Table:
    title = f"The gradient of the expected score, estimated from {steps:,} steps"
    numbers = ("angle to the truth", "of it chance", "variance")
    made = table(title, "estimator", *numbers, "pull at easy / even / hard prompts")
    for row in found:
        pull = " / ".join(f"{x:.2f}" for x in row["pull"])
        angle = f"{row['angle']:.1f}°", f"{row['noise']:.1f}°"
        made.add_row(row["estimator"], *angle, f"{row['variance']:.1f}", pull)
    made.caption = "variance: of one step, over the squared length of the mean along the truth"
    return made


def picture(found: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    figure, (left, right) = plt.subplots(1, 2)
    for i, row in enumerate(found):
        place, label = (row["variance"], row["angle"]), row["estimator"]
        left.scatter(*place, s=50, color=f"C{i}", clip_on=False, zorder=3)
        offset = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        left.annotate(label, place, **offset)
        at = numpy.arange(3) + 0.16 * (i - (len(found) - 1) / 2)
        right.bar(at, row["pull"], 0.16, color=f"C{i}", label=label)
    left.set(title="Bias and noise", xlabel="variance of one step")
    left.set(ylabel="angle to the true gradient, degrees")
    left.set(xlim=(0, 32), ylim=(0, 36))
    right.axhline(1, color="C3", linewidth=1)
    right.set(title="How hard each pulls", ylabel="as a share of the true gradient")
    right.set_xticks(range(3), [f"right {100 * s:.0f} %" for s in ASKED])
    right.set_ylim(0, 1.85)
    right.legend(ncols=3, loc="upper center", fontsize="small", handlelength=0.8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000, help="sampled steps (default: 20,000)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    found = measure(given.steps)
    if given.picture:
        picture(found, given.picture)
    if given.json:
        print(json.dumps({"steps": given.steps, "answers": ANSWERS, "estimators": found}))
    else:
        Console().print(told(found, given.steps))


if __name__ == "__main__":
    main()
