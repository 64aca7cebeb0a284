"""Values as libraries hand them out: parsed, subscripted, frozen, and with the classes of an application around them."""

import dataclasses
import datetime
import enum
import typing
import uuid

import attrs
from django.db import models
from pydantic import AnyUrl, BaseModel, ByteSize, Field, HttpUrl, PostgresDsn, PrivateAttr, RootModel, TypeAdapter

T = typing.TypeVar("T")
U = typing.TypeVar("U")


class Page(BaseModel, typing.Generic[T]):
    items: list[T]
    next: typing.Any = None

    def total(self):
        return len(self.items)

    def __call__(self):
        return self.total()

    @classmethod
    def empty(cls):
        return cls(items=[])


class Both(Page[T], typing.Generic[T, U]):
    other: U | None = None


class Wrapped(RootModel[T], typing.Generic[T]):
    pass


class IntPage(Page[int]):
    """The class that the messages advise."""


class Hooked(BaseModel, typing.Generic[T]):
    RAN: typing.ClassVar[list] = []
    item: T

    def __init_subclass__(cls, **kwargs):
        Hooked.RAN.append("__init_subclass__")
        super().__init_subclass__(**kwargs)


class Schema:
    RAN: typing.ClassVar[list] = []

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        Schema.RAN.append("schema")
        from pydantic_core import core_schema

        return core_schema.any_schema()


class When(BaseModel):
    at: datetime.datetime
    time: datetime.time


class Links(BaseModel):
    home: HttpUrl
    any: AnyUrl
    database: PostgresDsn


class Box(typing.Generic[T]):
    def __init__(self, value):
        self.value = value

    def get(self):
        return self.value


class Pair(Box[T], typing.Generic[T, U]):
    pass


@dataclasses.dataclass
class DataBox(typing.Generic[T]):
    value: T


class SlotBox(typing.Generic[T]):
    __slots__ = ("__orig_class__", "value")

    def __init__(self, value):
        self.value = value


class OwnSubscript(Box[T]):
    RAN: typing.ClassVar[list] = []

    @classmethod
    def __class_getitem__(cls, item):
        OwnSubscript.RAN.append(item)
        return super().__class_getitem__(item)


class Wide(enum.Flag):
    A = 1
    B = 1 << 60
    C = 1 << 300


class WideInt(enum.IntFlag):
    A = 1
    B = 1 << 53
    C = 1 << 70


class OrderId(uuid.UUID):
    """An application's own id."""


class SlottedId(uuid.UUID):
    __slots__ = ()


class Sized(typing.Protocol):
    size: int

    def grow(self) -> int: ...


@dataclasses.dataclass
class Tree(Sized):
    size: int

    def grow(self):
        return self.size + 1


class Color(models.TextChoices):
    RED = "r", "Red"
    BLUE = "b"


class Order:
    class Status(models.TextChoices):
        OPEN = "o"


MODULE = __name__
PARSE = TypeAdapter(datetime.datetime).validate_python


def size_of(text):
    return TypeAdapter(ByteSize).validate_python(text)


# --- Fields that came later -----------------------------------------------------------------------


@dataclasses.dataclass
class Data:
    a: int
    tags: list = dataclasses.field(default_factory=list)
    note: str = "none"
    kind: typing.ClassVar[int] = 5


@dataclasses.dataclass(slots=True)
class Slotted:
    a: int
    tags: list = dataclasses.field(default_factory=list)
    note: str = "none"


@attrs.define
class Attrs:
    a: int
    tags: list = attrs.field(factory=list)
    note: str = "none"


@attrs.define
class AttrsSelf:
    a: int
    tags: list = attrs.field(default=attrs.Factory(lambda self: [self.a], takes_self=True))


class Model(BaseModel):
    a: int
    tags: list[int] = []
    note: str = "none"
    made: list[int] = Field(default_factory=list)
    _seen: int = PrivateAttr(default=3)


class Named(typing.NamedTuple):
    a: int
    note: str = "none"
    tags: tuple = ()


class Heir(Data):
    """Of a dataclass, and none itself."""
