"""Callables whose annotations name what only type checkers import, as Python 3.14 makes them: evaluated when they are asked for.

An older Python evaluates them at once, unless ``from __future__ import annotations`` keeps them as text.
"""

import __future__

import sys

_FLAGS = 0 if sys.version_info >= (3, 14) else __future__.annotations.compiler_flag
_SOURCE = """
import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shop.models import Order

RAN = []


def send(order: Order, count: int = 1) -> Order:
    RAN.append((order, count))


def send_all(orders: list[Order], count: int = 1):
    RAN.append((orders, count))


def send_dotted(order: functools.Order, count: int = 1):
    RAN.append((order, count))


def marked(order: Order, *, _token: Order):
    RAN.append((order, _token))


@functools.wraps(send)
def wrapped(*args, **kwargs):
    send(*args, **kwargs)


wrapped.__qualname__ = "wrapped"

def broken(order: 1 / 0, count: int = 1):
    RAN.append((order, count))


class Sender:
    def __init__(self, order: Order = None, count: int = 1):
        RAN.append((order, count))

    def method(self, order: Order, count: int = 1):
        RAN.append((order, count))

    @classmethod
    def build(cls, order: Order, count: int = 1):
        RAN.append((order, count))

    def __call__(self, order: Order, count: int = 1):
        RAN.append((order, count))


class BareNew:
    def __new__(cls, order: Order = None, count: 1 / 0 = 1):
        made = super().__new__(cls)
        made.order = order
        return made
"""

exec(compile(_SOURCE, __file__, "exec", flags=_FLAGS, dont_inherit=True))  # noqa: S102
