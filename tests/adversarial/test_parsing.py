"""Payloads that a holder of a key makes to hurt the parser: refused soon, by name, and never a RecursionError."""

import time
import tracemalloc

import pytest

from safedefer.codecs.typed import TypedCodec
from safedefer.errors import InvalidArguments, InvalidClaims, RejectedTask, UnresolvableCallable
from safedefer.execution.prepare import prepare
from tests.adversarial.forge import make_app, mint, post
from tests.schema import vectors

CODECS = {"typed": TypedCodec()}


@pytest.fixture(scope="module")
def app():
    app = make_app()
    app.delivery
    yield app
    app.close()


def payload(args="", kwargs="", **changes):
    text = vectors.compact(
        vectors.claims(**{"call": {"kind": "function", "module": "tests.schema.tasks", "qualname": "echo"}, **changes})
    )
    return text.replace('"args":[]', f'"args":[{args}]').replace('"kwargs":{}', f'"kwargs":{{{kwargs}}}')


def judge(app, text):
    token = vectors.mint(text).encode()
    task = app.verify(token)
    return prepare(task, CODECS)


def nested(opening, closing, depth, inner="1"):
    return opening * depth + inner + closing * depth


#: About a megabyte of token at most: three quarters of it is payload.
BIG = 700_000

#: What `re` compiles differs between versions of Python.
EITHER = (InvalidArguments, type(None))

BOMBS = {
    "lists 100,000 deep": (payload(nested("[", "]", 100_000)), InvalidClaims),
    "objects 100,000 deep": (payload(nested('{"a":', "}", 100_000)), InvalidClaims),
    "tuples 50,000 deep": (payload(nested('{"$tuple":[', "]}", 50_000)), InvalidClaims),
    "lists that never close": (payload()[:-20] + "[" * BIG, InvalidClaims),
    "objects that never close": (payload()[:-20] + '{"":' * (BIG // 4), InvalidClaims),
    "the payload itself deep": (nested("[", "]", BIG // 2), InvalidClaims),
    "lists 190 deep": (payload(nested("[", "]", 190)), InvalidArguments),
    "objects 190 deep": (payload(nested('{"a":', "}", 190)), InvalidArguments),
    "sets in sets 60 deep": (payload(nested('{"$frozenset":[', "]}", 60)), None),
    "fractions of fractions": (payload(nested('{"$fraction":[', ",1]}", 60)), InvalidArguments),
    "a megabyte of unknown members": (payload().replace("}}", "}," + ",".join(f'"m{i}":0' for i in range(BIG // 12)) + "}", 1), InvalidClaims),
    "a megabyte of equal members": (payload("{" + ",".join(['"a":0'] * (BIG // 6)) + "}"), InvalidClaims),
    "a megabyte of members": (payload("{" + ",".join(f'"{i}":0' for i in range(BIG // 10)) + "}"), None),
    "a megabyte of keyword arguments": (payload(kwargs=",".join(f'"k{i}":0' for i in range(BIG // 12))), None),
    "100,001 values": (payload(",".join(["0"] * 100_001)), InvalidArguments),
    "300,000 values": (payload(",".join(["0"] * 300_000)), InvalidArguments),
    "100,000 empty lists": (payload(",".join(["[]"] * 100_000)), None),
    "200,000 empty lists": (payload(",".join(["[]"] * 200_000)), InvalidArguments),
    "colliding keys": (payload('{"$dict":[' + ",".join(f"[{i * (2**61 - 1) % (2**53 - 1)},0]" for i in range(20_000)) + "]}"), None),
    "NaN in a million": (payload(",".join(["NaN"] * (BIG // 4))), InvalidClaims),
    "1e999": (payload("1e999"), InvalidArguments),
    "-1e999 in a list": (payload("[-1e999]"), InvalidArguments),
    "1e999 as a keyword": (payload(kwargs='"a":1e999'), InvalidArguments),
    "a float of 500,000 digits": (payload("0." + "1" * 500_000), None),
    "an exponent of 500,000 digits": (payload("1e" + "9" * 500_000), InvalidArguments),
    "an integer of 4,301 digits": (payload("9" * 4301), (InvalidClaims, InvalidArguments)),
    "an integer of 700,000 digits": (payload("9" * BIG), (InvalidClaims, InvalidArguments)),
    "an integer of 700,000 digits for a time": (payload().replace('"iat":', '"iat":' + "9" * BIG), InvalidClaims),
    "$int of 700,000 digits": (payload('{"$int":"' + "9" * BIG + '"}'), InvalidArguments),
    "$int of 4,300 digits, 150 times": (payload(",".join(['{"$int":"' + "9" * 4300 + '"}'] * 150)), None),
    "$decimal of 500,000 digits": (payload('{"$decimal":"' + "9" * 500_000 + '"}'), None),
    "$decimal of an exponent that is too large": (payload('{"$decimal":"1E+99999999999999999999"}'), InvalidArguments),
    "$fraction of two 4,300-digit numbers, 50 times": (
        payload(",".join(['{"$fraction":[{"$int":"' + "7" * 4300 + '"},{"$int":"' + "1" + "0" * 4299 + '"}]}'] * 50)),
        None,
    ),
    "$range of more than there is": (payload('{"$range":[0,{"$int":"' + "9" * 4300 + '"},1]}'), None),
    "$pattern that nests repeats": (payload('{"$pattern":["' + "(" * 300 + "a" + ")*" * 300 + '",32]}'), EITHER),
    "$pattern that repeats often": (payload('{"$pattern":["(?:(?:a{9999}){9999}){9999}",32]}'), EITHER),
    "$datetime of 500,000 characters": (payload('{"$datetime":["' + "2" * 500_000 + '",0,null]}'), InvalidArguments),
    "$zoneinfo of 500,000 characters": (payload('{"$zoneinfo":"' + "a/" * 250_000 + '"}'), InvalidArguments),
    "$uuid of 500,000 characters": (payload('{"$uuid":["' + "a" * 500_000 + '",null]}'), InvalidArguments),
    "$ip of 500,000 characters": (payload('{"$ip":["IPv6Address","' + ":" * 500_000 + '"]}'), InvalidArguments),
    "$path of 500,000 parts": (payload('{"$path":["PurePosixPath","' + "a/" * 250_000 + 'a"]}'), None),
    "$class of 500,000 characters": (payload('{"$class":"' + "a." * 250_000 + 'a:b"}'), RejectedTask),
    "$callable of 500,000 characters": (
        payload('{"$callable":{"kind":"function","module":"' + "a." * 250_000 + 'a","qualname":"b"}}'),
        InvalidArguments,
    ),
    "$ref 100,000 times to one list": (payload("[]," + ",".join(['{"$ref":0}'] * 60_000)), None),
    "exceptions that cause each other": (
        payload(nested('{"$exception":["builtins:ValueError",[],{"__cause__":', "}]}", 40, "null")),
        None,
    ),
    "a module name of 700,000 characters": (payload(call={"kind": "function", "module": "a." * (BIG // 2) + "a", "qualname": "f"}), InvalidClaims),
    "an aud of 700,000 characters": (payload(aud="a" * BIG), InvalidClaims),
    "a header of 700,000 names": (payload(headers={f"X-{i}": "" for i in range(50_000)}), None),
    "UTF-16": (payload("1").encode("utf-16"), InvalidClaims),
    "a byte order mark": ("\ufeff" + payload(), InvalidClaims),
    "a zero behind": (payload() + "\0", InvalidClaims),
    "zeros": ("\0" * BIG, InvalidClaims),
    "white space": (" " * BIG, InvalidClaims),
    "white space, then a task": (" " * BIG + payload(), None),
    "an overlong solidus": (payload('"?"').encode().replace(b"?", b"\xc0\xaf"), InvalidClaims),
    "bytes behind": (payload() + "{}", InvalidClaims),
    "a text of escapes": (payload('"' + "\\u0041" * (BIG // 6) + '"'), None),
    "lone surrogates": (payload('"' + "\\ud800" * (BIG // 6) + '"'), InvalidClaims),
    "an escaped duplicate": (payload('{"a":1,"\\u0061":1}'), InvalidClaims),
    "arguments that do not bind": (payload("1,2,3", call={"kind": "class", "module": "tests.schema.tasks", "qualname": "Receipt"}), UnresolvableCallable),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_payload_is_judged_soon_and_by_name(app, name):
    text, expected = BOMBS[name]
    began = time.process_time()
    try:
        outcome = judge(app, text)
    except RejectedTask as error:
        outcome = error
        assert len(str(error)) < 600, "the payload is not quoted"
    seconds = time.process_time() - began
    if expected is None:
        assert not isinstance(outcome, RejectedTask), outcome
    else:
        assert isinstance(outcome, expected) or (isinstance(expected, tuple) and type(None) in expected)
    assert seconds < 60.0  # it is 1 at most; what grows with the square takes hours


@pytest.mark.parametrize("name", [name for name in BOMBS if "deep" in name or "never" in name or "cause" in name])
@pytest.mark.parametrize("frames", [100, 500, 800])
def test_no_recursion_error_from_a_stack_that_is_nearly_full(app, name, frames):
    text, _ = BOMBS[name]

    def descend(left):
        return descend(left - 1) if left else attempt()

    def attempt():
        try:
            judge(app, text)
        except RejectedTask:
            pass

    try:
        descend(frames)
    except RecursionError:
        # The caller left no room to judge even the plainest task: then it is not the payload's doing.
        with pytest.raises(RecursionError):
            descend_plain(app, frames)


def descend_plain(app, frames):
    return descend_plain(app, frames - 1) if frames else judge(app, payload('{"$tuple":[]}'))


def test_every_bomb_gets_an_answer_from_the_handler(app):
    for name, (text, _) in BOMBS.items():
        status, headers, body = post(
            app,
            vectors.mint(
                text.replace("0123456789abcdef" * 2, f"{abs(hash(name)):032x}") if isinstance(text, str) else text
            ).encode(),
        )
        assert status in {200, 413, 500}, name
        assert body == f"{headers['Safedefer-Outcome']}\n".encode()


def test_a_refused_megabyte_costs_a_few_megabytes(app):
    """Only those that are refused as JSON or as claims: nothing was decoded then."""
    tokens = [vectors.mint(text).encode() for text, expected in BOMBS.values() if expected is InvalidClaims]
    for token in tokens:
        tracemalloc.start()
        with pytest.raises(InvalidClaims):
            app.verify(token)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60 * 2**20


def test_the_parser_and_the_claims_see_the_same_text(app):
    """``aud`` twice, the second time escaped: no parser may take the first, and another the last."""
    for name in ("aud", "v", "jti", "cty", "call", "args"):
        text = payload()
        escaped = "".join(f"\\u{ord(letter):04x}" for letter in name)
        doubled = text[:-1] + f',"{escaped}":' + text.split(f'"{name}":', 1)[1].split(",", 1)[0] + "}"
        with pytest.raises(InvalidClaims):
            judge(app, doubled)
    assert post(app, mint(jti="a" * 32))[0] == 200
