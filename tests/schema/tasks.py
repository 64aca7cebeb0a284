"""What the test vectors call and carry: one callable of every kind, and a class for every tag."""

import dataclasses
import enum
from typing import Any, NamedTuple

from pydantic import BaseModel


def echo(*args, **kwargs):
    return args, kwargs


async def echo_later(*args, **kwargs):
    return args, kwargs


class Receipt:
    """An ordinary class: callable, with methods of both kinds."""

    def __init__(self, number=0):
        self.number = number

    def __call__(self, copies=1):
        return self.number, copies

    def send(self, copies=1):
        return self.number, copies

    @classmethod
    def build(cls, number):
        return cls(number)

    def __repr__(self):
        return f"Receipt({vars(self)})"

    def __eq__(self, other):
        return type(other) is Receipt and vars(self) == vars(other)

    __hash__ = None


class Stated:
    """Says itself what its state is."""

    def __getstate__(self):
        return [self.number]

    def __setstate__(self, state):
        (self.number,) = state

    def __repr__(self):
        return f"Stated({self.number})"


class Arguments:
    """Is made by ``__new__`` with arguments."""

    def __new__(cls, a, *, b):
        self = super().__new__(cls)
        self.a, self.b = a, b
        return self

    def __getnewargs_ex__(self):
        return (self.a,), {"b": self.b}

    def __repr__(self):
        return f"Arguments({self.a!r}, b={self.b!r})"


class Names(list):
    """A list that is more than one."""


class Amount(int):
    """An integer that is more than one."""


class Labels(dict):
    """A dict that is more than one."""


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Order:
    id: Any
    lines: Any = None


class Customer(BaseModel):
    name: str
    tags: list[str] = []


class Refused(Exception):
    pass


class Outer:
    class Choice(enum.Enum):
        A = "a"


class Elsewhere:
    """Named by no key of the vectors that is limited."""


def other(*args):
    return args
