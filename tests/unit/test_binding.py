from __future__ import annotations

import inspect
import operator
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer.execution.binding import _MAX_FITTING, _shape_of, check_binds, signature_of


def plain(a, b=1): ...
def keyword(a, *, b, c=2): ...
def positional(a, b=1, /, c=3): ...
def many(a, *rest, b=0, **named): ...
def anything(*args, **kwargs): ...
def nothing(): ...


class Owner:
    def __init__(self, a, *, b=1): ...

    def method(self, a, *, b=1): ...

    @classmethod
    def make(cls, a=1): ...

    def __call__(self, a): ...


TARGETS = [
    plain,
    keyword,
    positional,
    many,
    anything,
    nothing,
    Owner,
    Owner(1).method,
    Owner.make,
    Owner(1),
    operator.add,
    [].append,
]
NAMES = st.dictionaries(st.sampled_from(["a", "b", "c", "d", "self", "cls", "rest"]), st.integers(), max_size=4)


@given(st.sampled_from(TARGETS), st.lists(st.integers(), max_size=4), NAMES)
def test_check_binds_agrees_with_the_signature(target, args, kwargs):
    try:
        inspect.signature(target).bind(*args, **kwargs)
    except TypeError as error:
        # A keyword named like the method's own first parameter is refused as the call itself would refuse it.
        expected = "argument|parameter" if "self" in kwargs or "cls" in kwargs else f"^{re.escape(str(error))}$"
        with pytest.raises(TypeError, match=expected):
            check_binds(target, args, kwargs)
    else:
        check_binds(target, args, kwargs)


def test_a_built_in_without_a_signature_takes_anything():
    assert signature_of(dict.fromkeys)[0] is not None
    target = {}.update
    with pytest.raises(ValueError, match="signature"):
        inspect.signature(target)
    check_binds(target, [1, 2, 3], {"a": 1})
    assert signature_of(target) == (None, 0)


def test_the_parameters_before_the_callers_own_are_counted():
    assert signature_of(Owner(1).method)[1] == 1
    assert signature_of(plain)[1] == 0


def test_what_fitted_is_remembered_by_function_and_the_memory_is_bounded():
    def one(a, **named): ...

    def same_name(a, b, **named): ...

    same_name.__name__ = same_name.__qualname__ = one.__name__
    for number in range(300):
        check_binds(one, [1], {f"k{number}": 1})
    check_binds(one, [1], {})
    for target, args in ((one, []), (one, [1, 2]), (same_name, [1])):
        for _ in range(2):
            with pytest.raises(TypeError):
                check_binds(target, args, {})
    shape, _ = _shape_of(one)
    assert len(shape.fitting) == _MAX_FITTING


def test_a_name_that_only_equals_one_that_fitted_is_not_taken_for_it():
    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other):
            return True

    def one(a, *, b): ...

    check_binds(one, [1], {Name("b"): 1})
    shape, _ = _shape_of(one)
    assert shape.fitting == set()
