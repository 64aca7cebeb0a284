"""``validate="annotations"``: what is checked, what cannot be, and that no right call fails."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, Protocol, Self, TypeVar, Unpack

import pytest
from pydantic import Field

from safedefer.errors import InvalidArguments
from safedefer.execution.annotations import check_annotations

if TYPE_CHECKING:
    from decimal import Decimal

T = TypeVar("T")


class Plain:
    pass


@dataclass
class Holder:
    """A dataclass of which pydantic makes no validator."""

    plain: Plain


class Box(Generic[T]):
    pass


class Runs(Protocol):
    """A protocol that ``isinstance`` does not take."""

    def run(self) -> int: ...


class Schemaless:
    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        raise RuntimeError


class Odd(type):
    def __instancecheck__(cls, value):
        raise RuntimeError


class OddOne(metaclass=Odd):
    pass


def held(holder: Holder, count: int) -> Holder: ...
def returns(count: int) -> Nowhere: ...  # noqa: F821
def for_checkers(amount: Decimal, count: int): ...
def listed(holders: list[Holder], count: int): ...
def plain(plain: Plain, count: int) -> Plain: ...
def generic(box: Box[int], count: int): ...
def broken(value: 1 / 0, count: int): ...
def anything(value: Any, count: int): ...
def limited(value: Annotated[int, Field(gt=0)], count: int): ...
def choice(value: Literal["a"], count: int): ...
def many(*holders: Holder, count: int): ...
def protocol(runs: Runs, count: int): ...
def protocols(runs: list[Runs], count: int): ...
def schemaless(value: Schemaless, count: int): ...
def odd(value: OddOne, count: int): ...
def unpacked(*values: Unpack[tuple[int, ...]], count: int): ...


class Model:
    def method(self, other: Self, count: int) -> Self: ...
    def __call__(self, holder: Holder, count: int) -> Nowhere: ...  # noqa: F821


@functools.wraps(held)
def wrapped(*args, **kwargs): ...


HOLDER = Holder(Plain())
CALLS = {
    "a dataclass that holds a plain class": (held, HOLDER),
    "a list of them": (listed, [HOLDER]),
    "several of them": (many, HOLDER),
    "a plain class": (plain, Plain()),
    "a generic class": (generic, Box()),
    "a name for type checkers": (for_checkers, 1),
    "an annotation that raises": (broken, 1),
    "a protocol": (protocol, Plain()),
    "several protocols": (protocols, [Plain()]),
    "a class that makes no schema": (schemaless, Schemaless()),
    "a metaclass that raises": (odd, OddOne()),
    "what pydantic warns of": (unpacked, 1),
    "Any": (anything, 1),
    "limits": (limited, 1),
    "a literal": (choice, "a"),
    "Self": (Model().method, Model()),
    "an object's __call__": (Model(), HOLDER),
    "a wrapped function": (wrapped, HOLDER),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_right_call_passes_and_the_arguments_beside_are_checked(name):
    target, value = CALLS[name]
    check_annotations(target, [value], {"count": 1})
    with pytest.raises(InvalidArguments, match="the argument count"):
        check_annotations(target, [value], {"count": "1"})


def test_an_annotation_of_the_result_is_not_looked_at():
    check_annotations(returns, [1], {})
    with pytest.raises(InvalidArguments):
        check_annotations(returns, ["1"], {})


@pytest.mark.parametrize("target", [held, plain, wrapped, many])
def test_where_pydantic_has_no_validator_the_class_counts(target):
    with pytest.raises(InvalidArguments):
        check_annotations(target, ["wrong"], {"count": 1})


def test_what_is_not_checked_is_said_once(caplog):
    def quiet(amount: Decimal, count: int): ...

    for _ in range(2):
        check_annotations(quiet, [1], {"count": 1})
    assert caplog.text.count("are not checked: amount;") == 1
