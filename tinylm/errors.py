"""Why a command ends before its work is done; the command line prints the sentence."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot be used: what, where and what to do about it. Exit code 2."""


class Waiting(Exception):
    """A person's judgement is needed, and nobody is there to give it. Exit code 75."""


INTERRUPTED = "\ntinylm: interrupted; what was saved is intact"


def told_of(kind: type[BaseException], error: BaseException, trace) -> None:
    """As sys.excepthook: Ctrl-C is told without a traceback. Exit code 130."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)
        return
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


@contextmanager
def asked_to_stop(handler: Callable):
    """Inside, Ctrl-C and SIGTERM call handler(number, frame)."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
