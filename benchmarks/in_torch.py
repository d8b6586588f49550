"""The tasks in PyTorch: what one contestant process does. Its twin is in_tinylm.py."""

from __future__ import annotations

import time

import tasks
import torch
import torch_models
from tasks import BETAS, LEARNING_RATE, MODELS, WEIGHT_DECAY
from torch.nn.functional import scaled_dot_product_attention


class Contestant:
    """PyTorch in float32, or in bfloat16 by autocast; eager or compiled."""

    def __init__(self, threads: int, dtype: str = "float32", compiled: bool = False):
        torch.set_num_threads(threads)
        self.dtype, self.compiled = getattr(torch, dtype), compiled

    def load(self, directory: str) -> None:
        self.model = torch_models.load(directory)
        if self.compiled:
            self.model.compile()

    # ---- training

    def learn(self, model: str) -> None:
        """Get ready to train the model that was loaded."""
        self.shape, self.losses = MODELS[model], []
        self.optimizer = adamw(self.model)

    def step(self, tokens, targets) -> float:
        tokens, targets = torch.from_numpy(tokens), torch.from_numpy(targets)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype == torch.bfloat16):
            loss = self.model(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def train(self, seconds: float) -> dict:
        return tasks.train(self.step, self.shape, self.losses, seconds)

    # ---- single kernels

    def product(self, layout: str, M: int, K: int, N: int) -> dict:
        a, b, transpose_a, transpose_b = tasks.operands(layout, M, K, N)
        a, b = (torch.from_numpy(x).to(self.dtype) for x in (a, b))
        a, b = a.T if transpose_a else a, b.T if transpose_b else b
        out = torch.empty(a.shape[0], b.shape[1], dtype=self.dtype)
        return tasks.seconds_of(lambda: torch.mm(a, b, out=out))

    def attention(self, B: int, H: int, T: int, D: int) -> dict:
        """Causal attention, forward and backward."""
        q, k, v, dout = torch.randn(4, B, H, T, D, dtype=self.dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]

        def both():
            out = scaled_dot_product_attention(*inputs, is_causal=True)
            torch.autograd.grad(out, inputs, dout)

        return tasks.seconds_of(both)

    # ---- text

    def load_transformers(self, directory: str) -> None:
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype)

    def write(self, prompts: int, answers: int) -> dict:
        """Continue so many prompts so many times, at once and greedily; returns what it wrote."""
        rows = torch.from_numpy(tasks.prompts(prompts, answers))
        settings = {"max_new_tokens": tasks.NEW, "min_new_tokens": tasks.NEW, "do_sample": False}
        tick = time.perf_counter()
        text = self.model.generate(rows, attention_mask=torch.ones_like(rows), **settings)
        seconds = time.perf_counter() - tick
        return {"seconds": seconds, "text": text[:, rows.shape[1] :].tolist()}


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """Fused; decays matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, LEARNING_RATE, BETAS, fused=True)
