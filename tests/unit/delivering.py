"""A delivery for tests: calls a function."""

from __future__ import annotations


class Delivering:
    """Hands every task to a function; all have one address."""

    several = False

    def __init__(self, call):
        self._call = call

    def __call__(self, task, headers):
        return self._call(task, headers)

    def address(self, task):
        return ""
