"""Arguments whose work is out of proportion to their size: refused by count, on both ends, before it is done."""

import dataclasses
import json
import re
import time
from collections import deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from typing import Generic, TypeVar

import pytest
from pydantic import BaseModel, Field, create_model

from safedefer.codecs import type_arguments
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import InvalidArguments, UnencodableArgument
from safedefer.options import Limits
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo.exactly import assert_exact, parse, text_of

PRIME = 2**61 - 1
POLICY = Policy(__name__)
CODEC = TypedCodec()


@dataclasses.dataclass(frozen=True)
class Pair:
    left: object = None
    right: object = None


class Constant:
    """Hashes like every other one of its kind."""

    def __init__(self, n):
        self.n = n

    def __eq__(self, other):
        return self.n == other.n

    def __hash__(self):
        return 1


Wide = dataclasses.make_dataclass(
    "Wide",
    [(f"field{n}", list, dataclasses.field(default_factory=list)) for n in range(50)],
    namespace={"__module__": __name__},
)
WideModel = create_model(
    "WideModel", __module__=__name__, **{f"field{n}": (list, Field(default_factory=list)) for n in range(50)}
)
WideTuple = namedtuple("WideTuple", [f"field{n}" for n in range(50)], defaults=[0] * 50)  # noqa: PYI024
T = TypeVar("T")


class Page(BaseModel, Generic[T]):
    items: list[T] = []


class Box(Generic[T]):
    pass


def named(name):
    return {"$class": name}


def alias(origin, *args):
    return {"$generic_alias": {"$tuple": [named(origin), {"$tuple": [*args]}]}}


def page(*args):
    return {"$model": [[f"{__name__}:Page", *args], {"items": []}, [], None, None]}


def pair(left, right):
    return {"$dataclass": [f"{__name__}:Pair", {"left": left, "right": right}]}


def doubling(levels):
    """Pairs by number, each of which has the one before it on both sides."""
    return [pair(None, None), *(pair({"$ref": n}, {"$ref": n}) for n in range(levels))]


def decode(*trees):
    text = json.dumps({"args": trees, "kwargs": {}}).encode()
    return CODEC.decode(parse(text), POLICY, text=text)


def send(*args):
    return CODEC.encode(CallData(UNBOUND, args, {}), POLICY)


def integer(n):
    return {"$int": str(n)} if abs(n) > 2**53 - 1 else n


ATTACKS = {
    "a hash that doubles with each pair": [*doubling(26), {"$set": [{"$ref": 26}]}],
    "a hash that doubles, as a key": [*doubling(26), {"$dict": [[{"$ref": 26}, 1]]}],
    "a hash that doubles, inside a frozen set": [*doubling(26), {"$set": [{"$frozenset": [{"$tuple": [{"$ref": 26}]}]}]}],
    "sharing that unfolds without a hash": doubling(26),
    "lists that unfold": [[], *([{"$ref": n}, {"$ref": n}] for n in range(26))],
    "one long list, 400 times": [[0] * 400, [{"$ref": 0}] * 400],
    "deques one in the other, by number": [{"$deque": [None]}, *({"$deque": [None, {"$ref": n}]} for n in range(200))],
    "objects one in the other, by number": [pair(None, None), *(pair({"$ref": n}, None) for n in range(200))],
    "integers of one hash": [{"$set": [integer(n * PRIME) for n in range(3_000)]}],
    "integers of one hash, in a frozen set": [{"$frozenset": [integer(n * PRIME) for n in range(3_000)]}],
    "integers of one hash, as keys": [{"$dict": [[integer(n * PRIME), 0] for n in range(3_000)]}],
    "integers of one hash, counted": [{"$counter": [[integer(n * PRIME), 0] for n in range(3_000)]}],
    "integers of one hash, in order": [{"$ordereddict": [[integer(n * PRIME), 0] for n in range(3_000)]}],
    "integers of one hash, with a default": [{"$defaultdict": [None, *([integer(n * PRIME), 0] for n in range(3_000))]}],
    "negative ones": [{"$set": [integer(-n * PRIME) for n in range(3_000)]}],
    "decimals of one hash": [{"$set": [{"$decimal": f"{n * PRIME}"} for n in range(3_000)]}],
    "fractions of one hash": [{"$set": [{"$fraction": [integer(n * PRIME), 1]} for n in range(2, 3_000)]}],
    "pairs of one hash": [{"$set": [{"$tuple": [integer(n * PRIME), 0]} for n in range(3_000)]}],
    "pairs of pairs of one hash": [{"$set": [{"$tuple": [{"$frozenset": [integer(n * PRIME)]}]} for n in range(3_000)]}],
    "objects that say one hash": [{"$set": [{"$object": {"class": f"{__name__}:Constant", "state": {"n": n}}} for n in range(3_000)]}],
    "a case-insensitive range of everything": [{"$pattern": ["[\\x00-\\U0010ffff]" * 60, 34]}] * 16,
    "the same, by a flag inside": [{"$pattern": ["(?i)" + "[\\x00-\\U0010ffff]" * 60, 34]}] * 16,
    "the same, for a part": [{"$pattern": ["(?i:" + "[\\x00-\\U0010ffff]" * 50 + ")", 32]}] * 16,
    "the same, with the characters themselves": [{"$pattern": ["[\x01-\U0010ffff]" * 200, 34]}] * 16,
    "the same, in octal and by name": [{"$pattern": ["[\\0-\\U0010fffe]" * 60, 34]}] * 8 + [{"$pattern": ["[\\N{SPACE}-\\U0010fffe]" * 30, 34]}] * 8,
    "ranges of everything in any case": [{"$pattern": ["[\\x00-\\uffff]" * 70 + str(n), 32]} for n in range(16)],
    "the same, beyond the first plane": [{"$pattern": ["[\x00-\U0010fffe]" * 200 + str(n), 32]} for n in range(16)],
    "the same, negated": [{"$pattern": ["[^\\x00-\\U0010fffe]" * 50, 34]}] * 16,
    "fields with defaults that are left out": [{"$dataclass": [f"{__name__}:Wide", {}]}] * 2_100,
    "the same, of a model": [{"$model": [f"{__name__}:WideModel", {}, [], None, None]}] * 2_100,
    "the same, of a named tuple": [{"$namedtuple": [f"{__name__}:WideTuple"]}] * 2_100,
    "a generic model of many classes": [page(alias("builtins:tuple", *[named("builtins:int")] * 40))],
    "the same, at all depths": [page(*[alias("builtins:tuple", *[alias("builtins:list", named("builtins:int"))] * 20)])],
    "an alias of many classes": [alias(f"{__name__}:Box", alias("builtins:tuple", *[named("builtins:int")] * 40))],
    "many generic models": [page(alias("builtins:tuple", *[named("builtins:int")] * n)) for n in range(1, 31)]
    + [page(alias("builtins:tuple", *[named("builtins:str")] * n)) for n in range(1, 31)],
}  # fmt: skip


@pytest.mark.parametrize("what", ATTACKS)
def test_a_token_is_refused_before_it_makes_more_work_than_its_values(what):
    began = time.process_time()
    with pytest.raises(InvalidArguments):
        decode(*ATTACKS[what])
    assert time.process_time() - began < 60.0  # it is 1 at most, and thousands of times less than it would be


def deep(count):
    inner = deque()
    made = [inner]
    for _ in range(count):
        inner = deque([inner])
        made.append(inner)
    return made


def pairs(levels):
    made = [Pair()]
    for _ in range(levels):
        made.append(Pair(made[-1], made[-1]))
    return made


SENT = {
    "sharing that unfolds": lambda: pairs(26),
    "lists that unfold": lambda: [shared := [0] * 400, [shared] * 400],
    "deques one in the other": lambda: deep(200),
    "integers of one hash": lambda: [{n * PRIME for n in range(300)}],
    "decimals of one hash": lambda: [{Decimal(n * PRIME) for n in range(300)}],
    "fractions of one hash, as keys": lambda: [{Fraction(n * PRIME): 0 for n in range(300)}],
    "objects that say one hash": lambda: [frozenset(map(Constant, range(300)))],
    "a case-insensitive range of everything": lambda: [re.compile("[\x00-\U0010ffff]", re.IGNORECASE)],
}


@pytest.mark.parametrize("what", SENT)
def test_the_sender_is_told(what):
    with pytest.raises(UnencodableArgument) as caught:
        send(*SENT[what]())
    assert caught.value.path.startswith("$.args[")
    assert "; " in str(caught.value), "a remedy"


def ring():
    a = [1, 2]
    a.append([a, [a]])
    return a


shared = [1, 2, 3]
FINE = {
    "sharing": lambda: [shared, [shared] * 1_000, {"a": shared}],
    "cycles": lambda: [ring(), [ring()]],
    "pairs of pairs": lambda: pairs(12),
    "a set of what is shared": lambda: [Pair(1, 2), {Pair(Pair(1), Pair(1)), Pair()}],
    "some integers of one hash": lambda: [{n * PRIME for n in range(20)}, {1, 1 + PRIME}],
    "the same number in many sets": lambda: [[{1, 2}, {1, 2}]] * 3,
    "some objects that say one hash": lambda: [set(map(Constant, range(10)))],
    "many integers": lambda: [set(range(20_000)), dict.fromkeys(range(20_000))],
    "letters of any case": lambda: [re.compile("[a-z0-9_]+@[a-z-]+", re.IGNORECASE)] * 8,
    "any characters, the case of which counts": lambda: [re.compile("[\x00-\U0010ffff]")],
    "deep": lambda: [deep(40)[-1]],
}


@pytest.mark.parametrize("what", FINE)
def test_what_people_send_arrives(what):
    args = FINE[what]()
    call = send(*args)
    text = text_of(call)
    arrived = CODEC.decode(parse(text), POLICY, text=text)
    if "objects" not in what and "pattern" not in what:
        assert_exact(list(args), list(arrived.args))


@pytest.mark.parametrize("items", [10, 11, 12, 13, 14, 30])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_both_ends_count_alike(items, depth):
    """What the sender lets pass, the handler lets pass, at every limit."""
    limited = TypedCodec(limits=Limits(items=items, depth=depth))
    inner = [1, 2]
    for args in (
        [inner, [inner, inner]],
        [[inner], [[inner]]],
        [deque([inner]), (inner, inner)],
        [{"a": inner}, inner],
    ):
        try:
            call = limited.encode(CallData(UNBOUND, args, {}), POLICY)
        except UnencodableArgument:
            text = text_of(CODEC.encode(CallData(UNBOUND, args, {}), POLICY))
            with pytest.raises(InvalidArguments):
                limited.decode(parse(text), POLICY, text=text)
            continue
        text = text_of(call)
        assert_exact(args, list(limited.decode(parse(text), POLICY, text=text).args))


BROKEN_ERRORS = [
    ["builtins:UnicodeDecodeError", ["utf-8", {"$bytes": "YWJj"}, 0, 10**9, "x"], {}],
    ["builtins:UnicodeDecodeError", ["utf-8", {"$bytes": "YWJj"}, -5, 2, "x"], {}],
    ["builtins:UnicodeDecodeError", ["utf-8", {"$bytes": "YWJj"}, 3, 1, "x"], {}],
    ["builtins:UnicodeEncodeError", ["utf-8", "abc", 1, 2**53 - 1, "x"], {}],
    ["builtins:UnicodeTranslateError", ["abc", 1, 2**40, "x"], {}],
    ["builtins:UnicodeTranslateError", ["abc", 0, 1, "x"], {"end": 2**40}],
    ["builtins:UnicodeDecodeError", ["utf-8", {"$bytes": "YWJj"}, 0, 1, "x"], {"start": 2**40}],
    ["builtins:UnicodeDecodeError", ["utf-8", {"$bytes": "YWJj"}, 0, 3, "x"], {"object": {"$bytes": ""}}],
]


@pytest.mark.parametrize("payload", BROKEN_ERRORS, ids=str)
def test_the_offsets_of_a_decoded_unicode_error_lie_within_its_object(payload):
    with pytest.raises(InvalidArguments):
        decode({"$exception": payload})


def test_a_unicode_error_arrives():
    for error in (
        UnicodeDecodeError("utf-8", b"abc", 0, 3, "x"),
        UnicodeEncodeError("utf-8", "abc", 1, 2, "x"),
        UnicodeTranslateError("abc", 1, 3, "x"),
        UnicodeDecodeError("utf-8", b"", 0, 0, "x"),
    ):
        (arrived,) = decode(*send(error).args).args
        assert (type(arrived), arrived.args) == (type(error), error.args)


def test_generic_models_of_a_key_holder_keep_nobody_from_theirs_and_are_not_kept(monkeypatch):
    """Of 256 in all, and then no more: every other task with a new one failed, in this process and for good."""
    registry = TypeRegistry(discover=True)
    codec = TypedCodec(registry=registry)
    monkeypatch.setattr(type_arguments, "_MOST", 4)

    def arrive(*trees):
        text = json.dumps({"args": trees, "kwargs": {}}).encode()
        return codec.decode(parse(text), POLICY, text=text).args

    made = [arrive(page(alias("builtins:tuple", *[named("builtins:int")] * n)))[0] for n in range(1, 9)]
    assert len(registry.generics) == 4
    assert len(registry.plans) == 4
    again = arrive(page(alias("builtins:tuple", named("builtins:int"))))[0]
    assert type(again) is type(made[0]), "it has an object, and is the same class"
    with pytest.raises(InvalidArguments) as caught:
        arrive(*(page(alias("builtins:tuple", *[named("builtins:bytes")] * n)) for n in range(1, 31)), *(
            page(alias("builtins:tuple", *[named("builtins:bool")] * n)) for n in range(1, 5)
        ))  # fmt: skip
    assert not caught.value.is_final, "the next attempt makes more"
