"""Exact or refuse, for everything that the strategies can build."""

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from safedefer.codecs.fast_path import is_plain, may_break_limits, may_hold_tags
from safedefer.codecs.typed import CallData
from safedefer.errors import InvalidArguments, PolicyViolation, UnencodableArgument, UnresolvableCallable
from safedefer.options import Limits
from safedefer.refs import UNBOUND
from tests import strategies as some
from tests.zoo import values as zoo
from tests.zoo.exactly import CODEC, POLICY, assert_exact, carry, decode_one, parse, text_of

slow = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)


def canonical(tree):
    """A tree with set members in an order of their own: a set has none."""
    if type(tree) is list:
        return [canonical(each) for each in tree]
    if type(tree) is dict:
        if len(tree) == 1 and next(iter(tree)) in ("$set", "$frozenset"):
            ((tag, members),) = tree.items()
            return {tag: sorted((canonical(each) for each in members), key=json.dumps)}
        return {key: canonical(each) for key, each in tree.items()}
    return tree


@slow
@given(some.values)
def test_a_value_arrives_equal_of_the_same_type_and_with_the_same_sharing(value):
    assert_exact([value], carry(value).args)


@slow
@given(some.shared_values())
def test_shared_and_cyclic_values_arrive_as_they_were_or_are_refused(values):
    try:
        call = carry(*values, again=values)
    except UnencodableArgument as refusal:
        assert "cycle" in str(refusal)  # noqa: PT017 - the other outcome is fine too
        return
    assert_exact((tuple(values), values), (tuple(call.args), call.kwargs["again"]))


@slow
@given(some.values, some.values)
def test_the_bound_object_and_the_arguments_share(value, other):
    call = carry(value, [other], _bound=[value, other], x=other)
    assert_exact(([value, other], value, [other], other), (call.bound, *call.args, call.kwargs["x"]))


@slow
@given(some.shared_values())
def test_encoding_what_was_decoded_gives_the_same_tree(values):
    try:
        first = CODEC.encode(CallData(UNBOUND, values, {}), POLICY)
    except UnencodableArgument:
        return
    text = text_of(first)
    arrived = CODEC.decode(parse(text), POLICY, text=text)
    again = CODEC.encode(arrived, POLICY)
    if b"set" not in text:
        assert text_of(again) == text
    elif b"$ref" not in text:
        assert canonical(again.args) == canonical(first.args)


@slow
@given(some.tagged_trees)
@example({"$object": {"class": "tests.zoo.values:Evil"}})
@example({"$set": [{"$exception": ["builtins:ValueError", [], {}]}]})
def test_any_json_decodes_or_is_refused_and_what_decodes_is_encoded_again(tree):
    zoo.RAN.clear()
    try:
        value = decode_one(tree)
    except (InvalidArguments, PolicyViolation, UnresolvableCallable):
        return
    finally:
        ran, zoo.RAN[:] = list(zoo.RAN), []
    assert ran == []
    try:
        CODEC.encode(CallData(UNBOUND, [value], {}), POLICY)
    except UnencodableArgument as refusal:
        # Decoding runs no validators, so a holder of a key can write an object that is in no state to be sent.
        assert refusal.path.startswith("$.args[0]")  # noqa: PT017


@slow
@given(some.tagged_trees, some.tagged_trees)
def test_an_untyped_tree_in_any_place_raises_nothing_else(bound, other):
    text = json.dumps({"bound": bound, "args": [other], "kwargs": {"x": other}}).encode()
    try:
        CODEC.decode(parse(text), POLICY, text=text)
    except (InvalidArguments, PolicyViolation, UnresolvableCallable) as refusal:
        assert str(refusal)  # noqa: PT017


@slow
@given(some.plain_trees)
def test_plain_json_is_itself(tree):
    call = carry(tree)
    if is_plain([tree], Limits()):
        assert CODEC.encode(CallData(UNBOUND, [tree], {}), POLICY).args[0] is tree
    assert_exact([tree], call.args)


@slow
@given(some.plain_trees)
def test_the_fast_path_never_passes_what_the_walk_refuses(tree):
    """Raw JSON, not encoded by us: integers too large, names with $."""
    text = json.dumps({"args": [tree], "kwargs": {}}).encode()
    call = parse(text)
    by_walk = by_hint = None
    try:
        by_walk = CODEC.decode(call, POLICY, text=text + b'"$')
    except InvalidArguments:
        by_walk = "refused"
    try:
        by_hint = CODEC.decode(call, POLICY, text=text)
    except InvalidArguments:
        by_hint = "refused"
    assert (by_walk == "refused") == (by_hint == "refused")
    if by_walk != "refused":
        assert_exact(by_walk.args, by_hint.args)


@given(st.lists(st.floats(allow_nan=False) | st.integers(-(2**70), 2**70), min_size=1))
def test_the_hint_finds_every_number_that_is_not_plain(numbers):
    text = json.dumps(numbers).replace("Infinity", "1e999").encode()
    if not is_plain(json.loads(text), Limits()):
        assert may_break_limits(text, Limits())


@given(st.text(), st.integers(0, 3))
def test_the_hint_finds_every_escaped_tag(name, ascii_only):
    text = json.dumps({"$" + name: 1}, ensure_ascii=bool(ascii_only)).replace("$", "\\u0024" if ascii_only > 1 else "$")
    assert may_hold_tags(text.encode("utf-8", "surrogatepass"))


@slow
@given(some.values, st.sampled_from([1, 2, 5, 20]), st.sampled_from([1, 2, 3]))
def test_what_one_limit_refuses_the_other_end_refuses_too(value, items, depth):
    """What passes the encoder under a limit passes the decoder under the same limit."""
    from safedefer.codecs.typed import TypedCodec

    codec = TypedCodec(limits=Limits(items=items, depth=depth))
    try:
        sent = codec.encode(CallData(UNBOUND, [value], {}), POLICY)
    except UnencodableArgument:
        return
    text = text_of(sent)
    codec.decode(parse(text), POLICY, text=text)


@pytest.fixture(autouse=True)
def clean_notes():
    zoo.RAN.clear()
    yield
    zoo.RAN.clear()
