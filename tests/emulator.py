"""A device for tinylm.kernels.launch that is no device: csrc/cuda, compiled for the CPU.

The text that NVRTC would compile is compiled by g++ behind emulator.h, and launched with the same
grid, block and arguments; arrays are NumPy's, or anything that wraps them (`unwrap`).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy

from tinylm.kernels import launch

HEADER = Path(__file__).parent / "emulator.h"
ORDERS = ("forward", "reverse", "shuffled")
LARGEST_BLOCK, LARGEST_GRID, LARGEST_SHARED = 1024, 65535, 99 << 10  # of any GPU since 2020
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-U_FORTIFY_SOURCE", "-ffp-contract=fast")


def compile(text: str, folder: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernels of a .cu text as a library of functions emulate_<kernel>."""
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(text, encoding="utf-8")
    gxx = ["g++", *FLAGS, *flags, "-x", "c++", "-include", str(HEADER)]
    expanded = subprocess.run([*gxx, "-E", source], check=True, capture_output=True, text=True)
    names = re.findall(r'extern "C" void (?!set_order)(\w+)\(', expanded.stdout)
    with source.open("a", encoding="utf-8") as file:
        file.writelines(f"\nEXPORT({name})" for name in names)
    subprocess.run([*gxx, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


class Emulator:
    """What launch.Kernels asks of a device."""

    multiply = None  # no cuBLAS: matmul.cu multiplies

    def __init__(self, library: ctypes.CDLL, xp=numpy, unwrap=lambda x: x):
        self.library, self.xp, self.unwrap = library, xp, unwrap
        self.function = cache(self.function)

    def order(self, name: str) -> None:
        """In which order the warps of a block run."""
        self.library.set_order(ORDERS.index(name))

    def function(self, name: str):
        """A kernel, and the kinds of its arguments."""
        call = getattr(self.library, "emulate_" + name)
        call.restype = ctypes.c_char_p
        return call, call(None, ctypes.c_size_t(0), None).decode()

    def launch(self, name, grid, block, shared, arguments) -> None:
        assert block <= LARGEST_BLOCK and block % 32 == 0 and shared <= LARGEST_SHARED
        assert all(n <= LARGEST_GRID for n in grid[1:])
        call, kinds = self.function(name)
        values = [self.unwrap(x) for x in arguments]
        assert kinds == "".join(map(kind, values)), f"{name}{kinds} got {''.join(map(kind, values))}"
        given = [number(x) for x in values]
        pointers = (ctypes.c_void_p * len(given))(*(ctypes.addressof(x) for x in given))
        size = (ctypes.c_uint * 4)(*(*grid, 1, 1)[:3], block)
        call(size, ctypes.c_size_t(shared), pointers)


def kind(x) -> str:
    return {int: "i", float: "f"}.get(type(x), "p")


def number(x):
    """An argument as C sees it."""
    if isinstance(x, int):
        return ctypes.c_longlong(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


@cache
def library(folder: Path) -> ctypes.CDLL:
    return compile(launch.source(), folder)
