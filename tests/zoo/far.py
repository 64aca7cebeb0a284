"""Callables and classes that the policies of tests do not name. ``RAN`` tells which hooks ran."""

import enum
import threading
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from safedefer import register_type

RAN: list[str] = []
T = TypeVar("T")


def run(*args: object, **kwargs: object) -> None: ...


class Colour(enum.Enum):
    RED = 1


@dataclass
class Point:
    x: object
    y: object

    def move(self, by: int) -> None: ...

    @classmethod
    def make(cls) -> None: ...


@dataclass(frozen=True)
class Frozen:
    x: int


class Pair(NamedTuple):
    left: object
    right: object


class Note(BaseModel):
    text: str


class Page(BaseModel, Generic[T]):
    items: list[T]


class Plain:
    pass


class Marked:
    pass


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value


class Closed:
    def __init__(self) -> None:
        self.inner = Colour.RED

    def __getstate__(self) -> object:
        RAN.append("getstate")
        return self.__dict__


class ByState:
    def __setstate__(self, state: object) -> None:
        RAN.append("setstate")

    def __getstate__(self) -> object:
        RAN.append("getstate")
        return {}


class Inherits(ByState):
    pass


class Made:
    def __new__(cls) -> "Made":
        return object.__new__(cls)

    def __getstate__(self) -> object:
        RAN.append("getstate")
        return {}


class WithArgs:
    def __getnewargs__(self) -> tuple[Any, ...]:
        RAN.append("getnewargs")
        return ()


class Number(int):
    def __new__(cls, value: int) -> "Number":
        RAN.append("new")
        return int.__new__(cls, value)


class Heir(Number):
    """Its own objects give arguments to a ``__new__`` that those of its base have no use for."""

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (3,)


class Loud:
    def __hash__(self) -> int:
        RAN.append("hash")
        return 7

    def __eq__(self, other: object) -> bool:
        RAN.append("eq")
        return self is other


class Sealed(Loud):
    def __getstate__(self) -> object:
        RAN.append("getstate")
        return {}


class Failed(Exception):
    pass


class Signed:
    """Stands for the signature of a function."""

    @property
    def __class__(self) -> type:
        RAN.append("signature")
        return int


def signed(*args: object) -> None: ...


signed.__signature__ = Signed()  # type: ignore[attr-defined]


class Called(type):
    def __call__(cls, *args: object, **kwargs: object) -> object:
        RAN.append("called")
        return super().__call__(*args, **kwargs)

    def __getattribute__(cls, name: str) -> object:
        RAN.append("metaclass")
        return super().__getattribute__(name)


class OfCalled(metaclass=Called):
    def __init__(self, value: object) -> None: ...


class Fresh:
    """Its state is new each time."""

    def __getstate__(self) -> object:
        RAN.append("fresh")
        return {"lock": threading.Lock()}


class Anew:
    """Its state is new each time, and what holds it too."""

    def __getstate__(self) -> object:
        RAN.append("anew")
        return {"deep": [{"lock": threading.Lock()}]}


class Shifting:
    """What it holds is elsewhere each time."""

    def __getstate__(self) -> object:
        RAN.append("shifting")
        return {"deep": [*[1] * len(RAN), threading.Lock()]}


class Registered:
    def __init__(self, value: int) -> None:
        self.value = value


def _encode(value: Registered) -> int:
    RAN.append("encode")
    return value.value


register_type(Registered, tag="$tests_far_registered", encode=_encode, decode=Registered)


class Meta(type):
    def __call__(cls, *args: object, **kwargs: object) -> object:
        return super().__call__(*args, **kwargs)


class OfMeta(metaclass=Meta):
    def __init__(self, value: object = None) -> None:
        self.value = value

    def go(self) -> None: ...

    @classmethod
    def of(cls, value: object) -> None: ...


class Makes:
    def __new__(cls, *_args: object) -> "Makes":
        return object.__new__(cls)


class Inits:
    def __init__(self, value: object = None) -> None:
        self.value = value
