"""The tasks in PyTorch: what one contestant process does. Its twin is in_tinylm.py."""

from __future__ import annotations

import time

import torch
import torch_models
from shapes import MODELS

BETAS, LEARNING_RATE, WEIGHT_DECAY = (0.9, 0.99), 3e-4, 0.1


class Contestant:
    """PyTorch in float32, or in bfloat16 by autocast; eager or compiled."""

    def __init__(self, threads: int, dtype: str = "float32", compiled: bool = False):
        torch.set_num_threads(threads)
        self.dtype, self.compiled = getattr(torch, dtype), compiled

    def open(self, directory: str, model: str) -> dict:
        """Take the weights that tinylm saved; AdamW decays matrices only."""
        self.shape, self.losses = MODELS[model], []
        self.model = torch_models.load(directory)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest}]
        self.optimizer = torch.optim.AdamW(
            groups, LEARNING_RATE, BETAS, weight_decay=0.0, fused=True
        )
        if self.compiled:
            self.model.compile()
        return {"parameters": sum(p.numel() for p in self.model.parameters())}

    def step(self, tokens, targets) -> float:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype == torch.bfloat16):
            loss = self.model(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def train(self, seconds: float) -> dict:
        """Steps for so many seconds, one at least; returns seconds per step and all losses."""
        spent, n = 0.0, 0
        while not n or spent < seconds:
            rows = torch.from_numpy(self.shape.batch(len(self.losses)))
            tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            tick = time.perf_counter()
            self.losses.append(self.step(tokens, targets))
            spent, n = spent + time.perf_counter() - tick, n + 1
        return {"seconds": spent / n, "losses": self.losses[:10]}
