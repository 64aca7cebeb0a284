"""Registered types: third parties' classes without pickle."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from safedefer.codecs import registry
from safedefer.codecs.registry import CORE_TAGS, TypeRegistry
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.codecs.types import attrs as attrs_types
from safedefer.errors import ConfigurationError, InvalidArguments, UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo import values as zoo
from tests.zoo.exactly import assert_exact, carry, decode_one, parse, text_of

DOC = Path(__file__).parents[2] / "docs" / "how-to" / "register-a-type.md"


def codec_with_key():
    types = TypeRegistry()
    types.register_type(zoo.Key, "$zoo_key", lambda key: key.path, lambda path: zoo.Key(*path))
    return TypedCodec(registry=types)


def test_a_registered_type_travels_and_its_reducer_does_not_run():
    zoo.RAN.clear()
    key = zoo.Key("Order", 7)
    call = carry(key, {key: [key]}, _codec=codec_with_key())
    assert call.args[0] == key
    assert next(iter(call.args[1])) is call.args[0]
    assert call.args[1][key][0] is call.args[0]
    assert zoo.RAN == []


def test_its_wire_form_is_the_tag_and_what_the_encoder_returned():
    sent = codec_with_key().encode(CallData(UNBOUND, [zoo.Key("a", 1)], {}), Policy("tests.zoo.values:Key"))
    assert sent.args == [{"$zoo_key": {"$tuple": ["a", 1]}}]


def test_a_subclass_is_not_meant():
    with pytest.raises(UnencodableArgument):
        carry(SubKey("a"), _codec=codec_with_key())


class SubKey(zoo.Key):
    pass


def test_an_unknown_tag_is_refused_at_the_end_that_did_not_register_it():
    with pytest.raises(InvalidArguments, match="register"):
        decode_one({"$zoo_key": {"$tuple": ["a"]}})


def test_a_decoder_that_returns_another_type_or_raises_is_refused():
    for decode in (lambda _: 1, lambda _: SubKey("a"), lambda _: 1 / 0):
        types = TypeRegistry()
        types.register_type(zoo.Key, "$zoo_key", lambda key: key.path, decode)
        with pytest.raises(InvalidArguments):
            decode_one({"$zoo_key": 1}, TypedCodec(registry=types))


def test_an_encoder_that_raises_or_returns_the_object_itself_is_refused():
    for encode in (lambda key: key, lambda key: [key], lambda _: 1 / 0, lambda _: object()):
        types = TypeRegistry()
        types.register_type(zoo.Key, "$zoo_key", encode, lambda _: zoo.Key())
        with pytest.raises(UnencodableArgument):
            carry(zoo.Key("a"), _codec=TypedCodec(registry=types))


@pytest.mark.parametrize("tag", ["key", "$", "$Key", "$a-b", "$a b", "$é", "$" + "a" * 65, "$a\n", *sorted(CORE_TAGS)])
def test_a_tag_that_is_malformed_or_taken_is_refused(tag):
    with pytest.raises(ConfigurationError):
        TypeRegistry().register_type(zoo.Key, tag, list, list)


def test_a_class_or_tag_registers_once_and_the_same_again_is_nothing():
    types = TypeRegistry()
    types.register_type(zoo.Key, "$a", id, id)
    types.register_type(zoo.Key, "$a", id, id)
    for cls, tag in ((zoo.Key, "$b"), (zoo.Node, "$a")):
        with pytest.raises(ConfigurationError):
            types.register_type(cls, tag, id, id)


def test_no_metaclass_code_runs_when_types_are_looked_up():
    zoo.RAN.clear()
    assert codec_with_key()._registry.by_class(zoo.OfEvilMeta) is None
    ran, zoo.RAN[:] = list(zoo.RAN), []
    assert ran == []


def register_from_entry_point(types):
    types.register_type(zoo.Key, "$from_entry_point", lambda key: key.path, lambda path: zoo.Key(*path))


def broken_entry_point(types):
    raise RuntimeError("broken")


def points(monkeypatch, *functions):
    found = [EntryPoint(name, f"{__name__}:{name}", registry.ENTRY_POINT_GROUP) for name in functions]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: found if group == "safedefer.types" else [])


def test_entry_points_are_loaded_once_and_lazily(monkeypatch):
    points(monkeypatch, "register_from_entry_point")
    types = TypeRegistry(discover=True)
    codec = TypedCodec(registry=types)
    codec.encode(CallData(UNBOUND, [1, {"a": (2,)}], {}), Policy())
    assert types._tags == {}
    assert carry(zoo.Key("a"), _codec=codec).args[0] == zoo.Key("a")
    monkeypatch.setattr(registry, "entry_points", None)
    assert types.by_tag("$from_entry_point") is not None


def test_a_broken_entry_point_is_a_configuration_error_that_names_it(monkeypatch):
    points(monkeypatch, "broken_entry_point")
    types = TypeRegistry(discover=True)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="broken_entry_point"):
            types.discover()


def test_attrs_objects_travel_by_their_tag_and_the_policy_applies():
    sent = TypedCodec().encode(CallData(UNBOUND, [zoo.AttrsFrozen(1)], {}), Policy("tests.zoo.values"))
    assert sent.args == [{"$attrs": ["tests.zoo.values:AttrsFrozen", {"a": 1}]}]
    with pytest.raises(UnencodableArgument, match="policy"):
        carry(zoo.AttrsFrozen(1), _policy=Policy())


def test_without_attrs_installed_the_tag_does_not_exist(monkeypatch):
    monkeypatch.setattr(attrs_types, "find_spec", lambda name: None)
    types = TypeRegistry(discover=True)
    assert types.by_tag("$attrs") is None


def test_the_example_of_the_guide_works(monkeypatch):
    source = "\n".join(re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL))
    module = type(sys)("the_guide")
    monkeypatch.setitem(sys.modules, "the_guide", module)
    exec(compile(source, str(DOC), "exec"), vars(module))
    policy = Policy("the_guide:Key")
    key = module.Key("Shop", 1, "Order", 7)
    codec = TypedCodec()
    text = text_of(codec.encode(CallData(UNBOUND, [key, [key]], {}), policy))
    assert b'{"$ndb_key":["Shop",1,"Order",7]}' in text
    arrived, (again,) = codec.decode(parse(text), policy, text=text).args
    assert_exact([key.flat()], [arrived.flat()])
    assert again is arrived
