"""Forks of this process: members are told before and after each one.

A forked child has the memory of its parent and none of its threads. A member closes what must not be
shared before the fork (``before_fork``), and parent and child each open it again when they need it.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final, Protocol


class ForkAware(Protocol):
    """Something that must be still while the process forks."""

    def before_fork(self) -> None:
        """Come to rest; nothing may be open when this returns."""

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """Begin anew: the child has no other thread."""


# Reentrant: a signal handler may make a member while its thread does, or forks.
_forking: Final = threading.RLock()
_registered: Final[weakref.WeakSet[ForkAware]] = weakref.WeakSet()
_registered_early: Final[weakref.WeakSet[ForkAware]] = weakref.WeakSet()
_held: Final[list[ForkAware]] = []
"""The members that the fork under way has stopped, in this order."""


def register_fork(member: ForkAware, *, early: bool = False) -> None:
    """Tell ``member`` of every fork of this process, as long as another object refers to it.

    Args:
        member: The member; only a weak reference is kept.
        early: The member uses a queue: it comes to rest before the queues do.
    """
    with _forking:
        (_registered_early if early else _registered).add(member)


def _before_fork() -> None:
    _forking.acquire()
    for member in (*_registered_early, *_registered):
        member.before_fork()
        _held.append(member)


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().after_fork_in_parent()
    _forking.release()


def _after_fork_in_child() -> None:
    while _held:
        _held.pop().after_fork_in_child()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
