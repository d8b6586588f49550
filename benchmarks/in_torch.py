"""The tasks in PyTorch: what one contestant process does. Its twin is in_tinylm.py."""

from __future__ import annotations

import time

import torch
import torch_models
from tasks import MODELS, NEW, operands, prompts, seconds_of
from torch.nn.functional import scaled_dot_product_attention

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

    def product(self, layout: str, M: int, K: int, N: int) -> dict:
        a, b, transpose_a, transpose_b = operands(layout, M, K, N)
        a, b = (torch.from_numpy(x).to(self.dtype) for x in (a, b))
        a, b = a.T if transpose_a else a, b.T if transpose_b else b
        out = torch.empty(a.shape[0], b.shape[1], dtype=self.dtype)
        return {"seconds": seconds_of(lambda: torch.mm(a, b, out=out))}

    def attention(self, B: int, H: int, T: int, D: int) -> dict:
        """Causal attention, forward and backward."""
        q, k, v, dout = torch.randn(4, B, H, T, D, dtype=self.dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]

        def both():
            out = scaled_dot_product_attention(*inputs, is_causal=True)
            torch.autograd.grad(out, inputs, dout)

        return {"seconds": seconds_of(both)}

    def read(self, directory: str) -> dict:
        """Open a model for writing text."""
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype)
        return {}

    def write(self, streams: int) -> dict:
        """Continue so many prompts at once, greedily; also returns what it wrote."""
        rows = torch.from_numpy(prompts(streams))
        mask = torch.ones_like(rows)
        tick = time.perf_counter()
        text = self.model.generate(
            rows, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
        seconds = time.perf_counter() - tick
        return {"seconds": seconds, "text": text[:, rows.shape[1] :].tolist()}
