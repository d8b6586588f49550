"""The tasks in tinylm: what one contestant process does. Its twin is in_torch.py."""

from __future__ import annotations

import time

import numpy
from tasks import MODELS, NEW, documents, operands, prompts, seconds_of

import tinylm
from tinylm import backend
from tinylm.bench import training_step
from tinylm.generate import stream
from tinylm.optim import AdamW
from tinylm.tokenizer import train_bpe


class Contestant:
    """tinylm in float32, or with its products in bfloat16."""

    def __init__(self, threads: int, dtype: str = "float32"):
        backend.set_threads(threads)
        if dtype != "float32":
            if not hasattr(backend, "set_products"):
                raise NotImplementedError(f"this tinylm has no {dtype} products")
            backend.set_products(dtype)

    def save(self, directory: str, shape: dict) -> dict:
        """Write fresh weights of a model, from which all contestants start."""
        tinylm.save(tinylm.Transformer(tinylm.ModelConfig(**shape)), None, directory)
        return {}

    def open(self, directory: str, model: str) -> dict:
        self.shape, self.losses = MODELS[model], []
        self.model, _ = tinylm.load(directory)
        self.optimizer = AdamW(self.model.parameters(), beta2=0.99, weight_decay=0.1)
        return {"parameters": self.model.n_parameters()}

    def train(self, seconds: float) -> dict:
        """Steps for so many seconds, one at least; returns seconds per step and all losses."""
        spent, n = 0.0, 0
        while not n or spent < seconds:
            rows = self.shape.batch(len(self.losses))
            tick = time.perf_counter()
            self.losses.append(
                training_step(self.model, self.optimizer, rows[:, :-1], rows[:, 1:], 3e-4)
            )
            spent, n = spent + time.perf_counter() - tick, n + 1
        return {"seconds": spent / n, "losses": self.losses[:10]}

    def product(self, layout: str, M: int, K: int, N: int) -> dict:
        a, b, transpose_a, transpose_b = operands(layout, M, K, N)
        multiply = lambda: backend.kernels.matmul(a, b, transpose_a, transpose_b)
        return {"seconds": seconds_of(multiply)}

    def attention(self, B: int, H: int, T: int, D: int) -> dict:
        """Causal attention, forward and backward."""
        q, k, v, dout = numpy.random.default_rng(0).standard_normal((4, B, H, T, D), "float32")

        def both():
            out, lse = backend.kernels.attention_forward(q, k, v)
            backend.kernels.attention_backward(dout, q, k, v, out, lse)

        return {"seconds": seconds_of(both)}

    def read(self, directory: str) -> dict:
        """Open a model for writing text."""
        self.model, _ = tinylm.load(directory)
        return {}

    def write(self, streams: int) -> dict:
        """Continue so many prompts at once, greedily; also returns what it wrote."""
        rows, rng = prompts(streams).tolist(), numpy.random.default_rng(0)
        tick = time.perf_counter()
        text = [*stream(self.model, rows, NEW, rng, temperature=0)]
        return {"seconds": time.perf_counter() - tick, "text": numpy.transpose(text).tolist()}

    def learn_vocabulary(self, file: str, vocab_size: int, directory: str) -> dict:
        texts = documents(file)
        tick = time.perf_counter()
        tokenizer = train_bpe(texts, vocab_size)
        seconds = time.perf_counter() - tick
        tokenizer.save(directory)
        return {"seconds": seconds}

    def encode(self, file: str, directory: str) -> dict:
        tokenizer, texts = tinylm.Tokenizer.load(directory), documents(file)
        tick = time.perf_counter()
        ids = [tokenizer.encode(text) for text in texts]
        return {"seconds": time.perf_counter() - tick, "tokens": sum(map(len, ids))}
