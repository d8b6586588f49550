"""What every contestant is given: the five models, their batches, and shapes of single kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Model:
    """A model's shape, as the arguments of tinylm.ModelConfig, and one batch of it, (B, T)."""

    about: str
    shape: dict
    B: int
    T: int

    def batch(self, step: int) -> numpy.ndarray:
        """(B, T + 1) token ids, the same for all contestants; small ids are the likelier ones."""
        rng = numpy.random.default_rng(step)
        uniform = rng.random((self.B, self.T + 1))
        return (self.shape["vocab_size"] * uniform**3).astype(numpy.int64)


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
