"""What every contestant is given: models and their batches, single kernels, prompts, a text.

Imported by both sides, so it knows neither tinylm nor PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy


@dataclass(frozen=True)
class Model:
    """A model's shape, as the arguments of tinylm.ModelConfig, and one batch of it, (B, T)."""

    about: str
    shape: dict
    B: int
    T: int

    def batch(self, step: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Tokens and targets, (B, T) of int, the same for all; small ids are the likelier ones."""
        uniform = numpy.random.default_rng(step).random((self.B, self.T + 1))
        rows = (self.shape["vocab_size"] * uniform**3).astype(numpy.int64)
        return rows[:, :-1].copy(), rows[:, 1:].copy()


def gpt2(vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int) -> dict:
    return dict(locals(), architecture="gpt2")


MODELS = {
    "a": Model("GPT, 4 layers, 128 wide", gpt2(65, 4, 4, 128, 64), 12, 64),
    "b": Model("GPT, 6 layers, 384 wide", gpt2(65, 6, 6, 384, 256), 16, 256),
    "c": Model("GPT-2 124M", gpt2(50257, 12, 12, 768, 1024), 4, 64),
    "c2": Model("GPT-2 124M, one long row", gpt2(50257, 12, 12, 768, 1024), 1, 1024),
    "d": Model(
        "Llama, 6 layers, 288 wide",
        dict(vocab_size=32000, n_layer=6, n_head=6, n_embd=288, n_inner=768, block_size=256),
        8, 256,
    ),
}  # fmt: skip


LEARNING_RATE, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.99), 0.1  # of AdamW, decaying matrices only


def train(step: Callable, model: Model, losses: list[float], seconds: float) -> dict:
    """step(tokens, targets) -> loss, for so many seconds, once at least; appends to losses.

    Returns the seconds of one step, and the first ten losses.
    """
    times: list[float] = []
    while not times or sum(times) < seconds:
        tokens, targets = model.batch(len(losses))
        tick = time.perf_counter()
        losses.append(step(tokens, targets))
        times.append(time.perf_counter() - tick)
    return {"seconds": sum(times) / len(times), "losses": losses[:10]}


# ---- single kernels ----------------------------------------------------------------------------

PRODUCTS = [  # M rows of K, to N
    (1024, 384, 384),
    (1024, 384, 1536),
    (16384, 384, 1536),
    (16384, 384, 65),
    (256, 768, 3072),
    (1024, 768, 50257),
    (2048, 2048, 2048),
    (768, 128, 128),
    (768, 128, 512),
]
LAYOUTS = {  # a and b as they lie in memory, and whether each is transposed: c = op(a) op(b)
    "NN": ("MK", "KN", False, False),  # x W, as GPT-2 keeps its weights
    "NT": ("MK", "NK", False, True),  # x Wt, as everyone else does
    "dX": ("MN", "NK", False, False),  # dy W
    "dW": ("MN", "MK", True, False),  # dyt x
}
ATTENTION = [(max(1, 4096 // T), 6, T, 64) for T in (64, 128, 256, 512, 1024, 2048, 4096, 8192)]


def seconds_of(run: Callable[[], object], at_least: float = 0.1) -> dict:
    """The median time of run(), repeated for at_least seconds after one call to warm up."""
    run()
    times: list[float] = []
    while sum(times) < at_least:
        tick = time.perf_counter()
        run()
        times.append(time.perf_counter() - tick)
    return {"seconds": median(times)}


def operands(
    layout: str, M: int, K: int, N: int
) -> tuple[numpy.ndarray, numpy.ndarray, bool, bool]:
    """a, b, transpose_a, transpose_b of a product, float32."""
    sizes, rng = {"M": M, "K": K, "N": N}, numpy.random.default_rng(0)
    a, b, *transposed = LAYOUTS[layout]
    drawn = (rng.standard_normal([sizes[letter] for letter in x], "float32") for x in (a, b))
    return *drawn, *transposed


# ---- text ------------------------------------------------------------------------------------

WRITER = dict(vocab_size=65, n_layer=6, n_head=6, n_embd=384, block_size=256)  # as large as b
PROMPT, NEW = 64, 64  # tokens


def prompts(n: int, answers: int) -> numpy.ndarray:
    """(n answers, PROMPT) token ids: n prompts, each to be answered so many times."""
    rows = numpy.random.default_rng(0).integers(0, WRITER["vocab_size"], (n, PROMPT))
    return rows.repeat(answers, axis=0)


def documents(file: str) -> list[str]:
    """A text in pieces of about 10,000 characters, cut between lines."""
    with open(file, encoding="utf-8", errors="replace") as f:
        return ["".join(lines) for lines in iter(lambda: f.readlines(10_000), [])]
