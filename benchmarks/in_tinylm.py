"""The tasks in tinylm: what one contestant process does. Its twin is in_torch.py."""

from __future__ import annotations

import time

from shapes import MODELS

import tinylm
from tinylm import backend
from tinylm.bench import training_step
from tinylm.optim import AdamW


class Contestant:
    """tinylm in float32, or with its products in bfloat16."""

    def __init__(self, threads: int, dtype: str = "float32"):
        backend.set_threads(threads)
        if dtype != "float32":
            if not hasattr(backend, "set_products"):
                raise NotImplementedError(f"this tinylm has no {dtype} products")
            backend.set_products(dtype)

    def save(self, directory: str, model: str) -> dict:
        """Write fresh weights of a model, from which all contestants start."""
        config = tinylm.ModelConfig(**MODELS[model].shape)
        tinylm.save(tinylm.Transformer(config), None, directory)
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
