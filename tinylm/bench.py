"""How fast is this machine, and what does that mean for training?  `tinylm bench` prints it.

Everything is run once to warm up and then a few times; medians are told. A product is judged by the
multiply-adds that the chip can do, whatever else a kernel does by the memory's speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from rich.table import Table

from tinylm import backend, memory
from tinylm.config import flops_per_token
from tinylm.corpus import read_texts
from tinylm.environment import fma_peak, seconds_of
from tinylm.errors import InputError
from tinylm.model import Transformer
from tinylm.optim import AdamW
from tinylm.progress import Progress, clock, table
from tinylm.settings import products
from tinylm.stages.pretrain import PRESETS, PretrainConfig, fitted_vocabulary
from tinylm.tensor import Array
from tinylm.tokenizer import SPECIAL_TOKENS, train_bpe
from tinylm.train import make_optimizer

SAMPLE = 1_000_000  # characters of a corpus by which its tokens are estimated


def run(progress: Progress, corpus: list[Path] = ()) -> dict[str, Any]:
    """Measure all of it, and foretell training on the files of a corpus; takes half a minute.

    Raises InputError where the compiled kernels do not run.
    """
    if backend.name != "cpu":
        raise InputError("bench measures the compiled kernels: use --backend cpu")
    with progress.console.status("the corpus") as status:
        known = measure_corpus(corpus) if corpus else None
        status.update("the machine")
        machine = measure_machine()
        rows = []
        for kernel in KERNELS:
            status.update(f"kernels: {kernel.name}")
            rows.append(measure_kernel(kernel, machine))
        training = []
        for preset in PRESETS:
            status.update(f"training: {preset}")
            training.append(measure_preset(preset, machine, known))
    return {
        "backend": backend.describe(), "machine": machine, "kernels": rows, "corpus": known,
        "training": training,
    }  # fmt: skip


# ---- the machine -------------------------------------------------------------------------------


def measure_machine() -> dict[str, Any]:
    """Each on one thread and on all."""
    counts = {"one": 1, "all": backend.threads()}
    x = numpy.ones(1 << 25, "float32")
    kernels, moved = backend.kernels, x.nbytes / 1e9
    read = lambda threads: moved / seconds_of(lambda: kernels.read(x, threads))
    copy = lambda threads: 2 * moved / seconds_of(lambda: kernels.copy(x, threads))  # and written
    return {
        "threads": backend.threads(),
        "fma_gflops": {name: fma_peak(n) for name, n in counts.items()},
        "read_gb_per_s": {name: read(n) for name, n in counts.items()},
        "copy_gb_per_s": {name: copy(n) for name, n in counts.items()},
        "barrier_us": barrier(backend.threads()),
    }


def barrier(threads: int) -> float:
    """How long threads take to wait for each other, µs."""
    n = backend.kernels.barriers(threads)
    return seconds_of(lambda: backend.kernels.barriers(threads)) / n * 1e6


# ---- the kernels -------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel, its arguments, and what it costs: operations, or bytes moved.

    A tuple among the arguments is the shape of floats to draw; a function makes its argument.
    """

    name: str
    about: str
    arguments: tuple
    flops: float = 0.0
    bytes: float = 0.0


def floats(*shape: int) -> Array:
    return numpy.random.default_rng(0).standard_normal(shape, "float32") / 10


def tokens(n: int, V: int) -> Array:
    return numpy.random.default_rng(0).integers(0, V, n, "int32")


def drawn(argument):
    if callable(argument):
        return argument()
    return floats(*argument) if isinstance(argument, tuple) else argument


B, H, T, D, C, F, V, M, N, P = 16, 6, 256, 64, 384, 1536, 8192, 1024, 16384, 10_000_000
X, W, SMALL, HEADS, LSE = (4096, C), (F, C), (768, 128), (B, H, T, D), (B, H, T)
GEMM, HEAD = 2 * 4096 * C * F, 2 * M * C * V
PAIRS = B * H * T * T * D  # operations of one product of causal attention
TARGETS = lambda: tokens(M, V)
POSITIONS = lambda: numpy.tile(numpy.arange(T, dtype="int32"), (B, 1))
WIDE, TALL = (N, F), (N, C)

KERNELS = (
    Kernel("linear_forward", f"4096 x {C} -> {F}", (X, W), GEMM),
    Kernel("linear_backward", f"4096 x {C} -> {F}", ((4096, F), X, W), 2 * GEMM),
    Kernel("linear_forward", "768 x 128 -> 128", (SMALL, (128, 128)), 2 * 768 * 128 * 128),
    Kernel("linear_backward", "768 x 128 -> 128", (SMALL, SMALL, (128, 128)), 4 * 768 * 128 * 128),
    Kernel("linear_cross_entropy_forward", f"{M} x {C} -> {V}", ((M, C), (V, C), TARGETS), HEAD),
    Kernel("linear_cross_entropy_backward", f"{M} x {C} -> {V}", ((M,), (M, C), (V, C), TARGETS, (M,)), 3 * HEAD),
    Kernel("attention_forward", f"{B} x {H} x {T} x {D}", (HEADS,) * 3, 2 * PAIRS),
    Kernel("attention_backward", f"{B} x {H} x {T} x {D}", (*(HEADS,) * 5, LSE), 5 * PAIRS),
    Kernel("layer_norm_forward", f"{N} x {C}", (TALL, (C,), (C,), 1e-5), bytes=8 * N * C),
    Kernel("layer_norm_backward", f"{N} x {C}", (TALL, TALL, (C,), (N,), (N,)), bytes=12 * N * C),
    Kernel("rms_norm_forward", f"{N} x {C}", (TALL, (C,), 1e-5), bytes=8 * N * C),
    Kernel("rms_norm_backward", f"{N} x {C}", (TALL, TALL, (C,), (N,)), bytes=12 * N * C),
    Kernel("gelu_forward", f"{N} x {F}", (WIDE,), bytes=8 * N * F),
    Kernel("gelu_backward", f"{N} x {F}", (WIDE, WIDE), bytes=12 * N * F),
    Kernel("swiglu_forward", f"{N} x {F}", (WIDE, WIDE), bytes=12 * N * F),
    Kernel("swiglu_backward", f"{N} x {F}", (WIDE, WIDE, WIDE), bytes=20 * N * F),
    Kernel("rope_forward", f"{B} x {H} x {T} x {D}", (HEADS, (T, D // 2), (T, D // 2), POSITIONS), bytes=8 * B * H * T * D),
    Kernel("adamw", "10 million weights", (*[(P,)] * 3, lambda: abs(floats(P)), 1e-4, 0.9, 0.99, 1e-8, 0.1, 1), bytes=28 * P),
)  # fmt: skip


def measure_kernel(kernel: Kernel, machine: dict) -> dict[str, Any]:
    """Its speed, and the share of the machine's that it is: GFLOP/s, or GB/s of a copy."""
    arguments, function = [*map(drawn, kernel.arguments)], getattr(backend.kernels, kernel.name)
    seconds = seconds_of(lambda: function(*arguments))
    speed = (kernel.flops or kernel.bytes) / seconds / 1e9
    peak = machine["fma_gflops" if kernel.flops else "copy_gb_per_s"]["all"]
    unit = "GFLOP/s" if kernel.flops else "GB/s"
    row = {"kernel": kernel.name, "shape": kernel.about, "ms": 1000 * seconds}
    return row | {"speed": speed, "unit": unit, "share_of_peak": speed / peak}


# ---- training ----------------------------------------------------------------------------------


def training_step(
    model: Transformer, optimizer: AdamW, tokens: Array, targets: Array, lr: float
) -> float:
    """Forward, backward and AdamW on one batch (B, T); returns the mean loss."""
    loss = model.loss(tokens, targets)
    loss.backward(backend.xp.full(loss.shape, 1 / loss.size, loss.dtype))
    optimizer.step(lr)
    optimizer.zero_grad()
    return float(loss.data.mean(dtype="float64"))


def measure_preset(preset: str, machine: dict, corpus: dict | None) -> dict[str, Any]:
    """A few steps of a preset's model; what its own run takes, and one pass over a corpus."""
    config = PretrainConfig(**PRESETS[preset])
    characters = config.tokenizer == "characters"
    V = 65 + len(SPECIAL_TOKENS) if characters else corpus["vocab_size"] if corpus else 8192
    model = Transformer(config.shape(V))
    B, T = config.batch_size, config.block_size
    row = {"preset": preset, "parameters": model.n_parameters()}
    if memory.needed(model.config, row["parameters"], B, T) > memory.available():
        return row | {"tokens_per_second": None}
    found = seconds_of_step(model, make_optimizer(model, config), B, T)
    speed = {dtype: B * T / seconds for dtype, seconds in found.items()}
    gflops = flops_per_token(model.config, T) * speed["float32"] / 1e9
    usual = speed[backend.product_dtype(config.dtype)]
    row |= {
        "tokens_per_second": speed,
        "share_of_peak": gflops / machine["fma_gflops"]["all"],
        "run_seconds": 60 * config.minutes or config.max_steps * config.accumulate * B * T / usual,
    }
    if corpus:
        n = corpus["characters" if characters else "tokens"] * (1 - config.held_out)
        row["epoch_seconds"] = n / usual
    return row


def seconds_of_step(model: Transformer, optimizer: AdamW, rows: int, T: int) -> dict[str, float]:
    """By the dtype of its products, of those that this machine has."""
    found = {}
    ids = tokens(rows * (T + 1), model.config.vocab_size).reshape(rows, T + 1)
    step = lambda: training_step(model, optimizer, ids[:, :-1], ids[:, 1:], 1e-4)
    for dtype in ("float32", "bfloat16"):
        try:
            with products(dtype):
                found[dtype] = seconds_of(step, repeats=3)
        except InputError:
            continue
    return found


def measure_corpus(files: list[Path]) -> dict[str, Any]:
    """Bytes, and about how many characters and BPE tokens they are, judged by their beginning."""
    size = sum(path.stat().st_size for path in files)
    read, texts, characters, marks = [], [], 0, 0
    for text, ends in read_texts(files, seen=read.append):
        texts.append(text)
        characters += len(text)
        marks += 2 * ends  # on disk, each document has a token before it and one after it
        if characters >= SAMPLE:
            break
    if not characters:
        raise InputError(f"{files[0]}: there is no text in it")
    tokenizer = train_bpe(texts, fitted_vocabulary(size), at_most=True)
    n_tokens = sum(len(tokenizer.encode_array(text)) for text in texts)
    scale = size / sum(read)
    return {
        "bytes": size,
        "characters": round(scale * (characters + marks)),
        "tokens": round(scale * (n_tokens + marks)),
        "vocab_size": tokenizer.vocab_size,
    }


# ---- what a person reads -----------------------------------------------------------------------


def tables(found: dict) -> Iterable[Table]:
    """The findings of run, for a console."""
    machine, rows = found["machine"], found["kernels"]
    yield machine_table(found["backend"], machine)
    for unit, limit, what in (
        ("GFLOP/s", machine["fma_gflops"]["all"], "multiply-adds alone"),
        ("GB/s", machine["copy_gb_per_s"]["all"], "copying memory"),
    ):
        caption = f"{unit}, and the share of {limit:,.0f} {unit}, which {what} reaches"
        yield kernel_table([row for row in rows if row["unit"] == unit], caption)
    yield training_table(found["training"], found["corpus"])


def percent(share: float) -> str:
    colour = "green" if share >= 0.8 else "yellow" if share >= 0.5 else "red"
    return f"[{colour}]{share:.0%}[/]"


def machine_table(backend: str, machine: dict) -> Table:
    headings = ("", "1 thread", f"{machine['threads']} threads", "")
    made = table(f"The machine: {backend}", *headings)
    speeds = ("fma_gflops", "read_gb_per_s", "copy_gb_per_s")
    for name, key in zip(("multiply-adds", "memory, read", "memory, copy"), speeds):
        unit = "GFLOP/s" if key == "fma_gflops" else "GB/s"
        made.add_row(name, *(f"{machine[key][n]:,.0f}" for n in ("one", "all")), unit)
    made.add_row("barrier", "", f"{machine['barrier_us']:.2f}", "µs")
    return made


def kernel_table(rows: list[dict], caption: str) -> Table:
    """A forward and its backward on one line."""
    headings = ("", "", "forward", "", "backward", "")
    made = table("Kernels", *headings, words=2, caption=caption)
    lines: dict[tuple, list] = {}
    for row in rows:
        name = row["kernel"].removesuffix("_forward").removesuffix("_backward")
        cells = lines.setdefault((name, row["shape"]), [])
        cells += [f"{row['speed']:,.0f}", percent(row["share_of_peak"])]
    for names, cells in lines.items():
        made.add_row(*names, *cells)
    return made


def training_table(rows: list[dict], corpus: dict | None) -> Table:
    headings = ("preset", "parameters", "tokens/s", "of peak", "bfloat16", "its run")
    made = table("Training", *headings, *(["epoch"] if corpus else []))
    if corpus:
        made.caption = (
            f"corpus: {corpus['bytes']:,} bytes, about {corpus['tokens']:,} tokens of "
            f"{corpus['vocab_size']:,}"
        )
    for row in rows:
        cells = [row["preset"], f"{row['parameters']:,}"]
        if speed := row["tokens_per_second"]:
            rounded = f"{speed['bfloat16']:,.0f}" if "bfloat16" in speed else "-"
            cells += [f"{speed['float32']:,.0f}", percent(row["share_of_peak"]), rounded]
            cells += [clock(row[key]) for key in ("run_seconds", "epoch_seconds") if key in row]
        else:
            cells.append("too large for the free memory")
        made.add_row(*cells)
    return made
