"""From gradients to better weights: AdamW, Muon, clipping, the schedule of the learning rate."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy

from tinylm import backend
from tinylm.tensor import Array, Tensor

STACK = 1 << 18  # numbers in the matrices that Muon moves at once; a larger one goes alone


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

        M ← β₁ M + G,   O = orthogonal(G + β₁ M),   W ← W − lr (0.2 √max(n_out, n_in) O + λ W)

    The update of a matrix is dominated by a few directions; orthogonalising it lets all of them
    learn at the same rate (Jordan et al. 2024, kellerjordan.github.io/posts/muon). 0.2 √max(…)
    makes it as large as AdamW's usually is, so that one learning rate serves both
    (arXiv 2502.16982). Such a matrix needs no `v`.
    """

    can_be_guarded = False

    def __init__(self, parameters: dict[str, Tensor], matrices: set[str], **settings):
        super().__init__(parameters, **settings)
        self.v = {name: v for name, v in self.v.items() if name not in matrices}

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        super().step(lr, grad_scale)  # of what has a `v`
        alike = defaultdict(list)
        for name, p in self.parameters.items():
            if name not in self.v and p.grad is not None:
                alike[p.shape].append(name)
        for shape, names in alike.items():
            scale, at_once = 0.2 * max(shape) ** 0.5, max(1, STACK // math.prod(shape))
            for i in range(0, len(names), at_once):
                some = names[i : i + at_once]
                momenta = [self.momentum(name, grad_scale) for name in some]
                for name, update in zip(some, orthogonal(backend.xp.stack(momenta))):
                    weight = self.parameters[name].data
                    weight *= 1 - lr * self.weight_decay
                    weight -= lr * scale * update

    def momentum(self, name: str, grad_scale: float) -> Array:
        """M ← β₁ M + G, in place; returns G + β₁ M, a step ahead, as Nesterov's does."""
        grad, m = self.parameters[name].grad * grad_scale, self.m[name]
        m *= self.beta1
        m += grad
        return grad + self.beta1 * m


def orthogonal(x: Array, steps: int = 4) -> Array:
    """Nearly U Vᵀ of each x = U S Vᵀ, (n, M, N): every singular value becomes one, or near it.

    Newton-Schulz: each step takes each singular value s to a s + b s³ + c s⁵, which carries all of
    (0.005, 1] to about 0.7 to 1.2; 0 stays 0. The coefficients are Jordan's (2024); he takes five
    steps from x / |x|. The fourth root of Σ s⁴ is nearer to the largest s, and saves one.
    """
    matmul, norm = backend.kernels.matmul, backend.kernels.global_norm
    tall = x.shape[1] > x.shape[2]
    for step in range(steps):
        gram = matmul(x, x, transpose_a=tall, transpose_b=not tall)  # the smaller of xᵀ x and x xᵀ
        if step == 0:  # where |gram| = √Σ s⁴
            if hasattr(backend.kernels, "settle"):  # a device: the host waits for nothing
                sizes = (gram.astype("float64") ** 2).sum((1, 2), keepdims=True) ** 0.25 + 1e-15
            else:
                sizes = numpy.array([[[norm([one]) ** 0.5 + 1e-15]] for one in gram])
            x = x / backend.asarray(sizes, x.dtype)  # no singular value is above 1 now
            gram = gram / backend.asarray(sizes**2, x.dtype)
        mixed = -4.7750 * gram + 2.0315 * matmul(gram, gram)
        x = 3.4445 * x + (matmul(x, mixed) if tall else matmul(mixed, x))
    return x


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
