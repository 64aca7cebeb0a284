"""``validate="annotations"``: models whose state a key holder wrote are validated again, wherever they are in the arguments.

Without it no validator runs: the threat model says that invariants of a class are not promised.
"""

import dataclasses
import enum
import functools
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import pydantic
import pytest
from typing_extensions import TypeAliasType, TypedDict

from safedefer.errors import InvalidArguments
from safedefer.execution.annotations import check_annotations
from safedefer.policy import Policy
from tests.unit.apps import handle, make_app

RAN = []


class Account(pydantic.BaseModel):
    owner: str = pydantic.Field(alias="accountOwner", min_length=1)
    cents: int = 0
    limit: float = 1
    tags: list[str] = []
    _seen: int = pydantic.PrivateAttr(default=0)

    @pydantic.field_validator("cents")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 0:
            raise ValueError("below zero")
        return value

    @pydantic.model_validator(mode="after")
    def _within(self):
        if self.cents > 100 * self.limit:
            raise ValueError("over the limit")
        return self


class Strict(Account):
    model_config = pydantic.ConfigDict(extra="allow", frozen=True)

    @pydantic.field_validator("owner")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()


class Holder(pydantic.BaseModel):
    inner: Account
    others: dict[str, list[Account]] = {}


class Numbers(pydantic.RootModel[list[Annotated[int, pydantic.Field(ge=0)]]]):
    pass


@pydantic.dataclasses.dataclass
class Point:
    x: Annotated[int, pydantic.Field(ge=0)]
    y: int = pydantic.Field(default=0)

    def method(self) -> None: ...


@dataclasses.dataclass
class Plain:
    account: Account


class Pair(NamedTuple):
    left: Any
    right: Any


class Thing:
    def __init__(self, held):
        self.held = held


class Slotted:
    __slots__ = ("held",)


class Failed(Exception):
    pass


def caused(value):
    made = ValueError("x")
    made.__cause__ = Failed(value)
    return made


class Level(enum.Enum):
    LOW = "low"


def good(cls=Account, **more):
    return cls(accountOwner="ann", cents=50, **more)


def smuggled(cls=Account, **state):
    """Return what the decoder of the tag makes: an object with the state that a token names, past every validator."""
    made = good(cls)
    vars(made).update(state)
    return made


def smuggled_point(**state):
    point = Point(1)
    vars(point).update(state)
    return point


def slotted(held):
    made = Slotted()
    made.held = held
    return made


BAD = {
    "a value that a validator forbids": lambda: smuggled(cents=-1),
    "a value of another type": lambda: smuggled(cents="5"),
    "a value beyond a bound": lambda: smuggled(owner=""),
    "values that contradict each other": lambda: smuggled(cents=101),
    "a list of other things": lambda: smuggled(tags=[1]),
    "a value that a validator would change": lambda: smuggled(Strict, owner="ANN"),
    "a subclass where the base is annotated": lambda: smuggled(Strict, cents=-1),
    "inside another model": lambda: Holder.model_construct(inner=smuggled(cents=-1)),
    "deep inside another model": lambda: Holder(inner=good(), others={"a": [good(), smuggled(cents=-1)]}),
    "a model that is none": lambda: Holder.model_construct(inner="none"),
    "a field less": lambda: Account.model_construct(cents=1),
    "a root": lambda: Numbers.model_construct(root=[1, -1]),
    "a pydantic dataclass": lambda: smuggled_point(x=-1),
    "in an extra attribute": lambda: good(Strict, more=smuggled(cents=-1)),
}
PLACES = {
    "itself": lambda value: value,
    "list": lambda value: [0, value],
    "tuple": lambda value: (value,),
    "named tuple": lambda value: Pair(1, value),
    "dict value": lambda value: {"k": value},
    "deque": lambda value: deque([value]),
    "nested": lambda value: [{"a": (deque([[value]]),)}],
    "dataclass": Plain,
    "object": Thing,
    "slot": slotted,
    "exception": Failed,
    "cause of an exception": caused,
    "exceptions in a group": lambda value: ExceptionGroup("x", [Failed(1, value)]),
    "built-in method": lambda value: [value].append,
    "factory": lambda value: defaultdict([value].copy),
    "default": lambda value: {"k": [Thing({1: value})]},
}


def anything(value: Any) -> None: ...
def bare(value): ...
def many(*values: Any, **named: Any) -> None: ...
def accounts(value: list[Account]) -> None: ...


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("label", BAD)
def test_a_model_that_came_past_its_validators_is_refused_wherever_it_is(label, place):
    value = PLACES[place](BAD[label]())
    for target, args, kwargs in (
        (anything, (value,), {}),
        (bare, (), {"value": value}),
        (many, (1, value), {}),
        (many, (), {"x": value}),
    ):
        with pytest.raises(InvalidArguments, match="does not pass its own validators") as caught:
            check_annotations(target, args, kwargs)
        assert "ann" not in str(caught.value).replace("annotations", "")


def test_the_object_of_a_method_is_looked_at_too():
    with pytest.raises(InvalidArguments, match="own validators"):
        check_annotations(smuggled_point(x=-1).method, (), {})
    check_annotations(Point(1).method, (), {})


def test_a_set_of_models_is_looked_into():
    value = smuggled(Strict, cents=-1)
    Strict.__hash__ = lambda self: 1
    try:
        with pytest.raises(InvalidArguments, match="own validators"):
            check_annotations(anything, ({value},), {})
        with pytest.raises(InvalidArguments, match="own validators"):
            check_annotations(anything, ({value: 1},), {})
    finally:
        del Strict.__hash__


@pytest.mark.parametrize("make", [
    good, lambda: good(Strict), lambda: good(Strict, more=1), lambda: Holder(inner=good(Strict), others={"a": [good()]}), lambda: Numbers([1, 2]),
    lambda: Point(1, 2), lambda: Plain(good()), lambda: Level.LOW, lambda: Account(accountOwner="x", limit=float("inf")), lambda: object, lambda: len,
])  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_what_is_valid_stays_the_object_that_it_is(make, place):
    value = PLACES[place](make())
    before = repr(vars(value)) if hasattr(value, "__dict__") and type(value).__module__ == __name__ else repr(value)
    check_annotations(anything, (value,), {})
    after = repr(vars(value)) if hasattr(value, "__dict__") and type(value).__module__ == __name__ else repr(value)
    assert before == after


def test_sharing_and_private_state_are_untouched_and_each_object_is_validated_once():
    class Counted(pydantic.BaseModel):
        n: int

        @pydantic.field_validator("n")
        @classmethod
        def _count(cls, value: int) -> int:
            RAN.append(value)
            return value

    shared = Counted(n=1)
    account = good()
    account._seen = 7
    RAN.clear()
    value = [shared, [shared, {"a": shared}], account]
    value.append(value)
    check_annotations(anything, (value,), {})
    assert RAN == [1]
    assert value[0] is value[1][0] is value[1][1]["a"] is shared
    assert account._seen == 7


def test_a_model_of_nan_is_valid():
    check_annotations(anything, (Account(accountOwner="x", limit=float("nan"), cents=0),), {})


def test_a_subclass_goes_where_its_base_is_annotated():
    check_annotations(accounts, ([good(Strict), good()],), {})
    with pytest.raises(InvalidArguments):
        check_annotations(accounts, ([good(Strict), smuggled(Strict, owner="ANN")],), {})


def test_it_does_not_walk_into_modules_classes_and_functions():
    check_annotations(anything, ([pytest.raises, Account, len, [].append],), {})


class Broken(pydantic.BaseModel):
    n: int

    @pydantic.field_validator("n")
    @classmethod
    def _break(cls, value: int) -> int:
        if value < 0:
            raise RuntimeError("the validator itself fails")
        return value


CALLED = []


def called(value):
    CALLED.append(value)


@pytest.mark.parametrize(("validate", "cents", "outcome"), [
    ("annotations", -1, "failed"), ("annotations", 1, "succeeded"), (None, -1, "succeeded"),
])  # fmt: skip
def test_a_token_with_a_model_of_a_forbidden_state_does_not_run_where_arguments_are_validated(validate, cents, outcome):
    app = make_app(policy=Policy("tests.adversarial.test_revalidation"), validate=validate)
    CALLED.clear()
    answer = handle(app, app.serialize(called, smuggled(cents=cents)))
    assert answer.headers["Safedefer-Outcome"] == outcome
    assert len(CALLED) == (outcome == "succeeded")


def test_a_validator_that_fails_itself_is_tried_again_and_the_task_does_not_run():
    app = make_app(policy=Policy("tests.adversarial.test_revalidation"), validate="annotations")
    CALLED.clear()
    answer = handle(app, app.serialize(called, Broken.model_construct(n=-1)))
    assert (answer.status, answer.headers["Safedefer-Outcome"]) == (500, "retry")
    assert CALLED == []


class Sum(pydantic.BaseModel):
    parts: list[int] = []

    @functools.cached_property
    def total(self):
        return sum(self.parts)


def test_what_a_property_cached_is_computed_again_and_what_is_no_field_is_refused():
    value = Sum(parts=[1, 2])
    assert value.total == 3
    vars(value)["total"] = -1
    check_annotations(anything, [value], {})
    assert value.total == 3
    vars(value)["admin"] = True
    with pytest.raises(InvalidArguments, match="no field"):
        check_annotations(anything, [value], {})


class Left(TypedDict):
    of: "Left | Right | int"


class Right(TypedDict):
    of: "Left | Right | int"


class Tree(pydantic.BaseModel):
    of: Left | Right | int


Lists = TypeAliasType("Lists", "list[Lists] | Sequence[Lists] | int")
Dicts = TypeAliasType("Dicts", "dict[str, Dicts] | Mapping[str, Dicts] | int")


def of_either(value: Left | Right | int) -> None: ...
def of_lists(value: Lists) -> None: ...
def of_dicts(value: Dicts) -> None: ...


def nested(levels, leaf, wrap):
    for _ in range(levels):
        leaf = wrap(leaf)
    return leaf


RECURSIVE = {
    "typed dicts": (of_either, lambda inner: {"of": inner}, lambda value: value),
    "lists and sequences": (of_lists, lambda inner: [inner], lambda value: value),
    "dicts and mappings": (of_dicts, lambda inner: {"a": inner}, lambda value: value),
    "inside a model": (anything, lambda inner: {"of": inner}, lambda value: Tree.model_construct(of=value)),
    "inside many models": (anything, lambda inner: {"of": inner}, lambda value: [Tree.model_construct(of=value)] * 500),
}


@pytest.mark.parametrize("what", RECURSIVE)
def test_a_recursive_union_is_not_tried_in_all_ways(what):
    """Two choices at each of 17 levels took 5 to 20 seconds, and at 60 levels for ever, with the interpreter held."""
    function, wrap, place = RECURSIVE[what]
    check_annotations(function, [place(nested(3, 1, wrap))], {})
    began = time.process_time()
    with pytest.raises(InvalidArguments, match="too much work"):
        check_annotations(function, [place(nested(17, 1.5, wrap))], {})
    assert time.process_time() - began < 60.0  # it is 0.1 to 3


def test_a_large_value_of_a_recursive_type_is_valid():
    check_annotations(of_lists, [[[[n] * 10 for n in range(100)] for _ in range(20)]], {})
    check_annotations(of_lists, [nested(50, 1, lambda inner: [inner])], {})
