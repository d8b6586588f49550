"""What a run ran on: told in its report, so that its speed can be judged and its bits repeated."""

from __future__ import annotations

import platform
import subprocess
import sys
import timeit
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from statistics import median

import numpy

from tinylm import backend


def describe() -> dict:
    """Versions, processor, and the multiply-adds that its threads can do; a tenth of a second."""
    from tinylm import __version__  # the package, which is whole only now

    threads = backend.threads()
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "tinylm": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "backend": backend.describe(),
        "threads": threads,
        "peak_gflops": known_peak(threads) if backend.name == "cpu" else None,
    }


def processor() -> str:
    """Its name as the system tells it, or as far as Python knows it."""
    if sys.platform == "darwin":
        sysctl = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.check_output(sysctl, text=True).strip()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def fma_peak(threads: int) -> float:
    """Multiply-adds on registers only, GFLOP/s, the best of ten: what no kernel can exceed."""
    operations = backend.kernels.peak(threads)
    return operations / seconds_of(lambda: backend.kernels.peak(threads), 10, min) / 1e9


known_peak = cache(fma_peak)  # measured once in a process


def seconds_of(run: Callable[[], object], repeats: int = 5, take=median) -> float:
    """The median time of run(), which is run once more before to warm up."""
    return take(timeit.repeat(run, number=1, repeat=repeats + 1)[1:])
