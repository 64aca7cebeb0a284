"""The fast judgement of large plain trees: one value that is not plain among thousands is found."""

import copy
import math

import jiter
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safedefer.claims import read_claims, write_json
from safedefer.codecs.fast_path import is_canonical_plain, is_plain, may_break_limits, written_plainly
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import InvalidArguments, UnencodableArgument
from safedefer.options import Limits
from safedefer.refs import UNBOUND
from tests import strategies as some
from tests.benchmarks.fidelity import VALUES
from tests.zoo import values as zoo
from tests.zoo.exactly import CODEC, POLICY, assert_exact, carry, carry_one, parse

LIMITS = Limits()
BASE = {
    "v": 1, "jti": "a" * 16, "iat": 1, "nbf": 1, "exp": 2, "aud": "e:q:t:/", "cty": "typed",
    "call": {"kind": "function", "module": "m", "qualname": "f"},
}  # fmt: skip
ODD = {
    "str subclass": zoo.MyStr("x"),
    "int subclass": zoo.MyInt(1),
    "int enum": zoo.Level.LOW,
    "str enum": zoo.Mode.FAST,
    "large int": 2**53,
    "small int": -(2**53),
    "nan": float("nan"),
    "inf": float("inf"),
    "surrogate": "\ud800",
    "tuple": (1,),
    "bytes": b"x",
    "dict subclass": zoo.MyDict(),
    "list subclass": zoo.MyList(),
    "object": zoo.Node(),
    "evil": zoo.Evil(),
    "of an evil metaclass": zoo.OfEvilMeta(),
    "$ key": {"$a": 1},
    "int key": {1: 1},
    "str subclass key": {zoo.MyStr("a"): 1},
    "evil key": {zoo.Node(): 1},
    "surrogate key": {"\ud800": 1},
}


def rows(count):
    return [{"id": i, "name": f"n{i}", "score": i / 7, "on": i % 2 == 0, "note": None} for i in range(count)]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("column", ["id", "name", "score", "on", "note", "more"])
@pytest.mark.parametrize("count", [3, 100, 1000])
def test_one_odd_value_among_many_rows_is_found(odd, column, count):
    zoo.RAN.clear()
    plain = rows(count)
    assert is_plain([plain], LIMITS)
    for index in (0, count // 2, count - 1):
        table = [*plain]
        table[index] = {**plain[index], column: ODD[odd]}
        assert not is_plain([table], LIMITS)
        assert not is_plain([[list(row.values()) for row in table]], LIMITS)
    ran, zoo.RAN[:] = list(zoo.RAN), []
    assert ran == []


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("column", ["id", "name", "score", "on", "note", "more"])
@pytest.mark.parametrize("count", [3, 100, 1000])
def test_one_odd_value_among_many_rows_is_not_written_as_if_it_were_plain(odd, column, count):
    zoo.RAN.clear()
    plain = rows(count)
    assert written_plainly([plain], {"a": plain[1:]}, LIMITS) is None  # rows that are there twice
    text = written_plainly([plain], {}, LIMITS)[0]
    assert jiter.from_json(text) == [plain]
    for index in (0, count // 2, count - 1):
        table = [*plain]
        table[index] = {**plain[index], column: ODD[odd]}
        assert written_plainly([table], {}, LIMITS) is None
        assert written_plainly([[list(row.values()) for row in table]], {}, LIMITS) is None
    ran, zoo.RAN[:] = list(zoo.RAN), []
    assert ran == []


# Without what costs a walk although it is plain: a dollar sign after a quote, and floats whose sum is infinite.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$"), max_size=8)
scalars = [st.none(), st.booleans(), st.integers(1 - 2**53, 2**53 - 1), st.floats(-1e300, 1e300), texts]
trees = st.recursive(
    st.one_of(scalars),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
#: What a column repeats: values of one type, or of several.
columns = st.one_of(*(st.lists(kind, min_size=1, max_size=3) for kind in [*scalars, st.one_of(scalars), trees, trees]))


@st.composite
def plain_tables(draw):
    """Rows enough to be judged by column, in every second table all at once; some of them with one value more."""
    repeated = draw(st.lists(columns, min_size=2, max_size=3))
    table = [
        {name: copy.deepcopy(column[row % len(column)]) for name, column in zip("abc", repeated, strict=False)}
        for row in range(draw(st.integers(16, 63) | st.integers(64, 99)))
    ]
    for row in table[:: draw(st.integers(1, 7))] if draw(st.booleans()) else ():
        row["more"] = draw(st.integers(0, 9))
    return table


@st.composite
def one_among_others(draw, table, column):
    """Any value, one that is nearly plain (by preference a kind of what is beside it), or another row's over again."""
    beside = draw(st.sampled_from(table)).get(column)
    kind = draw(st.sampled_from(["any", "odd", "a kind of", "a kind of", "again"]))
    if kind == "any":
        return draw(some.values)
    if kind == "again":
        return beside
    names = [name for name, value in ODD.items() if kind == "odd" or issubclass(type(value), type(beside))]
    return ODD[draw(st.sampled_from(names or [*ODD]))]


def is_itself(value, met):
    """The definition: plain JSON, within the numbers that all parsers agree on, no tag, and no container twice."""
    kind = type(value)
    if kind is list or kind is dict:
        if id(value) in met:
            return False
        met.add(id(value))
        names = [] if kind is list else [*value]
        if not all(type(name) is str and is_itself(name, met) and name[:1] != "$" for name in names):
            return False
        return all(is_itself(each, met) for each in (value if kind is list else value.values()))
    if kind is str:
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    if kind is int:
        return abs(value) < 2**53
    if kind is float:
        return math.isfinite(value)
    return kind is bool or value is None


@settings(max_examples=max(300, settings.default.max_examples))
@given(st.data(), plain_tables())
def test_rows_are_written_plainly_if_they_are_plain_and_not_with_one_other_value_among_them(data, table):
    for rows in (table, [list(named.values()) for named in table]):
        assert is_itself(rows, set())
        assert is_plain([rows], LIMITS)
        assert_exact([rows], jiter.from_json(written_plainly([rows], {}, LIMITS)[0]))
    column = data.draw(st.sampled_from(["a", "b", "c", "more"]))
    data.draw(st.sampled_from(table))[column] = data.draw(one_among_others(table, column))
    for rows in (table, [list(named.values()) for named in table]):
        written = written_plainly([rows], {}, LIMITS)
        if not is_itself(rows, set()):
            assert not is_plain([rows], LIMITS)
            assert written is None
        elif written is not None:  # what is plain may cost a walk
            assert_exact([rows], jiter.from_json(written[0]))


@pytest.mark.parametrize("key", ["$x", "\ud800", 1, zoo.MyStr("name"), None], ids=repr)
@pytest.mark.parametrize("count", [3, 100])
def test_one_odd_key_among_many_rows_is_found(key, count):
    for index in (0, count // 2, count - 1):
        table = rows(count)
        row = dict(table[index])
        del row["name"]
        table[index] = {key: 1, **row}
        assert not is_plain([table], LIMITS)


@pytest.mark.parametrize("count", [3, 100])
def test_a_row_that_is_there_twice_is_found_and_arrives_as_one(count):
    table = rows(count)
    table[1] = table[-1]
    assert not is_plain([table], LIMITS)
    arrived = carry_one(table)
    assert arrived[1] is arrived[-1]
    assert arrived == table


def test_rows_of_several_lengths_and_orders_are_plain():
    table = [dict(list(row.items())[: i % 5]) for i, row in enumerate(rows(200))] + [{"b": 1, "a": 2}, {"a": 2, "b": 1}]
    assert is_plain([table], LIMITS)
    assert_exact(table, carry_one(table))


def test_limits_hold_on_the_fast_path():
    assert is_plain([[0] * 99_999], LIMITS)
    assert not is_plain([[0] * 100_000], LIMITS)
    assert is_plain([[[[1]]]], Limits(depth=4))
    assert not is_plain([[[[1]]]], Limits(depth=2))
    loop = []
    loop.append(loop)
    assert not is_plain([loop], LIMITS)
    wide = [1]
    for _ in range(40):
        wide = [wide, wide]
    assert not is_plain([wide], LIMITS)


@settings(max_examples=300)
@given(st.text(alphabet='[]{}"\\,:1a', max_size=12), st.integers(0, 70))
def test_strings_full_of_brackets_do_not_hide_depth(noise, levels):
    import json

    tree = [noise, 1]
    for _ in range(levels):
        tree = [noise, tree, {noise: 1}]
    text = json.dumps({"args": [tree], "kwargs": {}}).encode()
    call = parse(text)
    if levels + 1 > 64:
        with pytest.raises(InvalidArguments):
            CODEC.decode(call, POLICY, text=text)
    elif "$" not in noise:
        assert CODEC.decode(call, POLICY, text=text).args == call.args


def test_the_hint_counts_values_whatever_the_limit():
    for count in (1, 5, 50):
        text = b'{"args":[' + b",".join([b"0"] * count) + b'],"kwargs":{}}'
        codec = TypedCodec(limits=Limits(items=count - 1))
        with pytest.raises(InvalidArguments):
            codec.decode(parse(text), POLICY, text=text)
        with pytest.raises(UnencodableArgument):
            codec.encode(CallData(UNBOUND, [0] * count, {}), POLICY)


@pytest.mark.parametrize(
    "number", ["1e308", "-1.5e-300", "123456789012345", "0.1234567890123456789", "1E5", "1e+15", "-0.0"]
)
def test_plain_numbers_need_no_walk_or_pass_it(number):
    text = f'{{"args":[{number}],"kwargs":{{}}}}'.encode()
    call = CODEC.decode(parse(text), POLICY, text=text)
    assert call.args == jiter.from_json(text)["args"]
    assert number in ("1e308", "1e+15", "-1.5e-300") or not may_break_limits(text, LIMITS)


@pytest.mark.parametrize("depth", [1, 3, 63, 64, 65, 100])
@pytest.mark.parametrize("filler", ["", "x" * 400, "x" * 20_000])
@pytest.mark.parametrize(
    ("make", "beside"),
    [(lambda inner: [inner], 0), (lambda inner: {"a": inner}, 0), (lambda inner: [{}, inner, []], 1)],
)
@pytest.mark.parametrize("place", ["args", "kwargs", "bound"])
def test_what_is_canonical_is_judged_as_by_the_walk(make, beside, filler, depth, place):
    for nested in (0, 1, 2, 3, 4, 62, 63, 64, 65, 66, 67, 99, 101):
        assert_judged_as_by_the_walk(make, beside, filler, nested, depth, place)


def assert_judged_as_by_the_walk(make, beside, filler, nested, depth, place):
    tree = 1
    for _ in range(nested):
        tree = make(tree)
    claims = BASE | {"args": [filler, 1], "kwargs": {"b": None}}
    if place == "bound":
        claims["call"] = {"kind": "method", "module": "m", "qualname": "Q", "member": "f", "bound": tree}
    elif place == "args":
        claims["args"] = [tree, filler]
    else:
        claims["kwargs"] = {"a": tree, "b": None}
    text = write_json(claims)
    read, canonical = read_claims(text)
    codec, call = (
        TypedCodec(limits=Limits(depth=depth)),
        (tree if place == "bound" else UNBOUND, read["args"], read["kwargs"]),
    )
    if nested and nested + beside > depth:
        for hint in {canonical, False}:
            with pytest.raises(InvalidArguments, match="deeper"):
                codec.decode(call, POLICY, text, hint)
    else:
        assert codec.decode(call, POLICY, text, canonical)[1:] == codec.decode(call, POLICY, text + b'"$', False)[1:]


@pytest.mark.parametrize("first", [[], [{}], [{}, {}], [{"a": 1}], [{"a": 1}, {}]])
@pytest.mark.parametrize(
    "odd",
    [
        {"$bytes": "aGk="},
        {"$object": {"class": "m:C"}},
        {"$": 1},
        {1: 2},
        {zoo.MyStr("a"): 1},
        {"\ud800": 1},
        {"$a": 1, "b": 2},
    ],
)
@pytest.mark.parametrize("count", [0, 1, 13, 14, 15, 16, 17, 40])
def test_no_row_is_taken_for_plain_because_another_is_empty(first, odd, count):
    rows = [*first, odd, *({"a": number} for number in range(count))]
    assert not is_plain([rows], LIMITS)
    assert not is_plain(rows, LIMITS)
    for bound, args, kwargs in ((UNBOUND, [rows], {}), (UNBOUND, rows, {}), (UNBOUND, [], {"a": rows}), (rows, [], {})):
        if not any(type(name) is zoo.MyStr for name in odd):
            tree = CODEC.encode(CallData(bound, args, kwargs), POLICY)
            text = write_json(
                {"bound": tree.bound if bound is not UNBOUND else None, "args": tree.args, "kwargs": tree.kwargs}
            )
            assert_exact([bound, args, kwargs], list(CODEC.decode(tree, POLICY, text=text)))


@pytest.mark.parametrize("text", ["e", "\u00e9", "\U0001f600"])
@pytest.mark.parametrize("beside", [(), ((1,),)])
def test_a_text_is_no_level_of_its_own_whatever_its_letters(text, beside):
    tree = text
    for _ in range(64):
        tree = [tree]
    assert_exact([tree, *beside], carry(tree, *beside).args)
    with pytest.raises(UnencodableArgument, match="deeper"):
        carry([tree], *beside)


@pytest.mark.parametrize("kwargs", [{"a": "$"}, {"a": {"$set": [1]}}, {"$a": 1}, {"a": [{"$": 1}]}])
def test_what_may_be_a_tag_is_not_taken_as_it_is_because_it_is_canonical(kwargs):
    text = write_json({"args": [], "kwargs": kwargs})
    assert not is_canonical_plain((UNBOUND, [], kwargs), text, LIMITS)
    kwargs = {"a": ["\n", "\\u0024", "\\"]}
    assert is_canonical_plain((UNBOUND, [], kwargs), write_json({"args": [], "kwargs": kwargs}), LIMITS)


def test_many_values_are_counted_in_what_is_canonical():
    args = list(range(10, 60))
    text = write_json({"args": args, "kwargs": {}})
    assert is_canonical_plain((UNBOUND, args, {}), text, Limits(items=60))
    assert not is_canonical_plain((UNBOUND, args, {}), text, Limits(items=49))


@pytest.mark.parametrize("label", VALUES)
def test_the_values_of_the_fidelity_table_arrive_exactly(label):
    assert_exact([VALUES[label]], carry(VALUES[label]).args)
