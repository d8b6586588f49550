"""Why a command ends before its work is done; the command line prints the sentence."""

import signal
from collections.abc import Callable
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot be used: what, where and what to do about it. Exit code 2."""


class Waiting(Exception):
    """A person's judgement is needed, and nobody is there to give it. Exit code 75."""


@contextmanager
def asked_to_stop(handler: Callable):
    """Inside, Ctrl-C and SIGTERM call handler(number, frame)."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
