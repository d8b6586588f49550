"""tinylm on this machine's GPU, beside PyTorch where it is installed:  python benchmarks/gpu.py

First that the kernels are right there, then how fast: launches, products, attention, and training
GPT-2 124M, kernel by kernel, as a CUDA graph, and with --recompute. Ratios are tinylm's speed over
PyTorch's, in one process and by turns; above 1 is faster. Without a GPU it says so in one line and
ends with code 2.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory

import numpy
from rich.console import Console

import tinylm
from tinylm import backend
from tinylm.bench import flops_per_token, training_step
from tinylm.files import in_json
from tinylm.kernels import cases
from tinylm.kernels.cases import CASES
from tinylm.model import ModelConfig, Transformer
from tinylm.optim import AdamW
from tinylm.progress import table
from tinylm.selfcheck import FromNumPy, selfcheck
from tinylm.train import Guard

GPT2 = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024}
DTYPES = ("float32", "bfloat16")
WAYS = ("kernel by kernel", "graph", "graph, recompute")
# dense bfloat16 TFLOP/s as NVIDIA states them; model FLOP utilisation is a share of this
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}


def seconds_of(run: Callable[[], object], wait: Callable[[], object], repeats: int) -> float:
    """The median time of run() until the device has done it; twice before to warm up."""
    times = []
    for _ in range(repeats + 2):
        wait()
        tick = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - tick)
    return median(times[2:])


def wrong_kernels() -> list[str]:
    """Kernels whose results are not the reference's, with products of either kind."""
    wrong = [row.kernel for row in selfcheck(backend.kernels) if not row.ok]
    kernels = FromNumPy(backend.kernels)
    backend.set_products("bfloat16")
    for case in CASES:
        rounded = case.op.startswith(("linear", "attention")) and case.slack == 1
        if rounded and not cases.parity_error(kernels, case) <= cases.TOLERANCE["bfloat16"]:
            wrong.append(f"{case} in bfloat16")
    backend.set_products("float32")
    return wrong


def wrong_steps() -> list[str]:
    """Whether a step as a graph is another one than kernel by kernel, on a small model."""
    ids = numpy.random.default_rng(0).integers(0, 61, (4, 65))
    losses = {}
    for make in (single_kernels_step, graph_step):
        model = Transformer(ModelConfig(61, 2, 4, 4, 64, block_size=64, architecture="gpt2"))
        step = make(model, AdamW(model.parameters()))
        losses[make.__name__] = [step(ids[:, :-1], ids[:, 1:])() for _ in range(8)]
    same = numpy.allclose(*losses.values(), rtol=1e-4)
    return [] if same else [f"steps as a graph ({losses})"]


class Ours:
    """The tasks in tinylm; `settle` waits for the device."""

    def __init__(self, repeats: int):
        self.repeats = repeats

    def time(self, run) -> float:
        return seconds_of(run, backend.kernels.settle, self.repeats)

    def draw(self, *shape: int):
        values = numpy.random.default_rng(0).standard_normal(shape, "float32")
        return backend.asarray(values)

    def launches(self, n: int) -> float:
        """Seconds that one call of the smallest kernel takes, checks and result included."""
        x = self.draw(32)
        return self.time(lambda: [backend.kernels.add(x, x) for _ in range(n)]) / n

    def product(self, dtype: str, M: int, K: int, N: int) -> float:
        backend.set_products(dtype)
        a, b = self.draw(M, K), self.draw(N, K)
        seconds = self.time(lambda: backend.kernels.matmul(a, b, transpose_b=True))
        backend.set_products("float32")
        return seconds

    def attention(self, dtype: str, B: int, H: int, T: int, D: int) -> float:
        """Forward and backward, causal."""
        backend.set_products(dtype)
        q, k, v, dout = (self.draw(B, H, T, D) for _ in range(4))

        def both():
            out, lse = backend.kernels.attention_forward(q, k, v)
            backend.kernels.attention_backward(dout, q, k, v, out, lse)

        seconds = self.time(both)
        backend.set_products("float32")
        return seconds

    def training(self, dtype: str, directory: str, batch, way: str) -> tuple[float, float]:
        """Seconds of a step, and the loss of the first."""
        backend.set_products(dtype)
        model, _ = tinylm.load(directory)
        model.recompute = "recompute" in way
        optimizer = AdamW(model.parameters())
        make, losses = graph_step if "graph" in way else single_kernels_step, []
        step = make(model, optimizer)
        seconds = self.time(lambda: losses.append(step(*batch)))
        backend.set_products("float32")
        return seconds, losses[0]()


def single_kernels_step(model: Transformer, optimizer: AdamW):
    """A step that is asked for kernel by kernel, and waits for its loss."""

    def step(tokens, targets) -> Callable[[], float]:
        loss = training_step(model, optimizer, tokens, targets, lr=1e-4)
        return lambda: loss

    return step


def graph_step(model: Transformer, optimizer: AdamW):
    """The same as train.py makes it of a GPU: recorded and replayed, its loss read later."""

    def whole(rate, tokens, targets, weights):
        loss = model.loss(tokens, targets)
        loss.backward(weights)
        told = optimizer.guarded_step(loss.data.sum(dtype="float64"), rate, 0.0, Guard())
        optimizer.zero_grad()
        return told

    recorded, rate = backend.kernels.recorded(whole), numpy.array([1e-4], "float32")

    def step(tokens, targets) -> Callable[[], float]:
        told = recorded(rate, tokens, targets, numpy.full(tokens.shape, 1 / tokens.size, "float32"))
        return lambda: told()[0] / tokens.size

    return step


class Theirs:
    """The same in PyTorch."""

    def __init__(self, repeats: int):
        import torch
        import torch_models

        if not torch.cuda.is_available():
            raise ImportError("this PyTorch cannot use the GPU")
        torch.set_default_device("cuda")
        self.torch, self.models, self.repeats = torch, torch_models, repeats

    def time(self, run) -> float:
        """NaN where memory does not suffice; what PyTorch keeps of it for later is given back."""
        try:
            return seconds_of(run, self.torch.cuda.synchronize, self.repeats)
        except self.torch.OutOfMemoryError:
            return math.nan
        finally:
            self.torch.cuda.empty_cache()

    def launches(self, n: int) -> float:
        x = self.torch.ones(32)
        return self.time(lambda: [x + x for _ in range(n)]) / n

    def product(self, dtype: str, M: int, K: int, N: int) -> float:
        kind = getattr(self.torch, dtype)
        a, b = self.torch.randn(M, K, dtype=kind), self.torch.randn(N, K, dtype=kind)
        return self.time(lambda: a @ b.T)

    def attention(self, dtype: str, B: int, H: int, T: int, D: int) -> float:
        *inputs, dout = self.torch.randn(4, B, H, T, D, dtype=getattr(self.torch, dtype))
        inputs = [x.detach().requires_grad_() for x in inputs]
        attend = self.torch.nn.functional.scaled_dot_product_attention
        return self.time(
            lambda: self.torch.autograd.grad(attend(*inputs, is_causal=True), inputs, dout)
        )

    def training(self, dtype: str, directory: str, batch, compiled: bool) -> tuple[float, float]:
        torch, losses = self.torch, []
        model = self.models.load(directory).cuda()
        if compiled:
            model.compile()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
        tokens, targets = (torch.from_numpy(x).cuda() for x in batch)

        def step():
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(tokens, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())

        return self.time(step), losses[0] if losses else math.nan


def measure(
    rows: int, repeats: int, shape: dict, theirs: Theirs | None, peak: float | None
) -> dict:
    """All of it, on `rows` rows of text; speeds in tokens/s and TFLOP/s."""
    config = ModelConfig(**shape, architecture="gpt2")
    T, C, D = config.block_size, config.n_embd, config.head_size
    ours, found = Ours(repeats), {"gpu": backend.kernels.describe(), "rows": rows}
    found["launch_us"] = compared(ours, theirs, lambda seconds: 1e6 * seconds, "launches", 200)
    sizes = sorted({(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C), (C, config.vocab_size)})
    found["products"] = [
        product(ours, theirs, dtype, rows * T, K, N) for dtype in DTYPES for K, N in sizes
    ]
    heads = (rows, config.n_head, T, D)
    flops = 7 * rows * config.n_head * T * T * D  # 2 + 5 products, half of each is masked
    found["attention"] = [
        {"dtype": dtype} | compared(ours, theirs, tera(flops), "attention", dtype, *heads)
        for dtype in DTYPES
    ]
    found["training"] = training(ours, theirs, config, rows, peak)
    return found


def product(ours: Ours, theirs: Theirs | None, dtype: str, M: int, K: int, N: int) -> dict:
    row = {"dtype": dtype, "M": M, "K": K, "N": N}
    return row | compared(ours, theirs, tera(2 * M * K * N), "product", dtype, M, K, N)


def tera(operations: float) -> Callable[[float], float]:
    """From seconds to TFLOP/s."""
    return lambda seconds: 1e-12 * operations / seconds


def compared(ours: Ours, theirs: Theirs | None, unit, task: str, *arguments) -> dict:
    mine = getattr(ours, task)(*arguments)
    other = getattr(theirs, task)(*arguments) if theirs else None
    return {"tinylm": unit(mine), "torch": other and unit(other), "ratio": other and other / mine}


def training(ours: Ours, theirs: Theirs | None, config: ModelConfig, rows: int, peak: float | None):
    """A row for each dtype and way: tokens/s, share of the peak, the first loss, ratios."""
    ids = numpy.random.default_rng(0).integers(0, config.vocab_size, (rows, config.block_size + 1))
    batch = ids[:, :-1].copy(), ids[:, 1:].copy()
    tokens, found = batch[0].size, []
    with TemporaryDirectory() as directory:
        tinylm.save(Transformer(config), None, directory)
        for dtype in DTYPES:
            there = {
                way: theirs.training(dtype, directory, batch, way == "compiled")
                for way in ("eager", "compiled")
                if theirs
            }
            for way in WAYS:
                seconds, loss = ours.training(dtype, directory, batch, way)
                speed = tokens / seconds
                row = {"dtype": dtype, "way": way, "tokens_per_second": speed, "loss": loss}
                done = 1e-12 * flops_per_token(config, config.block_size) * speed
                row["mfu"] = peak and done / peak
                for other, (seconds_there, loss_there) in there.items():
                    row |= {other: seconds_there / seconds, f"loss_{other}": loss_there}
                found.append(row)
    return found


def tables(found: dict):
    """What was measured, for a person."""
    number = lambda x, form=".2f": "-" if x is None else format(x, form)
    kernels = table(
        f"{found['gpu']}: kernels", "what", "dtype", "tinylm", "PyTorch", "ratio", words=2
    )
    row = found["launch_us"]
    kernels.add_row("launch, µs", "", *(number(row[k]) for k in ("tinylm", "torch", "ratio")))
    for what in ("products", "attention"):
        for row in found[what]:
            about = "x".join(str(row[k]) for k in "MKN") if what == "products" else what
            numbers = (number(row[k]) for k in ("tinylm", "torch", "ratio"))
            kernels.add_row(f"{about}, TFLOP/s", row["dtype"], *numbers)
    steps = table("Training", "dtype", "", "tokens/s", "MFU", "of eager", "of compiled", words=2)
    for row in found["training"]:
        ratios = (number(row.get(way)) for way in ("eager", "compiled"))
        speed = f"{row['tokens_per_second']:,.0f}"
        steps.add_row(row["dtype"], row["way"], speed, number(row["mfu"], ".1%"), *ratios)
    return kernels, steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="Rows of 1,024 tokens in a batch.")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--peak", type=float, help="bfloat16 TFLOP/s of a GPU not known here.")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    try:
        tinylm.use("cuda")
    except ImportError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    wrong = wrong_kernels() or wrong_steps()
    if wrong:
        print(f"gpu.py: wrong here, so not timed: {', '.join(wrong)}", file=sys.stderr)
        return 1
    gpu = backend.kernels.describe()
    peak = asked.peak or next((peak for name, peak in PEAKS.items() if name in gpu), None)
    try:
        theirs = Theirs(asked.repeats)
    except ImportError:
        theirs = None
    try:
        found = measure(asked.rows, asked.repeats, GPT2, theirs, peak)
    except MemoryError as error:
        print(f"gpu.py: {error}: try fewer --rows than {asked.rows}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps(in_json(found)))
    else:
        for made in tables(found):
            Console().print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
