"""The tasks in tinylm: what one contestant process does. Its twin is in_torch.py."""

from __future__ import annotations

import time

import numpy
import tasks
from tasks import BETAS, LEARNING_RATE, MODELS, WEIGHT_DECAY

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
        try:
            backend.set_products(dtype)
        except ValueError as error:
            raise NotImplementedError(str(error)) from None

    def save(self, directory: str, shape: dict) -> None:
        """Write fresh weights of a model, from which all contestants start."""
        tinylm.save(tinylm.Transformer(tinylm.ModelConfig(**shape)), None, directory)

    def load(self, directory: str) -> None:
        self.model, _ = tinylm.load(directory)

    # ---- training

    def learn(self, model: str) -> None:
        """Get ready to train the model that was loaded."""
        self.shape, self.losses = MODELS[model], []
        self.optimizer = AdamW(self.model.parameters(), *BETAS, weight_decay=WEIGHT_DECAY)

    def step(self, tokens, targets) -> float:
        return training_step(self.model, self.optimizer, tokens, targets, LEARNING_RATE)

    def train(self, seconds: float) -> dict:
        return tasks.train(self.step, self.shape, self.losses, seconds)

    # ---- single kernels

    def product(self, layout: str, M: int, K: int, N: int) -> dict:
        operands = tasks.operands(layout, M, K, N)
        return tasks.seconds_of(lambda: backend.kernels.matmul(*operands))

    def attention(self, B: int, H: int, T: int, D: int) -> dict:
        """Causal attention, forward and backward."""
        q, k, v, dout = numpy.random.default_rng(0).standard_normal((4, B, H, T, D), "float32")

        def both():
            out, lse = backend.kernels.attention_forward(q, k, v)
            backend.kernels.attention_backward(dout, q, k, v, out, lse)

        return tasks.seconds_of(both)

    # ---- text

    def write(self, prompts: int, answers: int) -> dict:
        """Continue so many prompts so many times, at once and greedily; returns what it wrote."""
        rows, rng = tasks.prompts(prompts, answers).tolist(), numpy.random.default_rng(0)
        tick = time.perf_counter()
        text = [*stream(self.model, rows, tasks.NEW, rng, temperature=0)]
        return {"seconds": time.perf_counter() - tick, "text": numpy.transpose(text).tolist()}

    def learn_vocabulary(self, file: str, vocab_size: int, directory: str) -> dict:
        texts = tasks.documents(file)
        tick = time.perf_counter()
        tokenizer = train_bpe(texts, vocab_size)
        seconds = time.perf_counter() - tick
        tokenizer.save(directory)
        return {"seconds": seconds}

    def encode(self, file: str, directory: str) -> dict:
        tokenizer, texts = tinylm.Tokenizer.load(directory), tasks.documents(file)
        tick = time.perf_counter()
        ids = [tokenizer.encode(text) for text in texts]
        return {"seconds": time.perf_counter() - tick, "tokens": sum(map(len, ids))}
