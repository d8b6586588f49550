"""How fast is this machine, and what does that mean for training?  `tinylm bench` prints it."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

from tinylm import backend
from tinylm.model import Transformer
from tinylm.optim import AdamW
from tinylm.tensor import Array


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """The median time of run(), which is run once more before to warm up."""
    run()
    times = []
    for _ in range(repeats):
        tick = time.perf_counter()
        run()
        times.append(time.perf_counter() - tick)
    return median(times)


def fma_peak(threads: int) -> float:
    """Multiply-adds on registers only, GFLOP/s: what no kernel can exceed."""
    operations = backend.kernels.peak(threads)
    return operations / seconds_of(lambda: backend.kernels.peak(threads)) / 1e9


def training_step(
    model: Transformer, optimizer: AdamW, tokens: Array, targets: Array, lr: float
) -> float:
    """Forward, backward and AdamW on one batch (B, T); returns the mean loss."""
    loss = model.loss(tokens, targets)
    loss.backward(backend.xp.full(loss.shape, 1 / loss.size, loss.dtype))
    optimizer.step(lr)
    optimizer.zero_grad()
    return float(loss.data.mean(dtype="float64"))
