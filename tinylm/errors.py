"""Mistakes in what the user gave us. The command line prints the sentence and exits with 2."""


class InputError(ValueError):
    """The user's input cannot be used: the message says what, where and what to do about it."""
