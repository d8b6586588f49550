"""Estimators: from the scores of answers to their advantages, and what pushes log π by them.

All of them estimate the gradient of the expected score, E[r ∇ log π(y)], from sampled answers, and
none of these is biased: what is taken off a score does not depend on the answer it belongs to.

    reinforce   A = r − b, b the running mean of earlier scores            (Williams 1992)
    rloo        A = r − mean of the scores of the same prompt's other answers  (arXiv 2402.14740)

Dividing by the standard deviation of a group's scores (GRPO, arXiv 2402.03300) is not offered: it
pulls hardest at prompts that are nearly always or nearly never answered well (arXiv 2503.20783);
benchmarks/estimators.py shows it. Advantages are exactly 0, not 1e-17, where there is nothing to
tell answers apart: Adam would make a step of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from tinylm import backend
from tinylm.tensor import Array, Tensor

CLIP = (0.8, 1.28)  # of ρ, where answers are learned from several times
NAMES = ("rloo", "reinforce")
Scores = list[float | None]  # of one prompt's answers; None: no judgement


def rloo(scores: Scores) -> numpy.ndarray:
    """A of one group, (G,): each score less the mean of the others; 0 without a judgement."""
    judged = [r for r in scores if r is not None]
    if len(judged) < 2 or min(judged) == max(judged):
        return numpy.zeros(len(scores))
    mean, n = sum(judged) / len(judged), len(judged)
    return numpy.array([0.0 if r is None else n / (n - 1) * (r - mean) for r in scores])


@dataclass
class RunningMean:
    """The mean of all scores seen so far, later of about the last `memory` steps'."""

    value: float = 0.0
    steps: int = 0
    memory: int = 20

    def see(self, scores: list[float]) -> None:
        if not scores:
            return
        self.steps += 1
        mean = scores[0] if min(scores) == max(scores) else sum(scores) / len(scores)
        self.value += (mean - self.value) / min(self.steps, self.memory)


def advantages(name: str, groups: list[Scores], baseline: RunningMean) -> numpy.ndarray:
    """The advantages of all answers of a step, (answers,), by the estimator of that name.

    The baseline is of earlier steps, and sees this one's scores afterwards; REINFORCE's first step
    has none yet, and learns nothing.
    """
    scores = [r for group in groups for r in group]
    if name == "rloo":
        found = numpy.concatenate([rloo(group) for group in groups])
    elif baseline.steps:
        found = numpy.array([0.0 if r is None else r - baseline.value for r in scores])
    else:
        found = numpy.zeros(len(scores))
    baseline.see([r for r in scores if r is not None])
    return found


def surrogate(nll: Tensor, old_logp: Array, advantages: Array) -> Tensor:
    """−min(ρ A, clip(ρ) A) per token, of nll = −log π_θ; all of them (B, T).

    As ρ = exp(−nll − log π_old), its gradient by nll is ρ A, and 0 where the clipped term is taken.
    """
    rho = backend.xp.exp(-nll.data - old_logp)
    A = advantages.astype(nll.dtype)
    free, clipped = rho * A, backend.xp.clip(rho, *CLIP) * A
    taken = free <= clipped
    loss = -backend.xp.where(taken, free, clipped)
    return Tensor.from_op(loss, (nll,), lambda dloss: (dloss * backend.xp.where(taken, free, 0),))


# ---- what is told of them ----------------------------------------------------------------------

CAUSES = ("right", "wrong", "neutral", "none", "truncated")


def cause(group: Scores) -> str:
    """Why a prompt's answers tell nothing apart: all right (above 0), wrong (below 0), neutral (0),
    or none of them judged; "" where they do."""
    scores = set(group) - {None}
    if len(scores) > 1:
        return ""
    if not scores:
        return "none"
    (score,) = scores
    return "right" if score > 0 else "wrong" if score < 0 else "neutral"


def exact_kl(logp: Array, logq: Array) -> Array:
    """KL(p ‖ q) of their logarithms, (N, V) each -> (N,)."""
    at_once = range(0, len(logp), 64)  # so many rows stay in cache between one line and the next
    return backend.xp.concatenate([kl(logp[i : i + 64], logq[i : i + 64]) for i in at_once])


def kl(logp: Array, logq: Array) -> Array:
    weighted = logp - logq
    weighted *= backend.kernels.softmax_forward(logp)
    return weighted.sum(-1)
