"""Draws the curves of a run (needs [plot]): python docs/plot.py RUN_DIR PICTURE.png"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tinylm.train import read_metrics

run, picture = Path(sys.argv[1]), sys.argv[2]
rows = read_metrics(run)
steps = [row for row in rows if "lr" in row and row["loss"] is not None]
evals = [row for row in rows if "bits_per_byte" in row]
x = np.array([row["step"] for row in steps])
loss = np.array([row["loss"] for row in steps])
smooth = np.convolve(np.pad(loss, 15, mode="edge"), np.ones(31) / 31, "valid")

plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(x, loss, color="#c9d8ea", linewidth=0.8)
left.plot(x, smooth, color="#1f5a99", linewidth=2)
left.set(
    title="Training loss", xlabel="step", ylabel="nats per token", ylim=(loss.min() - 0.2, None)
)

at = [row["step"] for row in evals]
bits = [row["bits_per_byte"] for row in evals]
right.plot(at, bits, "o-", color="#1f5a99", linewidth=2, label="tinylm")
right.axhline(evals[-1]["xz_bits_per_byte"], color="#c0392b", linestyle="--", label="xz -9")
right.annotate(
    f"{bits[-1]:.3f}", (at[-1], bits[-1]), (0, 8), textcoords="offset points", ha="center"
)
right.set(title="Held-out text", xlabel="step", ylabel="bits per byte", ylim=(1.3, None))
right.legend(frameon=False)
figure.savefig(picture, dpi=150)
