"""A token that leaves fields out, so that their default factories run: behind the gate, within the limits, and unquoted."""

import dataclasses

import pytest

from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import InvalidArguments, RejectedTask
from safedefer.options import Limits
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo.exactly import CODEC, parse, text_of

RAN = []


def noted():
    RAN.append("factory")
    return []


def broken():
    raise ValueError("the password of the database")


@dataclasses.dataclass
class Grown:
    a: int
    tags: list = dataclasses.field(default_factory=noted)


@dataclasses.dataclass
class Broken:
    a: int
    tags: list = dataclasses.field(default_factory=broken)


GROWN = {"$dataclass": [f"{__name__}:Grown", {"a": 1}]}


def decode(tree, gate, codec=CODEC):
    text = text_of(CallData(UNBOUND, [tree], {}))
    return codec.decode(parse(text), gate, text).args[0]


@pytest.fixture(autouse=True)
def _nothing_ran():
    RAN.clear()


@pytest.mark.parametrize(
    "gate",
    [Policy(), Policy("tests.sample_tasks"), Policy("tests.*").restricted(("tests.sample_tasks",))],
    ids=["no policy", "another module's", "a limited key's"],
)
@pytest.mark.parametrize("tree", [GROWN, [GROWN], {"x": GROWN}])
def test_no_factory_of_a_class_runs_that_policy_and_key_do_not_both_admit(gate, tree):
    with pytest.raises(RejectedTask):
        decode(tree, gate)
    assert RAN == []


def test_factories_count_with_the_values_that_they_are_for():
    codec = TypedCodec(limits=Limits(items=20))
    assert len(decode([GROWN] * 5, Policy(__name__), codec)) == len(RAN) == 5
    RAN.clear()
    with pytest.raises(InvalidArguments, match="more than 20 values"):
        decode([GROWN] * 1000, Policy(__name__), codec)
    assert len(RAN) <= 20


def test_what_a_factory_raises_is_not_quoted():
    with pytest.raises(RejectedTask) as caught:
        decode({"$dataclass": [f"{__name__}:Broken", {"a": 1}]}, Policy(__name__))
    assert "password" not in str(caught.value)
