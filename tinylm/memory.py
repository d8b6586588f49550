"""How much memory a run will take, foreseen before its first step."""

from __future__ import annotations

from pathlib import Path

import psutil

from tinylm import backend
from tinylm.errors import InputError
from tinylm.kernels.launch import LOGITS
from tinylm.model import ModelConfig

BASE = 80e6  # Python, NumPy, what is small, and gaps in the pool, bytes


def activation_floats(c: ModelConfig, recompute: bool) -> int:
    """Floats that one token leaves for the backward pass, over all layers; with recompute, of all
    but one their input alone."""
    heads, groups = c.n_head * c.head_size, c.n_kv_head * c.head_size
    if c.is_llama:
        # norm, turned q and k, v, out, sum; norm, gate, up, sum (their product is computed again)
        layer = 4 * c.n_embd + 2 * heads + 2 * groups + 2 * c.n_inner
    else:
        # q k v, out, sum; up, sum (norms and GELU are computed again)
        layer = 6 * c.n_embd + c.n_inner
    layers = layer + c.n_layer * c.n_embd if recompute else c.n_layer * layer
    return layers + 2 * c.n_embd


def needed(
    c: ModelConfig, n_parameters: int, rows: int, block_size: int, recompute: bool = False,
    besides: int = 0,
) -> int:  # fmt: skip
    """Bytes at the peak of a training step on rows x block_size tokens, float32.

    besides: floats that the stage keeps.
    """
    tokens = rows * block_size
    # weights, gradients, at most two moments; what the layers keep; gradients on their way; a
    # logits block
    on_their_way = 2 * c.n_inner + 3 * c.n_embd
    logits = min(tokens, 512) * c.vocab_size
    if backend.name == "cuda":  # and their bits in bfloat16; evaluations have memory of their own
        logits = 2 * 1.5 * min(tokens * c.vocab_size, LOGITS)
    floats = besides + 4 * n_parameters + tokens * (activation_floats(c, recompute) + on_their_way)
    return int(BASE + 4 * (floats + logits))


def available() -> int:
    """Bytes that this process may still take: memory free, control group; on a GPU, free there."""
    if hasattr(backend.kernels, "free_bytes"):
        return backend.kernels.free_bytes()
    limits = [psutil.virtual_memory().available]
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{of}").read_text()) for of in ("max", "current"))
        kinds = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(kinds["active_file"]) + int(kinds["inactive_file"])  # kept while there is room
        limits.append(limit - used + files)
    except (OSError, ValueError, KeyError):
        pass  # no control group, or one without a limit
    return min(limits)


def check(stage) -> None:
    """Raise InputError, with the settings that would fit, where a run would not fit the memory."""
    room, model, c, (width, once, each) = available(), stage.model, stage.config, stage.memory()
    together = getattr(c, "answers", 1)  # rows, of which all or none are in a batch

    def needs(rows: int, recompute: bool) -> int:
        besides = once + rows * each
        return needed(model.config, model.n_parameters(), rows, width, recompute, besides)

    def that_fit(recompute: bool) -> str:
        """Flags for as many rows as fit, or ""."""
        rows = c.batch_size
        while rows > together and needs(rows, recompute) > room:
            rows = max(1, rows // together // 2) * together
        flags = ["--recompute"] if recompute and not c.recompute else []
        if rows < c.batch_size:
            times = c.accumulate * -(-c.batch_size // rows)
            flags.append(f"--batch-size {rows} --accumulate {times}")
        return " ".join(flags) if needs(rows, recompute) <= room else ""

    wanted = needs(c.batch_size, c.recompute)
    if wanted <= room:
        return
    ways = [way for way in map(that_fit, sorted({c.recompute, True})) if way]
    smaller = "--n-embd, --n-layer or --block-size" if hasattr(c, "n_embd") else "model"
    advice = " or ".join(ways) + " would fit" if ways else f"use a smaller {smaller}"
    free = f"but {room / 1e9:.1f} GB are free"
    raise InputError(f"this run needs about {wanted / 1e9:.1f} GB, {free}: {advice}")
