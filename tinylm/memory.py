"""How much memory a run will take, foreseen before its first step."""

from __future__ import annotations

from pathlib import Path

from tinylm import backend
from tinylm.errors import InputError
from tinylm.kernels.launch import LOGITS
from tinylm.model import ModelConfig, Transformer

BASE = 200e6  # Python, NumPy, the rest, and what the pool keeps, bytes


def activation_floats(c: ModelConfig) -> int:
    """Floats that one token leaves for the backward pass, over all layers."""
    heads, groups = c.n_head * c.head_size, c.n_kv_head * c.head_size
    if c.is_llama:
        # turned q and k, v, out, sum; gate, up, sum (norms and products are computed again)
        layer = 2 * c.n_embd + 2 * heads + 2 * groups + 2 * c.n_inner
    else:
        # q k v, out, sum; up, sum
        layer = 6 * c.n_embd + c.n_inner
    return c.n_layer * layer + 2 * c.n_embd


def needed(c: ModelConfig, n_parameters: int, rows: int, block_size: int) -> int:
    """Bytes at the peak of a training step on rows x block_size tokens, float32."""
    tokens = rows * block_size
    # weights, gradients, at most two moments; what the layers keep; gradients on their way; a
    # logits block
    logits = min(tokens, 512) * c.vocab_size
    if backend.name == "cuda":  # and their bits in bfloat16
        logits = 1.5 * min(tokens * c.vocab_size, LOGITS)
    floats = 4 * n_parameters + tokens * (activation_floats(c) + 4 * c.n_inner + 8 * c.n_embd)
    return int(BASE + 4 * (floats + logits))


def available() -> int | None:
    """Bytes that this process may still take: memory free, control group; None: unknown.

    On a GPU, what is free there.
    """
    if hasattr(backend.kernels, "free_bytes"):
        return backend.kernels.free_bytes()
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        limits.append(limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit
    return min(limits) if limits else None


def check(model: Transformer, config) -> None:
    """Raise InputError, with the setting that would fit, where a run would not fit the memory."""
    room, n = available(), model.n_parameters()
    if room is None or needed(model.config, n, config.batch_size, config.block_size) <= room:
        return
    rows = config.batch_size
    while rows > 1 and needed(model.config, n, rows, config.block_size) > room:
        rows //= 2
    wanted = needed(model.config, n, config.batch_size, config.block_size)
    said = f"this run needs about {wanted / 1e9:.1f} GB, but {room / 1e9:.1f} GB are free: "
    if needed(model.config, n, rows, config.block_size) > room:
        raise InputError(said + "use a smaller --n-embd, --n-layer or --block-size")
    times = config.accumulate * -(-config.batch_size // rows)
    raise InputError(said + f"--batch-size {rows} --accumulate {times} would fit")
