"""From gradients to better weights: AdamW, Muon, clipping, the schedule of the learning rate."""

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
        for name, v in self.v.items():
            p = self.parameters[name]
            if p.grad is not None:
                backend.kernels.adamw(
                    p.data, p.grad, self.m[name], v,
                    lr, self.beta1, self.beta2, self.eps, self.decay(p), self.steps, grad_scale,
                )  # fmt: skip

    def decay(self, p: Tensor) -> float:
        return self.weight_decay if p.ndim > 1 else 0.0

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    can_be_guarded = True  # by a device; see guarded_step
    _guarded = None  # what does it there

    def guarded_step(self, loss: Array, rate: Array, clip: float, guard) -> Array:
        """The whole update by a device, unless the gradient is one that train.Guard would refuse.

        rate (1,): the learning rate. Clip and guard are those of the first call, which the device
        remembers. Nothing is waited for; backend.kernels.later reads how it went.
        """
        if self._guarded is None:
            sizes = [p.size for p in self.parameters.values()]
            decays = [self.decay(p) for p in self.parameters.values()]
            numbers = (self.beta1, self.beta2, self.eps, clip)
            state = (guard.mean, guard.seen, self.steps)
            self._guarded = backend.kernels.guarded_adamw(sizes, decays, *numbers, state)
        named = self.parameters.items()
        return self._guarded(loss, rate, [(p.data, p.grad, self.m[k], self.v[k]) for k, p in named])


class Muon(AdamW):
    """Momentum, orthogonalised, for the matrices named; AdamW for everything else.

    The update of a matrix is dominated by a few directions; orthogonalising it lets all of them
    learn at the same rate (Jordan et al. 2024, kellerjordan.github.io/posts/muon). The kernel makes
    it as large as AdamW's usually is, so that one learning rate serves both (arXiv 2502.16982).
    Such a matrix needs no `v`.
    """

    can_be_guarded = False

    def __init__(self, parameters: dict[str, Tensor], matrices: set[str], **settings):
        super().__init__(parameters, **settings)
        self.v = {name: v for name, v in self.v.items() if name not in matrices}

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        super().step(lr, grad_scale)  # of what has a `v`
        named = ((name, p) for name, p in self.parameters.items() if name not in self.v)
        matrices = [(p.data, p.grad, self.m[name]) for name, p in named if p.grad is not None]
        backend.kernels.muon(matrices, lr, self.beta1, self.weight_decay, grad_scale)


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
