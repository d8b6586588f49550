"""The arguments of a device's kernels: checked, and errors worded as those of the CPU's kernels.

Also how many threads and blocks there are, where nothing else is said.
"""

from __future__ import annotations

THREADS = 256  # of a block, where nothing else is said
WARPS = THREADS // 32


def up(n: int, size: int) -> int:
    """How many pieces of a size hold n."""
    return -(-n // size)


def text_of(shape) -> str:
    """(2, any): a shape in an error, where None stands for any size."""
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


class Arguments:
    """Checks the arguments of the kernel `name`, and words the errors."""

    def __init__(self, kernels, name: str):
        self.kernels, self.xp, self.name = kernels, kernels.xp, name

    def what(self, arg: str) -> str:
        return f"[{self.name}] {arg}: expected "

    def wrong(self, arg: str, rest: str):
        raise ValueError(self.what(arg) + rest)

    def shape(self, arg: str, x, letters: str, shape) -> None:
        same = len(shape) == x.ndim and all(n in (None, m) for n, m in zip(shape, x.shape))
        if not same:
            self.wrong(arg, f"{letters} = {text_of(shape)}, got {text_of(x.shape)}")

    def dtype(self, arg: str, x, *expected: str) -> None:
        if not isinstance(x, self.xp.ndarray):
            raise TypeError(self.what(arg) + f"an array on the device, got {type(x).__name__}")
        if x.dtype not in expected:
            raise TypeError(self.what(arg) + f"{' or '.join(expected)}, got {x.dtype}")

    def floats(self, arg: str, x, letters: str = "", shape=None):
        """float32, contiguous; of any shape (..., C) if none is given."""
        self.dtype(arg, x, "float32")
        if shape is not None:
            self.shape(arg, x, letters, shape)
        elif x.ndim < 1:
            self.wrong(arg, "at least one dimension, got a scalar")
        return x if x.flags.c_contiguous else self.xp.ascontiguousarray(x)

    def heads(self, arg: str, x, letters: str = "(B, H, T, D)", shape=(None,) * 4) -> tuple:
        """float32 (B, heads, tokens, D) of which only D is contiguous -> it and three strides."""
        self.dtype(arg, x, "float32")
        self.shape(arg, x, letters, shape)
        if x.shape[3] > 1 and x.strides[3] != x.itemsize:
            x = self.xp.ascontiguousarray(x)
        return x, *(stride // x.itemsize for stride in x.strides[:3])

    def in_place(self, arg: str, x, shape):
        """float32, contiguous: the array itself, to be written to."""
        self.dtype(arg, x, "float32")
        self.shape(arg, x, "an array to write to", shape)
        if not x.flags.c_contiguous:
            self.wrong(arg, "a C-contiguous array")
        return x

    def place(self, arg: str, x, shape):
        """The array to write to that was given, or a new one."""
        return self.kernels.empty(shape) if x is None else self.in_place(arg, x, shape)

    def ints(self, arg: str, x, letters: str, shape, least: int) -> tuple:
        """int32 or int64 -> int32, and what a kernel needs to check them: fault, check."""
        self.dtype(arg, x, "int32", "int64")
        self.shape(arg, x, letters, shape)
        x = x if x.flags.c_contiguous else self.xp.ascontiguousarray(x)
        if x.dtype == "int64":
            wide, x = x, self.xp.empty(x.shape, "int32")
            self.kernels.each("narrow", wide, x)
        return x, self.kernels.noting(
            f"{self.what(arg)}values in [{least}, {{limit}}), got {{value}}"
        )
