"""Base class of ``Key``, ``Keyring`` and ``Policy``: assignment, deletion, copies and pickles are refused.

It keeps a program from changing its own keys and policies by mistake. What is in a token cannot assign attributes, so no
check of a token depends on it.
"""

from __future__ import annotations

from typing import NoReturn


class Immutable:
    """Base class of immutable objects. ``__init__`` sets their attributes by ``_set``."""

    __slots__ = ()

    def _set(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is immutable; make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a {type(self).__name__} is immutable; make another one")

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is not pickled or copied; make it where it is used")
