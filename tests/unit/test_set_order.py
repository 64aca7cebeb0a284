"""Equal sets are written alike, in any process: so calls with equal sets are the same call to ``unique``."""

import json
import os
import subprocess
import sys
import uuid
from contextlib import closing
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path

import pytest

from safedefer import Limits
from safedefer.codecs.typed import TypedCodec
from safedefer.errors import UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests import sample_tasks
from tests.unit.apps import make_app

ROOT = Path(__file__).resolve().parents[2]
GATE = Policy(__name__)
WORDS = [f"word {number}" for number in range(12)]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Names(set):
    pass


class FrozenNames(frozenset):
    __slots__ = ()


@dataclass(frozen=True)
class Pair:
    left: str
    right: object


class Node:
    """Is equal to any node of its name; counted for ``$ref``."""

    def __init__(self, name, below):
        self.name = name
        self.below = below

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        return self.name == other.name


def values(words):
    """Return values that are equal for all orders of the words."""
    shared = ["shared"]
    return {
        "strings": set(words),
        "frozenset": frozenset(words),
        "mixed": {*words, 1, 2.5, None, b"bytes"},
        "large integers": {2**70, 2**69, 3},
        "lone surrogates": {"\ud800", "a", "\udfff"},
        "tuples": {(word, 1) for word in words},
        "nested": {frozenset({(word, frozenset({word, "x", "y"}))}) for word in words},
        "subclass": Names(words),
        "subclass of frozenset": {FrozenNames({word, "x"}) for word in words},
        "in a dict": {"a": [set(words)], "b": {1: set(words)}},
        "enum": set(Colour),
        "scalars": {date(2026, 1, 1), timedelta(1), Decimal(1), uuid.UUID(int=5), *words},
        "dataclasses": {Pair(word, (word, frozenset(words))) for word in words},
        "objects that share": {Node(word, shared) for word in words},
        "objects that hold sets": {Node(word, {word, "x", "y"}) for word in words},
    }


def text(value):
    return json.dumps(TypedCodec().encode((UNBOUND, (value,), {}), GATE).args)


def texts():
    return {name: text(value) for name, value in values(WORDS).items()}


@pytest.fixture(scope="module")
def others():
    """The texts of three other processes, whose strings have other hashes."""
    code = "import json; from tests.unit.test_set_order import texts; print(json.dumps(texts()))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]  # fmt: skip
    return [json.loads(run) for run in runs]


@pytest.mark.parametrize("name", sorted(values(WORDS)))
def test_equal_sets_are_written_alike_in_any_process_and_however_they_were_made(name, others):
    mine = texts()[name]
    assert [other[name] for other in others] == [mine] * 3
    assert text(values(WORDS[::-1])[name]) == mine


def test_objects_that_share_arrive_as_they_were():
    value = values(WORDS)["objects that share"]
    codec = TypedCodec()
    trees = codec.encode((UNBOUND, (value,), {}), GATE)
    (back,) = codec.decode(trees, GATE, json.dumps([*trees.args]).encode()).args
    assert back == value
    assert len({id(node.below) for node in back}) == 1


def test_a_set_that_holds_itself_by_way_of_a_member_is_written():
    names = set()
    names.update({Node("a", names), Node("b", names)})
    assert text(names).count("$ref") == 2


def test_members_by_themselves_are_counted_together():
    """Each of a hundred members goes through all of a list: what that costs is bounded, and nothing is refused for it."""
    shared = list(range(50))
    many = {Node(f"{number}", shared) for number in range(100)}
    codec = TypedCodec(limits=Limits(items=2_000))
    with pytest.raises(UnencodableArgument, match="more than 2000 values"):  # unfolded, they are too many
        codec.encode((UNBOUND, (many,), {}), GATE)
    assert TypedCodec(limits=Limits(items=10_000)).encode((UNBOUND, (many,), {}), GATE)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (({0, 8},), ({8, 0},)),
        (([{1: {0, 8}}],), ([{1: {8, 0}}],)),
        ((frozenset({(0, 8), (8, 0)}),), (frozenset({(8, 0), (0, 8)}),)),
        ((Names([0, 8]),), (Names([8, 0]),)),
    ],
)
def test_unique_calls_with_equal_sets_are_one_task(first, again):
    with closing(make_app(policy=Policy("tests.sample_tasks", __name__))) as app:
        task = app.options(unique=True, countdown=60).defer(sample_tasks.add, *first)
        assert app.options(unique=True).defer(sample_tasks.add, *again).id == task.id
        assert app.options(unique=True).defer(sample_tasks.add, [0, 8]).id != task.id


def test_the_order_of_keywords_that_share_does_not_matter():
    shared = [1]
    with closing(make_app()) as app:
        task = app.options(unique=True, countdown=60).defer(sample_tasks.add, a=shared, b=shared)
        assert app.options(unique=True).defer(sample_tasks.add, b=shared, a=shared).id == task.id
        assert app.options(unique=True).defer(sample_tasks.add, a=[1], b=[1]).id != task.id
