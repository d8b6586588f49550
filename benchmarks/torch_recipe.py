"""nanoGPT's recipe for a CPU in plain PyTorch: a text by characters, model a, 2,000 iterations.

    python torch_recipe.py FILE SEED

Prints {"loss": nats per character of the last tenth, in windows of 64}. Nothing is evaluated on the
way, and nothing dropped out.
"""

from __future__ import annotations

import json
import math
import sys

import torch
from in_torch import adamw
from tasks import MODELS
from torch_models import GPT2

STEPS, WARM_UP, BATCH, BLOCK = 2000, 100, 12, 64
LEARNING_RATE, FLOOR, CLIP = 1e-3, 1e-4, 1.0


def fresh_model(vocab_size: int) -> GPT2:
    """GPT-2's initialisation: N(0, 0.02), residual projections scaled down, biases zero."""
    c = MODELS["a"].shape
    sizes = dict(vocab_size=vocab_size, n_positions=BLOCK, n_inner=4 * c["n_embd"])
    model = GPT2(c | sizes | dict(layer_norm_epsilon=1e-5))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            residual = name.endswith("c_proj.weight")
            std = 0.02 / math.sqrt(2 * c["n_layer"]) if residual else 0.02
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def learning_rate(step: int) -> float:
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / (WARM_UP + 1)
    falling = 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (STEPS - WARM_UP)))
    return FLOOR + falling * (LEARNING_RATE - FLOOR)


def train(model: GPT2, text: torch.Tensor) -> None:
    optimizer = adamw(model)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        at = torch.randint(len(text) - BLOCK, (BATCH,))
        rows = torch.stack([text[i : i + BLOCK + 1] for i in at])
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: GPT2, text: torch.Tensor) -> float:
    """The mean loss of whole windows."""
    n = (len(text) - 1) // BLOCK * BLOCK
    tokens, targets = text[:n].view(-1, BLOCK), text[1 : n + 1].view(-1, BLOCK)
    parts = zip(tokens.split(64), targets.split(64))
    return sum(model(x, y).item() * x.numel() for x, y in parts) / n


def main(file: str, seed: str) -> None:
    torch.manual_seed(int(seed))
    with open(file, encoding="utf-8") as f:
        text = f.read()
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([characters[c] for c in text])
    cut = int(0.9 * len(ids))
    model = fresh_model(len(characters))
    train(model, ids[:cut])
    print(json.dumps({"loss": evaluate(model, ids[cut:])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
