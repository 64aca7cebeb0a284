"""Types of third parties: their decoders are behind the same gate as every class, and no token loads them."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from safedefer.codecs import registry
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.codecs.types import attrs as attrs_types
from safedefer.errors import CapabilityExceeded, InvalidArguments, PolicyViolation, UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.unit.apps import make_app
from tests.zoo import values as zoo
from tests.zoo.exactly import parse, text_of

NAME = "tests.zoo.values:Key"
RAN = []


def decode_key(path):
    RAN.append(path)
    return zoo.Key(*path)


@pytest.fixture
def codec():
    RAN.clear()
    types = TypeRegistry()
    types.register_type(zoo.Key, "$zoo_key", lambda key: key.path, decode_key)
    return TypedCodec(registry=types)


TREE = {"$zoo_key": {"$tuple": ["a", 1]}}


def decode(codec, gate, tree=TREE):
    text = text_of(CallData(UNBOUND, [tree], {}))
    return codec.decode(parse(text), gate, text).args[0]


@pytest.mark.parametrize("policy", [Policy(NAME), Policy("tests.zoo.values"), Policy("tests.*")])
def test_an_admitted_class_travels(codec, policy):
    key = zoo.Key("a", 1)
    assert codec.encode(CallData(UNBOUND, [key], {}), policy).args == [TREE]
    assert decode(codec, policy) == key
    assert RAN == [("a", 1)]


@pytest.mark.parametrize("policy", [Policy(), Policy("tests.sample_tasks"), Policy("tests.zoo.values:Plain")])
@pytest.mark.parametrize("tree", [TREE, [TREE], {"x": TREE}, {"$dict": [[TREE, 1]]}])
def test_the_decoder_of_a_class_that_the_policy_does_not_admit_does_not_run(codec, policy, tree):
    with pytest.raises(PolicyViolation, match=f"{NAME}.*add a pattern"):
        decode(codec, policy, tree)
    with pytest.raises(UnencodableArgument, match=NAME):
        codec.encode(CallData(UNBOUND, [[zoo.Key("a", 1)]], {}), policy)
    assert RAN == []


def test_a_key_that_may_not_name_the_class_does_not_reach_its_decoder(codec):
    with pytest.raises(CapabilityExceeded):
        decode(codec, Policy("tests.*").restricted(["tests.sample_tasks"]))
    assert RAN == []
    assert decode(codec, Policy("tests.*").restricted([NAME])) == zoo.Key("a", 1)


def test_another_class_of_the_name_is_not_the_registered_one(codec, monkeypatch):
    monkeypatch.setattr(zoo, "Key", type("Key", (), {"__module__": "tests.zoo.values", "__qualname__": "Key"}))
    with pytest.raises(InvalidArguments, match="another class than the registered one"):
        decode(codec, Policy("tests.zoo.values"))
    assert RAN == []


@pytest.fixture
def asked(monkeypatch):
    """A registry whose distributions are not loaded yet, and how often one was."""
    loads = []
    point = EntryPoint("shop", "shop_types:register", "safedefer.types")
    monkeypatch.setattr(EntryPoint, "load", lambda self: loads.append(self.name) or (lambda _: None))
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])  # noqa: ARG005
    return loads


@pytest.mark.parametrize("tree", [
    {"$shop": 1}, {"$zoo_key": [1]}, {"$object": {"class": "tests.zoo.values:Plain", "state": {}}}, {"$class": "tests.zoo.values:Plain"},
    {"$dataclass": {"class": "tests.zoo.values:Point", "fields": {}}}, {"$attrs": {"class": "tests.zoo.values:Plain", "fields": {}}},
])  # fmt: skip
def test_no_token_loads_the_entry_points(asked, tree):
    codec = TypedCodec(registry=TypeRegistry(discover=True))
    try:
        decode(codec, Policy("tests.zoo.values"), tree)
    except InvalidArguments:
        pass
    assert asked == []


def test_defer_and_the_start_of_a_handler_load_them_once(asked, monkeypatch):
    types = TypeRegistry(discover=True)
    codec = TypedCodec(registry=types)
    for _ in range(2):
        with pytest.raises(UnencodableArgument):
            codec.encode(CallData(UNBOUND, [object()], {}), Policy())
    assert asked == ["shop"]
    asked.clear()
    monkeypatch.setattr("safedefer.execution.direct.REGISTRY", TypeRegistry(discover=True))
    app = make_app()
    assert asked == []
    assert app.delivery is app.delivery
    assert asked == ["shop"]


def test_attrs_is_registered_without_being_imported():
    code = "import sys, safedefer.codecs.registry as r; print(r.REGISTRY.by_tag('$attrs') is not None, 'attr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(attrs_types.find_spec("attr") is not None), "False"]
