"""The contract's functions on a GPU: arguments checked, results allotted, csrc/cuda launched.

What a device is, this file does not know: it is handed one, by cuda.py a real one with CuPy's
arrays, by the tests an emulator that runs the same kernels on the CPU. A device has

    xp                              its array library: numpy's interface
    launch(name, grid, block, shared, arguments)
    later(x)                        begins to copy x to the host; a function that gives it as a list
    multiply(a, b, c, ...)          its own matrix product, or None: then csrc/cuda/matmul.cu
    memory(), give_back(memory)     a pool of memory; to give back what is idle in it
    apart(memory)                   to work with memory of that pool, after all else and before it
    record(function), replay(graph) a graph of what function asks for, and what it returned

Nothing here waits for the device but `global_norm`, `settle` and what `later` returns. So an
integer out of range is told late: kernels that meet one work on without it and leave a note, which
these read and raise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib import resources

from tinylm.kernels import reference
from tinylm.kernels.arguments import THREADS, WARPS, Arguments, up
from tinylm.kernels.attention import Attention
from tinylm.kernels.guarded import GuardedAdamW
from tinylm.kernels.recorded import Recorded

LOGITS = 1 << 26  # floats: how many logits exist at once, 256 MB
NORM_BLOCKS = 256
SUM_ROWS = 128  # rows that one block of sum_rows walks down, at least


def source() -> str:
    """All of csrc/cuda as one text for the compiler, which still tells errors by file and line.

    In ASCII: CuPy writes it to a file in whatever encoding the system prefers.
    """
    folder = resources.files("tinylm._cuda")
    names = sorted(file.name for file in folder.iterdir() if ".cu" in file.name)
    names.sort(key=lambda name: not name.endswith(".cuh"))  # headers first
    texts = ((folder / name).read_text(encoding="utf-8") for name in names)
    text = "".join(
        f'#line 1 "{name}"\n' + re.sub('^#include ".*"$', "", text, flags=re.MULTILINE)
        for name, text in zip(names, texts)
    )
    return text.encode("ascii", "replace").decode()


class Kernels(Attention):
    """Every function of CONTRACT, float32, on one device."""

    def __init__(self, device):
        self.device, self.xp = device, device.xp
        self.products = "float32"
        self.fault = self.xp.zeros(3, "int64")  # which check failed, what it met, the limit
        self.checks: list[str] = []  # what each number in `fault` means

    # ---- tools ---------------------------------------------------------------------------------

    def set_products(self, dtype: str) -> None:
        """Multiply matrices in float32, or with operands rounded to bfloat16 and float32 sums."""
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"products: expected float32 or bfloat16, got {dtype}")
        self.products = dtype

    def empty(self, shape):
        return self.xp.empty(shape, "float32")

    def empty_heads(self, B: int, heads: int, tokens: int, D: int):
        """(B, heads, tokens, D), in memory (B, tokens, heads, D): merging heads is free."""
        return self.empty((B, tokens, heads, D)).swapaxes(1, 2)

    def launch(self, name: str, grid: tuple[int, ...], *arguments, block=THREADS, shared=0) -> None:
        """shared: bytes of memory that a block has for itself."""
        if 0 not in grid:
            self.device.launch(name, grid, block, shared, arguments)

    def each(self, name: str, *arguments, n: int = -1, rest: tuple = ()) -> None:
        """One thread for each of the n numbers of the first argument; then come n and the rest."""
        n = arguments[0].size if n < 0 else n
        self.launch(name, (up(n, THREADS),), *arguments, n, *rest)

    def each_column(self, name: str, x, *arguments) -> None:
        """One thread for each number of x, which knows its row and its column."""
        rows, C = rows_of(x).shape
        self.launch(name, (rows, up(C, THREADS)), x, *arguments)

    def noting(self, error: str) -> tuple:
        """What a kernel needs to note an error, which may tell a {value} and a {limit}."""
        if error not in self.checks:
            self.checks.append(error)
        return self.fault, 1 + self.checks.index(error)

    def settle(self) -> None:
        """Wait for the device; raise ValueError if a kernel has noted an error."""
        self.tell(*self.fault.tolist())

    def tell(self, check: int, value: int, limit: int) -> None:
        """Raise what was noted, if anything was."""
        if check:
            self.fault.fill(0)
            raise ValueError(self.checks[check - 1].format(value=value, limit=limit))

    def product(self, a, b, c, transpose_a=False, transpose_b=False, add=False) -> None:
        """c (M, N) = op(a) op(b), or c += op(a) op(b). Rows are contiguous; those of operands in
        bfloat16 may lie apart."""
        M, N, K = *c.shape, a.shape[not transpose_a]
        if K == 0 and not add:
            c.fill(0)
        if 0 in (M, N, K):
            return
        a, b = self.operand(a), self.operand(b)
        if self.device.multiply:
            self.device.multiply(a, b, c, transpose_a, transpose_b, add)
            return
        name = "matmul_bfloat16" if a.dtype == "uint16" else "matmul"
        flags = (int(transpose_a), int(transpose_b), int(add))
        self.launch(name, (up(N, 64), up(M, 64)), a, b, c, M, N, K, *flags)

    def operand(self, x):
        """x as products take it: itself, or its bits in bfloat16, to be made once for several."""
        return x if self.products == "float32" or x.dtype == "uint16" else self.rounded(x)

    def rounded(self, x):
        """The bits of x in bfloat16; for a library every row begins at 16 bytes, as tensor cores
        want it."""
        C = x.shape[-1]
        wide = 8 * up(C, 8) if self.device.multiply else C
        y = self.xp.empty((*x.shape[:-1], wide), "uint16")
        self.each_column("round_to_bfloat16", x, y, C, wide)
        return y[..., :C]

    def sum_shares(self, name: str, x, *arguments):
        """Sums over rows of x -> (C): the rows in shares, then the shares by the same kernel."""
        N, C = rows_of(x).shape
        shares = max(1, min(128, up(N, SUM_ROWS)))
        out = self.empty((C,))
        first = out if shares == 1 else self.empty((shares, C))
        self.launch(name, (up(C, 32), shares), x, *arguments, first, N, C)
        if shares > 1:
            self.launch("sum_rows", (up(C, 32), 1), first, out, shares, C)
        return out

    # ---- sums and products ---------------------------------------------------------------------

    def add(self, x, y):
        args = Arguments(self, "add")
        x = args.floats("x", x)
        total = self.empty(x.shape)
        self.each("add", x, args.floats("y", y, "the shape of x", x.shape), total)
        return total

    def matmul(self, a, b, transpose_a=False, transpose_b=False):
        args = Arguments(self, "matmul")
        a = args.floats("a", a, "(K, M)" if transpose_a else "(M, K)", (None, None))
        M, K = a.shape[::-1] if transpose_a else a.shape
        letters, shape = ("(N, K)", (None, K)) if transpose_b else ("(K, N)", (K, None))
        b = args.floats("b", b, letters, shape)
        c = self.empty((M, b.shape[not transpose_b]))
        self.product(a, b, c, transpose_a, transpose_b)
        return c

    def linear_forward(self, x, weight, bias=None, transposed=False):
        args = Arguments(self, "linear_forward")
        x = args.floats("x", x)
        weight = self.weight_of(args, weight, transposed, x.shape[-1], None)
        F = weight.shape[transposed]
        y = self.empty((*x.shape[:-1], F))
        self.product(rows_of(x), weight, rows_of(y), transpose_b=not transposed)
        if bias is not None:
            self.each_column("add_bias", y, args.floats("bias", bias, "(F)", (F,)), F)
        return y

    def weight_of(self, args, weight, transposed, C, F):
        letters, shape = ("(C, F)", (C, F)) if transposed else ("(F, C)", (F, C))
        return args.floats("weight", weight, letters, shape)

    def linear_backward(self, dy, x, weight, transposed=False, has_bias=False, dx=None):
        args = Arguments(self, "linear_backward")
        x = args.floats("x", x)
        dy = args.floats("dy", dy, "(..., F)", (*x.shape[:-1], None))
        weight = self.weight_of(args, weight, transposed, x.shape[-1], dy.shape[-1])
        dx, dweight = args.place("dx", dx, x.shape), self.empty(weight.shape)
        dy, x = rows_of(dy), self.operand(rows_of(x))
        operand = self.operand(dy)
        left, right = (x, operand) if transposed else (operand, x)
        self.product(left, right, dweight, transpose_a=True)
        self.product(operand, weight, rows_of(dx), transpose_b=transposed)
        return dx, dweight, self.sum_shares("sum_rows", dy) if has_bias else None

    # ---- embedding -----------------------------------------------------------------------------

    def embedding_forward(self, tokens, weight):
        args = Arguments(self, "embedding_forward")
        weight = args.floats("weight", weight, "(V, C)", (None, None))
        tokens, check = args.ints("tokens", tokens, "(B, T)", tokens.shape, 0)
        V, C = weight.shape
        y = self.empty((*tokens.shape, C))
        self.launch("embedding_forward", (tokens.size,), tokens, weight, y, V, C, *check, block=128)
        return y

    def embedding_backward(self, dy, tokens, vocab_size, total=None):
        args = Arguments(self, "embedding_backward")
        if vocab_size < 0:
            args.wrong("vocab_size", f"no negative number, got {vocab_size}")
        dy = args.floats("dy", dy, "(B, T, C)", (*tokens.shape, None))
        tokens, check = args.ints("tokens", tokens, "(B, T)", tokens.shape, 0)
        V, C, add = vocab_size, dy.shape[-1], int(total is not None)
        dweight = args.place("total", total, (V, C))
        sizes = (tokens.size, V, C)
        self.launch("embedding_backward", (V,), dy, tokens, dweight, add, *sizes, *check)
        return dweight

    # ---- normalisation -------------------------------------------------------------------------

    def rms_norm_forward(self, x, weight, eps):
        args = Arguments(self, "rms_norm_forward")
        x = args.floats("x", x)
        weight = args.floats("weight", weight, "(C)", x.shape[-1:])
        y, rstd = self.empty(x.shape), self.empty(x.shape[:-1])
        self.each_row("rms_norm_forward", x, weight, float(eps), y, rstd)
        return y, rstd

    def each_row(self, name: str, x, *arguments) -> None:
        """One warp for each row of x, the first argument; N and C come last."""
        N, C = rows_of(x).shape
        self.launch(name, (up(N, WARPS),), x, *arguments, N, C)

    def rms_norm_backward(self, dy, x, weight, rstd):
        dy, *found = self.norm_backward("rms_norm_backward", dy, x, weight, rstd=rstd)
        return tuple(found)

    def layer_norm_forward(self, x, weight, bias, eps):
        args = Arguments(self, "layer_norm_forward")
        x = args.floats("x", x)
        weight = args.floats("weight", weight, "(C)", x.shape[-1:])
        bias = args.floats("bias", bias, "(C)", x.shape[-1:])
        y, mean, rstd = self.empty(x.shape), self.empty(x.shape[:-1]), self.empty(x.shape[:-1])
        self.each_row("layer_norm_forward", x, weight, bias, float(eps), y, mean, rstd)
        return y, mean, rstd

    def layer_norm_backward(self, dy, x, weight, mean, rstd):
        dy, *found = self.norm_backward("layer_norm_backward", dy, x, weight, mean=mean, rstd=rstd)
        return *found, self.sum_shares("sum_rows", dy)

    def norm_backward(self, name: str, dy, x, weight, **residuals):
        """dy as it was checked, dx, dweight. residuals: mean, where it was taken off, and rstd."""
        args = Arguments(self, name)
        x = args.floats("x", x)
        weight = args.floats("weight", weight, "(C)", x.shape[-1:])
        dy = args.floats("dy", dy, "the shape of x", x.shape)
        kept = {k: args.floats(k, r, "(...)", x.shape[:-1]) for k, r in residuals.items()}
        dx = self.empty(x.shape)
        self.each_row(name, dy, x, weight, *kept.values(), dx)
        return dy, dx, self.sum_shares("norm_dweight", dy, x, kept.get("mean"), kept["rstd"])

    # ---- positions, softmax --------------------------------------------------------------------

    def rope_forward(self, x, cos, sin, positions):
        return self.turn(Arguments(self, "rope_forward"), "x", x, cos, sin, positions, 1.0)

    def rope_backward(self, dy, cos, sin, positions):
        return self.turn(Arguments(self, "rope_backward"), "dy", dy, cos, sin, positions, -1.0)

    def turn(self, args, arg, x, cos, sin, positions, direction):
        x, *strides = args.heads(arg, x)
        B, H, T, D = x.shape
        if D % 2:
            args.wrong(arg, f"an even head size D, got {D}")
        cos = args.floats("cos", cos, "(P, D/2)", (None, D // 2))
        sin = args.floats("sin", sin, "(P, D/2)", cos.shape)
        positions, check = args.ints("positions", positions, "(B, T)", (B, T), 0)
        y, n = self.empty_heads(B, H, T, D), x.size // 2
        angles = (cos, sin, positions, cos.shape[0])
        rest = (H, T, D // 2, *check)
        self.each("rope", x, *strides, *angles, direction, y, n=n, rest=rest)
        return y

    def softmax_forward(self, x):
        x = Arguments(self, "softmax_forward").floats("x", x)
        y, (N, C) = self.empty(x.shape), rows_of(x).shape
        self.launch("softmax_forward", (N,), x, y, C)
        return y

    def softmax_backward(self, dy, y):
        args = Arguments(self, "softmax_backward")
        y = args.floats("y", y)
        dy = args.floats("dy", dy, "the shape of y", y.shape)
        dx, (N, C) = self.empty(y.shape), rows_of(y).shape
        self.launch("softmax_backward", (N,), dy, y, dx, C)
        return dx

    # ---- activations ---------------------------------------------------------------------------

    def swiglu_forward(self, gate, up):
        args = Arguments(self, "swiglu_forward")
        gate = args.floats("gate", gate)
        y = self.empty(gate.shape)
        self.each("swiglu_forward", gate, args.floats("up", up, "the shape of gate", gate.shape), y)
        return y

    def swiglu_backward(self, dy, gate, up, dgate=None):
        args = Arguments(self, "swiglu_backward")
        gate = args.floats("gate", gate)
        up = args.floats("up", up, "the shape of gate", gate.shape)
        dy = args.floats("dy", dy, "the shape of gate", gate.shape)
        dgate, dup = args.place("dgate", dgate, gate.shape), self.empty(gate.shape)
        self.each("swiglu_backward", dy, gate, up, dgate, dup)
        return dgate, dup

    def gelu_forward(self, x, approximate=True):
        x = Arguments(self, "gelu_forward").floats("x", x)
        y = self.empty(x.shape)
        self.each("gelu_forward", x, y, rest=(int(approximate),))
        return y

    def gelu_backward(self, dy, x, approximate=True, dx=None):
        args = Arguments(self, "gelu_backward")
        x = args.floats("x", x)
        dy = args.floats("dy", dy, "the shape of x", x.shape)
        dx = args.place("dx", dx, x.shape)
        self.each("gelu_backward", dy, x, dx, rest=(int(approximate),))
        return dx

    # ---- loss ----------------------------------------------------------------------------------

    def cross_entropy_forward(self, logits, targets):
        args = Arguments(self, "cross_entropy_forward")
        logits = args.floats("logits", logits)
        targets, check = args.ints("targets", targets, "(...)", logits.shape[:-1], -1)
        loss, lse = self.empty(targets.shape), self.empty(targets.shape)
        rest = (loss, lse, logits.shape[-1], 0, *check)
        self.launch("cross_entropy_forward", (targets.size,), logits, targets, *rest)
        return loss, lse

    def cross_entropy_backward(self, dloss, logits, targets, lse):
        args = Arguments(self, "cross_entropy_backward")
        logits = args.floats("logits", logits)
        targets, check = args.ints("targets", targets, "(...)", logits.shape[:-1], -1)
        dloss = args.floats("dloss", dloss, "(...)", targets.shape)
        lse = args.floats("lse", lse, "(...)", targets.shape)
        dlogits = self.empty(logits.shape)
        rest = (lse, dlogits, logits.shape[-1], *check)
        self.launch("cross_entropy_backward", (targets.size,), dloss, logits, targets, *rest)
        return dlogits

    def head_inputs(self, args, x, weight, targets):
        x = args.floats("x", x)
        weight = args.floats("weight", weight, "(V, C)", (None, x.shape[-1]))
        targets, check = args.ints("targets", targets, "(...)", x.shape[:-1], -1)
        return x, weight, targets, check

    def logits_in_blocks(self, x, weight):
        """The logits of some rows of x (N, C) after the other, in the same memory."""
        N, V = x.shape[0], weight.shape[0]
        most = max(1, min(N, LOGITS // max(1, V)))
        memory = self.empty((most, V))
        for first in range(0, N, most):
            rows = slice(first, min(N, first + most))
            logits = memory[: rows.stop - first]
            self.product(x[rows], weight, logits, transpose_b=True)
            yield rows, logits

    def linear_cross_entropy_forward(self, x, weight, targets):
        args = Arguments(self, "linear_cross_entropy_forward")
        x, weight, targets, check = self.head_inputs(args, x, weight, targets)
        loss, lse = self.empty(targets.shape), self.empty(targets.shape)
        flat = [a.reshape(-1) for a in (targets, loss, lse)]
        x, V = self.operand(rows_of(x)), weight.shape[0]
        for rows, logits in self.logits_in_blocks(x, self.operand(weight)):
            rest = (*(a[rows] for a in flat), V, 1, *check)
            self.launch("cross_entropy_forward", logits.shape[:1], logits, *rest)
        return loss, lse

    def linear_cross_entropy_backward(self, dloss, x, weight, targets, lse):
        args = Arguments(self, "linear_cross_entropy_backward")
        x, weight, targets, check = self.head_inputs(args, x, weight, targets)
        dloss = args.floats("dloss", dloss, "(...)", targets.shape).reshape(-1)
        lse = args.floats("lse", lse, "(...)", targets.shape).reshape(-1)
        targets, dx, dweight = targets.reshape(-1), self.empty(x.shape), self.empty(weight.shape)
        for rows, logits in self.head_backward(x, weight, dx, dweight):
            given = (dloss[rows], logits, targets[rows], lse[rows], logits, weight.shape[0])
            self.launch("cross_entropy_backward", logits.shape[:1], *given, *check)
        return dx, dweight

    def head_backward(self, x, weight, dx, dweight):
        """The logits of some rows after the other, which the caller's loop turns into dlogits in
        place; from these then dx and dweight."""
        x, weight, dx = self.operand(rows_of(x)), self.operand(weight), rows_of(dx)
        if x.shape[0] == 0:
            dweight.fill(0)
        for rows, logits in self.logits_in_blocks(x, weight):
            yield rows, logits
            dlogits = self.operand(logits)
            self.product(dlogits, weight, dx[rows])
            self.product(dlogits, x[rows], dweight, transpose_a=True, add=rows.start > 0)

    def linear_cross_entropy_with_gradients(self, x, weight, targets):
        args = Arguments(self, "linear_cross_entropy_with_gradients")
        x, weight, targets, check = self.head_inputs(args, x, weight, targets)
        loss, lse = self.empty(targets.shape), self.empty(targets.shape)
        dx, dweight, scale = self.empty(x.shape), self.empty(weight.shape), self.empty((1,))
        self.launch("one_over_counted", (1,), targets, targets.size, scale, block=1024)
        flat = [a.reshape(-1) for a in (targets, loss, lse)]
        for rows, logits in self.head_backward(x, weight, dx, dweight):
            of_targets, *results = (a[rows] for a in flat)
            given = (logits, of_targets, scale, *results, weight.shape[0])
            self.launch("cross_entropy_with_gradients", logits.shape[:1], *given, *check)
        return loss, lse, dx, dweight

    def scale_evenly(self, made, dloss, targets):
        """Gradients of the mean, in place made those of Σ dloss · loss; it must be the same at each
        target that counts, which is noted where it is not."""
        args = Arguments(self, "linear_cross_entropy")
        targets, _ = args.ints("targets", targets, "(...)", targets.shape, -1)
        dloss, scale = args.floats("dloss", dloss, "(...)", targets.shape), self.empty((1,))
        noting = self.noting(args.what("dloss") + "the same for every target; if not, even=False")
        self.launch("even_scale", (1,), dloss, targets, targets.size, scale, *noting, block=1024)
        for x in made:
            self.each("multiply_by", x, scale)
        return made

    # ---- optimizer -----------------------------------------------------------------------------

    def adamw(
        self, param, grad, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale=1.0
    ):  # fmt: skip
        args = Arguments(self, "adamw")
        if step < 1:
            args.wrong("step", f"at least 1, got {step}")
        param = args.in_place("param", param, param.shape)
        m, v = args.in_place("m", m, param.shape), args.in_place("v", v, param.shape)
        grad = args.floats("grad", grad, "the shape of param", param.shape)
        corrections = (1 / (1 - beta1**step), 1 / (1 - beta2**step))
        numbers = (lr, 1 - beta1, 1 - beta2, *corrections, eps, weight_decay, grad_scale)
        self.each("adamw", param, grad, m, v, rest=tuple(map(float, numbers)))

    def muon(self, matrices, lr, beta1, weight_decay, grad_scale=1.0):
        args, checked = Arguments(self, "muon"), []
        for param, grad, m in matrices:
            param = args.in_place("param", param, param.shape)
            args.shape("param", param, "(M, N)", (None, None))
            grad = args.floats("grad", grad, "the shape of param", param.shape)
            checked.append((param, grad, args.in_place("m", m, param.shape)))
        reference.muon(checked, lr, beta1, weight_decay, grad_scale, self.matmul)

    def guarded_adamw(self, *arguments) -> GuardedAdamW:
        return GuardedAdamW(self, *arguments)

    def recorded(self, function: Callable) -> Recorded:
        return Recorded(self, function)

    def later(self, told) -> Callable[[], tuple]:
        """What GuardedAdamW tells, without waiting for it: the function that is returned waits, and
        gives loss, norm and updates made. It raises ValueError if a kernel had noted an error."""
        read = self.device.later(told)

        def wait():
            *found, check, value, limit = read()
            self.tell(int(check), int(value), int(limit))
            return tuple(found)

        return wait

    def global_norm(self, arrays) -> float:
        """Waits for the device, and so it also tells what went wrong before."""
        args = Arguments(self, "global_norm")
        arrays = [args.floats("arrays", x, "the shape of itself", x.shape) for x in arrays]
        blocks = [min(NORM_BLOCKS, up(x.size, 8 * THREADS)) for x in arrays]
        partial, norm = self.xp.empty(sum(blocks), "float64"), self.xp.empty(1, "float64")
        at = 0
        for x, n in zip(arrays, blocks):
            self.launch("sum_squares", (n,), x, x.size, partial[at : at + n])
            at += n
        self.launch("square_root_of_sum", (1,), partial, at, norm, block=1024)
        self.settle()
        return float(norm[0])


def rows_of(x):
    """(..., C) -> (N, C), a view."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
