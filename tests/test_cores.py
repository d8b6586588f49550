"""A run gives way to other programs, and takes back what they leave."""

import subprocess
import sys
import time

import pytest

from tinylm import backend, cores


@pytest.mark.parametrize(
    "most, processors, spent, ours, expected",
    [
        (2, 2, 1.95, 1.9, 2),
        (2, 2, 2.0, 1.3, 1),  # another program has most of a core
        (2, 2, 2.0, 1.0, 1),  # and all of it, once it was given way to
        (2, 2, 1.0, 1.0, 2),  # it has ended
        (2, 2, 2.0, 0.2, 1),  # never less than one
        (8, 16, 16.0, 8.0, 8),  # of cores with two processors each, the other half is others'
        (4, 4, 0.0, 3.1, 4),  # a system that tells nothing of what was spent
        (4, 0, 0.0, 3.1, 4),  # nor of its processors
        (4, 2, 2.0, 2.0, 4),  # told to use more threads than there are processors
    ],
)
def test_threads_are_as_many_as_others_leave_cores_for(most, processors, spent, ours, expected):
    before, after = (10.0, 50.0, 7.0, processors), (11.0, 50.0 + spent, 7.0 + ours, processors)
    assert cores.free_threads(before, after, most) == expected


def test_what_is_spent_is_counted():
    before = cores.usage()
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
    finally:
        other.kill()
        other.wait()
    seconds, spent, ours = (b - a for a, b in zip(before[:3], cores.usage()[:3]))
    assert seconds >= 0.5 and 0.1 < ours < seconds + 0.1  # a child's is ours, once it has ended
    if before[1]:  # a system may tell nothing
        assert 0.1 < spent < seconds * before[3] + 0.1


def test_a_system_that_tells_nothing_is_no_reason_to_stop(monkeypatch):
    def refused(percpu):
        raise PermissionError

    monkeypatch.setattr(cores.psutil, "cpu_times", refused)
    _, spent, _, processors = cores.usage()
    assert spent == processors == 0


@pytest.mark.skipif(not getattr(backend.kernels, "openmp", False), reason="there is one thread")
def test_a_run_gives_way_once_a_second_and_takes_back(monkeypatch):
    clock, spent, ours, told = [0.0], [0.0], [0.0], []
    monkeypatch.setattr(cores, "usage", lambda: (clock[0], spent[0], ours[0], 4))
    monkeypatch.setattr(cores.time, "perf_counter", lambda: clock[0])
    before = backend.threads()
    backend.set_threads(4)
    try:
        with cores.shared_cores(told.append) as share:
            for others, expected in ((0, 4), (1, 3), (2.6, 1), (1, 3), (0, 4)):
                clock[0] += 0.5
                held = backend.threads()
                share()
                assert backend.threads() == held  # it is not yet time
                clock[0] += 0.5
                spent[0] += others + 1
                ours[0] += 1
                share()
                assert backend.threads() == expected
            backend.kernels.set_threads(2)
        assert backend.threads() == 4
        assert told == ["other programs use these cores: 3 of 4 threads while they do"]
    finally:
        backend.set_threads(before)


def test_kernels_without_threads_are_left_alone():
    backend.use("reference")
    with cores.shared_cores(pytest.fail) as share:
        share()
