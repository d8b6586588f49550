"""Why a command ends before its work is done; the command line prints the sentence."""


class InputError(ValueError):
    """The user's input cannot be used: what, where and what to do about it. Exit code 2."""


class Waiting(Exception):
    """A person's judgement is needed, and nobody is there to give it. Exit code 75."""
