"""A device for tinylm.kernels.launch that is no device: csrc/cuda, compiled for the CPU.

The text that NVRTC would compile is compiled by g++ behind emulator.h, and launched with the same
grid, block and arguments; arrays are NumPy's, or anything that wraps them (`unwrap`).
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import device_arrays
import numpy

from tinylm.kernels import launch

HEADER = Path(__file__).parent / "emulator.h"
ORDERS = ("forward", "reverse", "shuffled")
LARGEST_BLOCK, LARGEST_GRID, LARGEST_SHARED = 1024, 65535, 99 << 10  # of any GPU since 2020
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE"]
SANITIZE = os.environ.get("TINYLM_SANITIZE", "")  # for example "address,undefined"
if SANITIZE:
    FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"]
WAITS = re.compile(r"__sync(threads|warp)\(\)")  # barriers, each numbered when it is compiled


def compiled(text: str) -> ctypes.CDLL:
    """The kernels of a .cu text as a library of functions emulate_<kernel>."""
    number = count()
    text = WAITS.sub(lambda wait: f"BARRIER({next(number)}, {wait[0]})", text)
    with TemporaryDirectory() as folder:
        source, library = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        source.write_text(text, encoding="utf-8")
        # The compiler itself need not be watched by a sanitizer.
        gxx = ["env", "-u", "LD_PRELOAD", "g++", *FLAGS, "-x", "c++", "-include", HEADER, source]
        expanded = subprocess.run([*gxx, "-E"], check=True, capture_output=True, text=True).stdout
        kernels = re.findall(r'extern "C"\s+void\s+(?!__)(\w+)\(', expanded)
        with source.open("a", encoding="utf-8") as file:
            file.writelines(f"\nEXPORT({name})" for name in kernels)
        subprocess.run([*gxx, "-o", library], check=True)
        return ctypes.CDLL(str(library))


@cache
def library() -> ctypes.CDLL:
    """csrc/cuda; six seconds."""
    return compiled(launch.source())


def barriers() -> list[str]:
    """Where csrc/cuda waits, file:line, in the order of their numbers."""
    found, name, line = [], "", 0
    for text in launch.source().splitlines():
        begin = re.match(r'#line 1 "(.*)"', text)
        name, line = (begin[1], 0) if begin else (name, line + 1)
        found += [f"{name}:{line}"] * len(WAITS.findall(text))
    return found


class Emulator:
    """What launch.Kernels asks of a device."""

    multiply = None  # no cuBLAS: matmul.cu multiplies

    def __init__(self, library: ctypes.CDLL, xp=numpy, unwrap=lambda x: x):
        self.library, self.xp, self.unwrap = library, xp, unwrap
        self.function = cache(self.function)

    def order(self, name: str) -> None:
        """In which order the warps of a block run."""
        self.library.set_order(ORDERS.index(name))

    def leave_out(self, barrier: int) -> None:
        """Run without this barrier (-1: with all)."""
        self.library.leave_out(barrier)

    def function(self, name: str):
        """A kernel, and the kinds of its arguments."""
        call = getattr(self.library, "emulate_" + name)
        call.restype = ctypes.c_char_p
        return call, call(None, ctypes.c_size_t(0), None).decode()

    def later(self, x):
        return self.unwrap(x).copy().tolist

    def launch(self, name, grid, block, shared, arguments) -> None:
        assert block <= LARGEST_BLOCK
        assert block % 32 == 0
        assert shared <= LARGEST_SHARED
        assert max((0, *grid[1:])) <= LARGEST_GRID
        call, kinds = self.function(name)
        values = [self.unwrap(x) for x in arguments]
        got = "".join(map(kind, values))
        assert kinds == got, f"{name}: expected {kinds}, got {got}"
        given = [number(x) for x in values]
        pointers = (ctypes.c_void_p * len(given))(*(ctypes.addressof(x) for x in given))
        size = (ctypes.c_uint * 4)(*(*grid, 1, 1)[:3], block)

        def run():
            call(size, ctypes.c_size_t(shared), pointers)
            return given  # the numbers that `pointers` point at

        device_arrays.act(run, *(x for x in values if isinstance(x, numpy.ndarray)))

    memory = object

    def give_back(self, memory) -> None:
        pass

    @contextmanager
    def apart(self, memory):
        yield

    def record(self, function):
        with device_arrays.recording() as tape:
            return tape, function()

    def replay(self, tape) -> None:
        tape.play()


def kind(x) -> str:
    return {int: "i", float: "f"}.get(type(x), "p")


def number(x):
    """An argument as C sees it."""
    if isinstance(x, int):
        return ctypes.c_longlong(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_void_p(None if x is None else x.ctypes.data)
