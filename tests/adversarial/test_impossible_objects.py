"""Objects that their classes cannot be: a holder of a key writes their state, and no ``__init__`` runs."""

import contextlib
import dataclasses
import enum
import functools
import gc
from dataclasses import field

import attrs
import pytest
from pydantic import BaseModel

from safedefer.errors import InvalidArguments, RejectedTask, UnencodableArgument
from safedefer.policy import Policy
from tests.zoo.exactly import assert_exact, carry_one, decode_one

HOME = __name__
POLICY = Policy(HOME)
RAN = []


class Finalized:
    def __del__(self):
        RAN.append(vars(self))


class InheritsIt(Finalized):
    pass


@dataclasses.dataclass
class FinalizedData(Finalized):
    n: int = 0


class FinalizedModel(BaseModel):
    n: int = 0

    def __del__(self):
        RAN.append(self.__dict__)


class FinalizedError(Exception):
    def __del__(self):
        RAN.append(self.args)


class FinalizedList(list):
    def __del__(self):
        RAN.append(list(self))


@attrs.define
class FinalizedAttrs(Finalized):
    n: int = 0


FINALIZED = {
    "its own": (Finalized, {"$object": {"class": f"{HOME}:Finalized", "state": {"path": "/"}}}),
    "inherited": (InheritsIt, {"$object": {"class": f"{HOME}:InheritsIt", "state": {"path": "/"}}}),
    "of a dataclass": (FinalizedData, {"$dataclass": [f"{HOME}:FinalizedData", {"n": 1}]}),
    "of a model": (FinalizedModel, {"$model": [f"{HOME}:FinalizedModel", {"n": 1}, ["n"], None, None]}),
    "of an exception": (FinalizedError, {"$exception": [f"{HOME}:FinalizedError", [], {}]}),
    "of a list": (FinalizedList, {"$object": {"class": f"{HOME}:FinalizedList", "items": [1]}}),
    "of an attrs class": (FinalizedAttrs, {"$attrs": [f"{HOME}:FinalizedAttrs", {"n": 1}]}),
}


@pytest.mark.parametrize("what", FINALIZED)
def test_no_finalizer_meets_a_state_that_a_token_wrote(what):
    cls, tree = FINALIZED[what]
    with pytest.raises(RejectedTask, match="__del__"):
        decode_one(tree, policy=POLICY)
    gc.collect()
    assert RAN == []


@pytest.mark.parametrize("what", FINALIZED)
def test_the_sender_is_told_of_the_finalizer(what):
    cls, _ = FINALIZED[what]
    with pytest.raises(UnencodableArgument, match="__del__.*; "):
        carry_one(cls(), _policy=POLICY)
    gc.collect()
    RAN.clear()


class Settings:
    """One for the process."""

    made = None

    def __new__(cls):
        if cls.made is None:
            cls.made = super().__new__(cls)
            cls.made.debug = False
        return cls.made


class Interned:
    """One for each code."""

    known = {}

    def __new__(cls, code):
        if code not in cls.known:
            cls.known[code] = super().__new__(cls)
            cls.known[code].rate = 1.0
        return cls.known[code]

    def __init__(self, code):
        self.code = code

    def __getnewargs__(self):
        return (self.code,)


class Fresh:
    """A ``__new__`` of its own that makes one each time."""

    def __new__(cls):
        self = super().__new__(cls)
        self.n = 0
        return self


SINGLE = {
    "one for the process": (Settings, {"$object": {"class": f"{HOME}:Settings", "state": {"debug": True}}}),
    "one for each argument": (lambda: Interned("EUR"), {"$object": {"class": f"{HOME}:Interned", "args": ["EUR"], "state": {"rate": 1e9}}}),
}  # fmt: skip


@pytest.mark.parametrize("what", SINGLE)
def test_a_token_does_not_change_an_object_that_the_process_has_already(what):
    make, tree = SINGLE[what]
    before = dict(vars(make()))
    with pytest.raises(RejectedTask, match="__new__ returns one object"):
        decode_one(tree, policy=POLICY)
    assert vars(make()) == before


@pytest.mark.parametrize("what", SINGLE)
def test_the_sender_is_told_of_a_singleton(what):
    make, _ = SINGLE[what]
    with pytest.raises(UnencodableArgument, match="__new__ returns one object.*; "):
        carry_one(make(), _policy=POLICY)


def test_a_new_that_makes_one_each_time_is_no_singleton():
    value = Fresh()
    value.n = 5
    assert carry_one([value, value], _policy=POLICY)[0].n == 5


class Guarded:
    level = 1

    def __init__(self):
        self.name = "x"

    def allowed(self):
        return False

    @classmethod
    def build(cls):
        return cls()

    @staticmethod
    def check():
        return False

    @functools.lru_cache  # noqa: B019
    def remembered(self):
        return False

    @functools.singledispatchmethod
    def dispatched(self, value):
        return False

    given = functools.partialmethod(dispatched, 1)

    @functools.cached_property
    def total(self):
        return 3

    @property
    def size(self):
        return 1


class GuardedList(list):
    def allowed(self):
        return False


def default(_value=None):
    return 1


@dataclasses.dataclass
class Declared:
    call: object = default
    many: list = field(default_factory=list)

    def allowed(self):
        return False


@attrs.define(slots=False)
class DeclaredAttrs:
    call: object = default

    def allowed(self):
        return False


class DeclaredModel(BaseModel):
    n: int = 0

    def allowed(self):
        return False


class Failed(Exception):
    def allowed(self):
        return False


def _object(name, **state):
    return {"$object": {"class": f"{HOME}:{name}", "state": state}}


SHADOWS = {
    "a method": _object("Guarded", allowed=1),
    "a class method": _object("Guarded", build=1),
    "a static method": _object("Guarded", check=1),
    "a method with a cache": _object("Guarded", remembered=1),
    "a method by type": _object("Guarded", dispatched=1),
    "a method with an argument": _object("Guarded", given=1),
    "a dunder": _object("Guarded", __init__=1),
    "a method of object": _object("Guarded", __reduce__=1),
    "a method of a list": {"$object": {"class": f"{HOME}:GuardedList", "items": [], "state": {"append": 1}}},
    "a method of a class built on list": {"$object": {"class": f"{HOME}:GuardedList", "items": [], "state": {"allowed": 1}}},
    "a method of a dataclass": {"$dataclass": [f"{HOME}:Declared", {"call": 1, "many": [], "allowed": 1}]},
    "a method of an attrs class": {"$attrs": [f"{HOME}:DeclaredAttrs", {"call": 1, "allowed": 1}]},
    "a method of a model": {"$model": [f"{HOME}:DeclaredModel", {"n": 1, "allowed": 1}, ["n"], None, None]},
    "a method of BaseModel": {"$model": [f"{HOME}:DeclaredModel", {"n": 1, "model_dump": 1}, ["n"], None, None]},
    "a method of an exception": {"$exception": [f"{HOME}:Failed", [], {"allowed": 1}]},
    "a method of exceptions": {"$exception": [f"{HOME}:Failed", [], {"with_traceback": 1}]},
    "a method of a built-in exception": {"$exception": ["builtins:ValueError", [], {"add_note": 1}]},
}  # fmt: skip


@pytest.mark.parametrize("what", SHADOWS)
def test_no_attribute_takes_the_place_of_a_function_of_the_class(what):
    with pytest.raises(RejectedTask, match="hides a function"):
        decode_one(SHADOWS[what], policy=POLICY)


@pytest.mark.parametrize("make", [Guarded, Declared, DeclaredAttrs, GuardedList, Failed])
def test_the_sender_is_told_of_an_attribute_that_hides_a_function(make):
    value = make()
    value.allowed = 1
    with pytest.raises(UnencodableArgument, match="allowed.* hides a function.*; "):
        carry_one(value, _policy=POLICY)


def test_declared_fields_and_what_hides_no_function_arrive():
    for value in (Declared(call=3), DeclaredAttrs(call=3), DeclaredModel(n=2)):
        assert carry_one(value, _policy=POLICY) == value
    guarded = Guarded()
    assert guarded.total == 3
    guarded.level = 5
    arrived = carry_one(guarded, _policy=POLICY)
    assert vars(arrived) == vars(guarded) == {"name": "x", "level": 5, "total": 3}


class Bits(enum.IntFlag):
    A = 1
    B = 2
    HIGH = 2**40


class Kept(enum.Flag, boundary=enum.KEEP):
    A = 1


def test_combinations_of_flags_that_tokens_write_do_not_stay_without_bound():
    made = 0
    for cls, name in ((Bits, "Bits"), (Kept, "Kept")):
        for n in range(5, 8_000):
            try:
                decode_one({"$enum": [f"{HOME}:{name}", n]}, policy=POLICY)
            except RejectedTask:
                continue
            made += 1
        assert len(cls._value2member_map_) < (5_000 if cls is Kept else 300)
    assert made > 8_000


def test_combinations_of_flags_arrive():
    for value in (Bits.A | Bits.B, Bits.A | Bits.HIGH, Bits.A | 2**3, ~Bits.A, Bits(0)):
        assert_exact(value, carry_one(value, _policy=POLICY))


class Wide(enum.IntFlag):
    A = 1
    B = 2


def test_combinations_of_integers_beyond_a_few_are_made_and_not_kept():
    """4,096 of them that tokens had made up stayed in each class for ever, and the next honest one was refused."""
    before = len(Wide._value2member_map_)
    for n in (*range(4, 3_000), *range(-3_000, -1)):
        with contextlib.suppress(RejectedTask):  # a negative number is written as the positive one
            assert decode_one({"$enum": [f"{HOME}:Wide", n]}, policy=POLICY) == n
    assert len(Wide._value2member_map_) < before + 300
    arrived = decode_one({"$enum": [f"{HOME}:Wide", 10_000]}, policy=POLICY)
    assert 10_000 not in Wide._value2member_map_
    assert (arrived, type(arrived), hash(arrived)) == (Wide(10_000), Wide, hash(Wide(10_000)))
    assert arrived | Wide.A == Wide(10_001)
    assert decode_one({"$enum": [f"{HOME}:Wide", 10_000]}, policy=POLICY) is Wide(10_000)


class Whole:
    """Its hash is of an attribute that the class has a value for."""

    size = 0

    def __hash__(self):
        return hash(self.size)

    def __eq__(self, other):
        return self.size == other.size


@dataclasses.dataclass(frozen=True)
class Part:
    whole: object


def made_of(keys):
    whole = Whole()
    part = Part(whole)
    whole.size = 5  # comes last in the token
    vars(whole).clear()
    vars(whole).update(part=part, keys=keys(part), size=5)
    return whole


@pytest.mark.parametrize(
    "keys",
    [lambda part: {part}, lambda part: frozenset([(1, part)]), lambda part: {part: 1}, lambda part: {Part(part)}],
)
def test_no_hash_runs_on_what_is_half_made_however_far_below_a_key(keys):
    """The member's hash hashed the object around the set before it had its attributes: the set arrived, and did not hold it."""
    with pytest.raises(UnencodableArgument, match="an object around it"):
        carry_one(made_of(keys), _policy=POLICY)


@pytest.mark.parametrize(
    "key", [{"$set": [{"$ref": 1}]}, {"$dict": [[{"$ref": 1}, 1]]}, {"$set": [{"$tuple": [{"$ref": 1}]}]}]
)
def test_a_token_of_such_a_key_is_refused(key):
    state = {"part": {"$dataclass": [f"{HOME}:Part", {"whole": {"$ref": 0}}]}, "keys": key, "size": 5}
    with pytest.raises(InvalidArguments, match="not finished"):
        decode_one({"$object": {"class": f"{HOME}:Whole", "state": state}}, policy=POLICY)


@dataclasses.dataclass
class Basket:
    """Has no hash, so that nothing hashes it, and holds its parts twice."""

    parts: list
    by_part: dict


def test_parts_that_lead_to_an_object_around_them_without_a_hash_are_keys():
    basket = Basket([], {})
    part = Labelled("a", basket)
    basket.parts.append(part)
    basket.by_part[part] = 1
    arrived = carry_one(basket, _policy=POLICY)
    assert arrived.by_part[arrived.parts[0]] == 1
    assert arrived.parts[0].basket is arrived


class Labelled:
    def __init__(self, label, basket):
        self.label = label
        self.basket = basket

    def __hash__(self):
        return hash(self.label)

    def __eq__(self, other):
        return self.label == other.label
