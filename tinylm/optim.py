"""From gradients to better weights: AdamW, clipping, the schedule of the learning rate."""

from __future__ import annotations

import math

from tinylm import backend
from tinylm.tensor import Array, Tensor


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), one fused pass per parameter.

    Decay pulls on matrices only: norms and biases have no direction to forget. `m` and `v` are the
    running means of the gradient and of its square, by parameter name; `steps` counts updates.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        beta1: float = 0.9,
        beta2: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        self.parameters = parameters
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        self.m = {name: backend.xp.zeros_like(p.data) for name, p in parameters.items()}
        self.v = {name: backend.xp.zeros_like(p.data) for name, p in parameters.items()}
        self.steps = 0

    def gradients(self) -> list[Array]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Move every parameter that has a gradient, scaled by grad_scale, and count the update."""
        self.steps += 1
        for name, p in self.parameters.items():
            if p.grad is None:
                continue
            decay = self.weight_decay if p.ndim > 1 else 0.0
            backend.kernels.adamw(
                p.data, p.grad, self.m[name], self.v[name],
                lr, self.beta1, self.beta2, self.eps, decay, self.steps, grad_scale,
            )  # fmt: skip

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None


def clip_scale(norm: float, limit: float) -> float:
    """What to multiply gradients of that norm by, so that it is at most limit (0: no limit)."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def schedule(progress: float, warmup: float, floor: float) -> float:
    """The learning rate as a share of its peak: a linear warm-up, then half a cosine to the floor.

    progress, warmup: shares of the whole run, in steps or in time, 0 to 1.
    """
    if progress < warmup:
        return progress / warmup
    falling = min(1.0, (progress - warmup) / max(1 - warmup, 1e-9))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * falling))
