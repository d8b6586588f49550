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
    by this process, all in seconds; how many processors these are)."""
    processors = dict(enumerate(psutil.cpu_times(percpu=True)))
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        processors = {i: times for i, times in processors.items() if i in allowed}
    waiting = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is the user's, too
    spent = sum(
        seconds
        for times in processors.values()
        for kind, seconds in times._asdict().items()
        if kind not in waiting
    )
    return time.perf_counter(), spent, time.process_time(), len(processors)


def free_threads(before: tuple, after: tuple, most: int) -> int:
    """How many threads, 1 to most, would each have had a processor between two usages."""
    seconds, spent, ours = (b - a for a, b in zip(before[:3], after[:3]))
    others = max(0.0, spent - ours) / seconds
    return min(most, max(1, round(after[3] - others)))
