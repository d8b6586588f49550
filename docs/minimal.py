"""A language model in about a hundred lines, on tensor.py, ops.py and the reference kernels alone.

    python docs/minimal.py [TEXT_FILE]

It reads a text, one token per character, trains a Transformer with one attention layer for a
minute, and writes what it has learned. Everything that the package adds (fused C++ kernels, BPE,
shards, checkpoints, a KV cache) makes this faster, safer or larger, but not different in kind.
"""

import sys
from pathlib import Path

import numpy as np

import tinylm
from tinylm import Tensor, no_grad, ops

T, C, H, STEPS, BATCH = 64, 96, 4, 600, 16  # context, width, heads, steps, rows in a batch

tinylm.use("reference")
rng = np.random.default_rng(0)

# ---- data: characters become numbers --------------------------------------------------------

default = Path(__file__).parent.parent / "README.md"
text = Path(sys.argv[1] if len(sys.argv) > 1 else default).read_text(encoding="utf-8")
characters = sorted(set(text))
V = len(characters)
ids = np.array([characters.index(c) for c in text])
train, heldout = np.split(ids, [int(0.9 * len(ids))])


def batch(source):
    """Random windows of the text (B, T), and the same moved on by one: what is to be predicted."""
    begins = rng.integers(0, len(source) - T, BATCH)
    rows = np.stack([source[i : i + T + 1] for i in begins])
    return rows[:, :-1], rows[:, 1:]


# ---- model: a dictionary of weights and one function ----------------------------------------


def weight(*shape, std=0.05):
    return Tensor((std * rng.standard_normal(shape)).astype(np.float32), requires_grad=True)


def ones():
    return Tensor(np.ones(C, np.float32), requires_grad=True)


p = {
    "token": weight(V, C), "position": weight(T, C),
    "norm 1": ones(), "q": weight(C, C), "k": weight(C, C), "v": weight(C, C), "out": weight(C, C),
    "norm 2": ones(), "gate": weight(4 * C, C), "up": weight(4 * C, C), "down": weight(C, 4 * C),
    "norm 3": ones(), "head": weight(V, C),
}  # fmt: skip


def model(tokens):
    """tokens (B, T) -> logits (B, T, V)."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    x = ops.embedding(tokens, p["token"]) + ops.embedding(positions, p["position"])

    n = ops.rms_norm(x, p["norm 1"])  # attention: every character looks at those before it
    q, k, v = (ops.split_heads(ops.linear(n, p[name]), H) for name in "qkv")
    x = x + ops.linear(ops.merge_heads(ops.attention(q, k, v)), p["out"])

    n = ops.rms_norm(x, p["norm 2"])  # MLP: every character thinks by itself
    x = x + ops.linear(ops.swiglu(ops.linear(n, p["gate"]), ops.linear(n, p["up"])), p["down"])

    return ops.linear(ops.rms_norm(x, p["norm 3"]), p["head"])


# ---- training: predict, measure, step downhill ----------------------------------------------

moments = {name: (np.zeros_like(w.data), np.zeros_like(w.data)) for name, w in p.items()}
for step in range(1, STEPS + 1):
    tokens, targets = batch(train)
    loss = ops.cross_entropy(model(tokens), targets).mean()
    loss.backward()
    for name, w in p.items():
        m, v = moments[name]
        tinylm.backend.kernels.adamw(
            w.data, w.grad, m, v, lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0,
            step=step,
        )  # fmt: skip
        w.grad = None
    if step % 100 == 0 or step == 1:
        with no_grad():
            tokens, targets = batch(heldout)
            unseen = ops.cross_entropy(model(tokens), targets).mean().item()
        print(f"step {step:4}  loss {loss.item():.3f}  on unseen text {unseen:.3f}")

# ---- sampling: write one character after the other ------------------------------------------

written = [int(i) for i in train[:T]]
with no_grad():
    for _ in range(300):
        logits = model(np.array([written[-T:]])).data[0, -1]
        chance = np.exp(logits / 0.7 - np.max(logits / 0.7))  # softmax, at a temperature of 0.7
        written.append(int(rng.choice(V, p=chance / chance.sum())))
print("".join(characters[i] for i in written[T:]))
