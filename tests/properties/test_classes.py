"""Generated classes: an object that is accepted arrives as pickle would have brought it, or it is refused."""

import dataclasses
import os
import pickle
import sys
import typing
from types import ModuleType

import attrs
import hypothesis.strategies as st
import pytest
from hypothesis import event, given, note, settings
from pydantic import BaseModel, ConfigDict, PrivateAttr, RootModel
from pydantic.errors import PydanticUserError

from safedefer.errors import InvalidArguments, UnencodableArgument
from safedefer.policy import Policy
from tests.zoo.exactly import carry

HOME = f"{__name__}_made"
MODULE = ModuleType(HOME)
T = typing.TypeVar("T")


# --- Hooks, as people write them ------------------------------------------------------------------


def get_super(cls):
    def __getstate__(self):
        return super(cls[0], self).__getstate__()

    return __getstate__


def get_dict(cls):
    def __getstate__(self):
        return dict(getattr(self, "__dict__", {}))

    return __getstate__


def get_without(cls):
    def __getstate__(self):
        state = dict(getattr(self, "__dict__", {}))
        state.pop("b", None)
        return state

    return __getstate__


def get_tuple(cls):
    def __getstate__(self):
        return tuple(sorted(getattr(self, "__dict__", {}).items()))

    return __getstate__


def get_nothing(cls):
    def __getstate__(self):
        return None

    return __getstate__


def set_super(cls):
    def __setstate__(self, state):
        super(cls[0], self).__setstate__(state)

    return __setstate__


def set_update(cls):
    def __setstate__(self, state):
        for name, value in dict(state).items():
            object.__setattr__(self, name, value)

    return __setstate__


def new_plain(cls):
    def __new__(made, *args, **kwargs):
        base = super(cls[0], made)
        builtin = next(each for each in made.__mro__ if each in {list, dict, set, int, str, tuple, frozenset, object})
        return base.__new__(made) if builtin in {object, list, dict, set} else base.__new__(made, *args, **kwargs)

    return __new__


def newargs(cls):
    def __getnewargs__(self):
        return ()

    return __getnewargs__


def newargs_values(cls):
    def __getnewargs__(self):
        return tuple(self) if isinstance(self, tuple) else (5,)

    return __getnewargs__


def equal(cls):
    def __eq__(self, other):
        return type(self) is type(other)

    return __eq__


def call(cls):
    def __call__(self):
        return 1

    return __call__


HOOKS = {
    "__getstate__": [get_super, get_dict, get_without, get_tuple, get_nothing],
    "__setstate__": [set_super, set_update],
    "__new__": [new_plain],
    "__getnewargs__": [newargs, newargs_values],
    "__eq__": [equal],
    "__call__": [call],
}

# --- Bases ----------------------------------------------------------------------------------------


class Mixin:
    def helper(self):
        return 1


class StateMixin:
    def __getstate__(self):
        return dict(getattr(self, "__dict__", {}))


class RestoreMixin:
    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


class SlotMixin:
    __slots__ = ("s",)


class GenericBase(typing.Generic[T]):
    pass


class Proto(typing.Protocol):
    pass


class Box(BaseModel, typing.Generic[T]):
    a: T | None = None


class Plain(BaseModel):
    a: typing.Any = None


class Extra(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: typing.Any = None
    _p: typing.Any = PrivateAttr(default=3)


class Frozen(BaseModel, frozen=True):
    a: typing.Any = None


class Root(RootModel[typing.Any]):
    pass


class Pair(typing.NamedTuple):
    a: typing.Any = 1
    b: typing.Any = 2


@dataclasses.dataclass
class Data:
    a: typing.Any = 1


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedData:
    a: typing.Any = 1


@attrs.define
class Attrs:
    a: typing.Any = 1


BASES = [
    (), (Mixin,), (StateMixin,), (RestoreMixin,), (SlotMixin,), (GenericBase,), (Proto,), (typing.Generic[T],), (list,), (dict,), (set,), (int,), (str,),
    (tuple,), (frozenset,), (Exception,), (ValueError,), (Plain,), (Extra,), (Frozen,), (Root,), (Box[int],), (Box,), (Pair,), (Data,), (SlottedData,), (Attrs,),
    (Mixin, list), (StateMixin, dict), (StateMixin, Plain), (Mixin, Data), (RestoreMixin, Data), (StateMixin, SlottedData), (StateMixin, Pair),
]  # fmt: skip

DECORATORS = {
    "none": lambda cls: cls,
    "dataclass": dataclasses.dataclass,
    "frozen": dataclasses.dataclass(frozen=True),
    "slots": dataclasses.dataclass(slots=True),
    "frozen slots": dataclasses.dataclass(frozen=True, slots=True),
    "unsafe hash": dataclasses.dataclass(unsafe_hash=True),
    "attrs": attrs.define,
    "attrs frozen": attrs.frozen,
    "attrs dict": attrs.define(slots=False),
    "attrs state": attrs.define(getstate_setstate=True),
}

VALUES = st.one_of(
    st.none(), st.integers(-3, 3), st.text("ab", max_size=2), st.lists(st.integers(0, 3), max_size=2), st.sets(st.integers(0, 3), max_size=2),
    st.tuples(st.integers(0, 3)), st.dictionaries(st.integers(0, 3), st.none(), max_size=2),
)  # fmt: skip


@st.composite
def classes(draw):
    cell = [None]
    bases = draw(st.sampled_from(BASES))
    namespace = {"__module__": HOME, "__qualname__": "Made"}
    for name, forms in HOOKS.items():
        chosen = draw(st.sampled_from([None, None, None, *forms]))
        # Pickle makes a set by calling its class, whose __init__ sets what the hook left out: neither is the other's measure.
        if chosen is not None and not (name == "__getstate__" and {set, frozenset} & set(bases)):
            namespace[name] = chosen(cell)
            if name == "__eq__":
                namespace["__hash__"] = object.__hash__
    if draw(st.booleans()):
        namespace["__annotations__"] = {"a": typing.Any, "b": typing.Any}
        namespace["a"], namespace["b"] = 1, 2
    elif draw(st.booleans()):
        namespace["__slots__"] = draw(st.sampled_from([("a", "b"), ("b",), ("a", "__dict__"), ()]))
    decorator = draw(st.sampled_from(sorted(DECORATORS)))
    decorate = DECORATORS[decorator]
    hooks = {
        name: value.__qualname__.split(".")[0] for name, value in namespace.items() if name in HOOKS and callable(value)
    }
    note(f"{decorator} {bases} {hooks} {namespace.get('__slots__')} {namespace.get('__annotations__')}")
    cls = type(bases[0])("Made", bases, namespace) if bases and type(bases[0]) is not typing._GenericAlias else None
    if cls is None:
        from types import new_class

        cls = new_class("Made", bases, exec_body=lambda body: body.update(namespace))
    cls = decorate(cls)
    cell[0] = cls
    return cls


@st.composite
def objects(draw):
    try:
        cls = draw(classes())
    except (TypeError, ValueError, AttributeError, NameError, PydanticUserError):  # nobody can make such a class
        return None
    arguments = draw(st.sampled_from([(), (1,), ([1, 2],), ("ab",), (1, 2)]))
    MODULE.Made = cls
    sys.modules[HOME] = MODULE
    try:
        value = cls(*arguments)
    except Exception:
        try:
            value = cls()
        except Exception:
            return None
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", "s", "_p"]), max_size=3, unique=True)):
        try:
            setattr(value, name, draw(VALUES))
        except Exception:
            continue
    return value


def seen(value, depth=0):
    """What there is of a value, without asking it."""
    if depth > 6:
        return "..."
    kind = type(value)
    parts = [kind]
    if kind in {int, str, type(None), bool, float}:
        return kind, value
    for base in (int, str):
        if issubclass(kind, base):
            parts.append(base.__str__(value) if base is str else int.__repr__(value))
    if issubclass(kind, (list, tuple)):
        base = list if issubclass(kind, list) else tuple
        parts.append([seen(each, depth + 1) for each in base.__iter__(value)])
    if issubclass(kind, (set, frozenset)):
        base = set if issubclass(kind, set) else frozenset
        parts.append(sorted(map(repr, base.__iter__(value))))
    if issubclass(kind, dict):
        parts.append([(repr(key), seen(each, depth + 1)) for key, each in dict.items(value)])
    if issubclass(kind, BaseException):
        parts.append(seen(value.args, depth + 1))
    for each in kind.__mro__:
        for name, member in vars(each).items():
            if type(member).__name__ == "member_descriptor" and each.__module__ != "builtins":
                try:
                    held = member.__get__(value)
                except (AttributeError, TypeError):  # of the class that this one was made from
                    parts.append((name, "unset"))
                else:
                    parts.append((name, seen(held, depth + 1)))
    if hasattr(value, "__dict__"):
        parts.append(
            sorted((name, seen(each, depth + 1)) for name, each in object.__getattribute__(value, "__dict__").items())
        )
    return tuple(map(repr, parts)) if depth == 0 else parts


def rebuilt(value):
    """Return what pickle's protocol would make of an object whose own __setattr__ (attrs.frozen) refuses the last step."""
    make, args, state, items, pairs = (*value.__reduce_ex__(4), None, None, None)[:5]
    made = make(*args)
    for each in state if isinstance(state, tuple) else (state,):
        for name, held in (each or {}).items():
            object.__setattr__(made, name, held)
    assert not list(items or ()) + list(pairs or ())
    return made


#: Ten thousand every night, a thousand every day.
EXAMPLES = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 300


@given(objects())
@settings(max_examples=EXAMPLES, deadline=None)
def test_an_object_arrives_as_by_pickle_or_is_refused(value):
    if value is None:
        event("no such class or object")
        return
    try:
        (ours,) = carry(value, _policy=Policy(HOME, __name__)).args
    except UnencodableArgument:
        event("refused")
        return
    except InvalidArguments:  # a hook of the class fails: with pickle as well
        event("fails to arrive")
        with pytest.raises(Exception):  # whatever the hook raises
            pickle.loads(pickle.dumps(value, 5))
        return
    event("arrived")
    try:
        theirs = pickle.loads(pickle.dumps(value, 5))
    except attrs.exceptions.FrozenInstanceError:
        event("pickle fails at the attributes of a frozen object")
        theirs = rebuilt(value)
    except Exception:  # what pickle does not take, and we do, arrives as it was
        event("pickle does not take it")
        theirs = value
    # As it was, where hooks that a library made lose something: attrs' of a slotted base know the base's fields alone.
    assert seen(ours) in {seen(theirs), seen(value)}


class OwnGet(BaseModel):
    a: int = 0

    def __getstate__(self):
        return super().__getstate__()


class OwnSet(BaseModel):
    a: int = 0

    def __setstate__(self, state):
        super().__setstate__(state)


class OwnBoth(OwnGet):
    def __setstate__(self, state):
        super().__setstate__(state)


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedGet:
    a: int = 0

    def __getstate__(self):
        return [self.a]


@attrs.define
class AttrsSet:
    a: int = 0

    def __setstate__(self, state):
        self.a = state[1]["a"]


class RootGet(RootModel[int]):
    def __getstate__(self):
        return super().__getstate__()


class NamedArgs(Pair):
    def __getnewargs__(self):
        return (self[0],)


@pytest.mark.parametrize(
    "value", [OwnGet(a=5), OwnSet(a=5), OwnBoth(a=5), SlottedGet(5), AttrsSet(5), RootGet(5), NamedArgs(1, 2)], ids=repr
)
def test_a_hook_of_its_own_meets_the_one_that_a_library_made_or_the_object_is_refused(value):
    """The first "succeeded", and arrived with its whole state as one attribute."""
    try:
        (ours,) = carry(value, _policy=Policy(HOME, __name__)).args
    except UnencodableArgument as error:
        assert "define both" in str(error)
        return
    assert seen(ours) == seen(pickle.loads(pickle.dumps(value)))
