"""How many threads a run uses: as many as there are cores that no other program wants.

A kernel ends with the last of its threads, and a core that two programs want changes hands only
every few milliseconds, which is the time of many kernels. So two threads on two cores, one of which
is busy otherwise, are slower than one (by 1.6, docs/log.md). Bits do not depend on the number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

from tinylm import backend

EVERY = 1.0  # seconds between two looks at the processors


@contextmanager
def shared_cores(say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """`with` it, call what it yields after each step: it gives way to others, and takes back.

    say: is told of it, the first time.
    """
    if not hasattr(backend.kernels, "set_threads"):  # not the kernels of the processor
        yield lambda: None
        return
    most, seen, told = backend.threads(), usage(), False

    def share() -> None:
        nonlocal seen, told
        if time.perf_counter() < seen[0] + EVERY:
            return
        before, seen = seen, usage()
        n = free_threads(before, seen, most)
        if n < most and not told:
            say(f"other programs use these cores: {n} of {most} threads while they do")
            told = True
        backend.kernels.set_threads(n)

    try:
        yield share
    finally:
        backend.kernels.set_threads(most)


def usage() -> tuple[float, float, float, int]:
    """(the time, what was spent by anybody on the processors that this process may use, what of it
    by this process and its children, all in seconds; how many processors these are)."""
    try:
        processors = psutil.cpu_times(percpu=True)
    except OSError:  # not for us to know
        processors = []
    allowed = getattr(os, "sched_getaffinity", lambda pid: range(len(processors)))(0)
    if max(allowed, default=0) < len(processors):  # else they go by other numbers, or some are off
        processors = [processors[i] for i in allowed]
    waiting = {"idle", "iowait", "guest", "guest_nice"}  # a guest's time is the user's, too
    if os.nice(0) <= 0:
        waiting.add("nice")  # whoever is nice wants no more than we leave
    spent = sum(
        seconds
        for times in processors
        for kind, seconds in times._asdict().items()
        if kind not in waiting
    )
    return time.perf_counter(), spent, sum(os.times()[:4]), len(processors)


def free_threads(before: tuple, after: tuple, most: int) -> int:
    """How many threads, 1 to most, between two usages: one less for each processor that others had,
    beyond those that we leave free anyway."""
    seconds, spent, ours = (b - a for a, b in zip(before[:3], after[:3]))
    spare = max(0, after[3] - most)
    return max(1, most - max(0, round((spent - ours) / seconds - spare)))
