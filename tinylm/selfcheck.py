"""Placeholder."""


def selfcheck():
    return []
