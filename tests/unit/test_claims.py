"""Claims and options: every one wrong in every way, and the error that says so."""

import json
from datetime import UTC, datetime, timedelta, timezone

import jiter
import orjson
import pytest
from hypothesis import given

from safedefer.claims import SHORT, Claims, callable_name, read_claims, split_audience, write_json
from safedefer.errors import (
    InvalidClaims,
    InvalidEtaError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
)
from safedefer.options import DEFAULT_URL, MAX_ETA, Options, TaskRetryOptions
from tests import strategies as some
from tests.zoo.exactly import assert_exact

CALL = {"kind": "function", "module": "shop.tasks", "qualname": "send"}
METHOD = {
    "kind": "method",
    "module": "shop.tasks",
    "qualname": "Order",
    "member": "ship",
    "bound": {"$object": ["shop.tasks:Order", {}]},
}
BASE = {
    "v": 1, "jti": "a" * 32, "iat": 1000, "nbf": 1000, "exp": 2000, "aud": "prod:default:default:/u", "cty": "typed", "call": CALL, "args": [], "kwargs": {},
}  # fmt: skip
BLOB = {"id": "b" * 32, "sha256": "0" * 64, "length": 10}
POINTER = {name: value for name, value in BASE.items() if name not in {"call", "args", "kwargs"}} | {"blob": BLOB}
ABSENT = object()


def payload(base=BASE, **changes):
    document = {name: value for name, value in (base | changes).items() if value is not ABSENT}
    return json.dumps(document, separators=(",", ":")).encode()


def refused(data, match=None):
    with pytest.raises(InvalidClaims, match=match) as caught:
        read_claims(data)
    assert "; " in str(caught.value)
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    return str(caught.value)


RIGHT = {
    "least": BASE,
    "pointer": POINTER,
    "method": BASE | {"call": METHOD},
    "pickle": BASE | {"cty": "pickle"},
    "name": BASE | {"name": "A-z_0" * 100},
    "retry of": BASE | {"retry_of": "c" * 16},
    "headers": BASE | {"headers": {"X-A": "b c", "x~": "\t~ "}},
    "trace": BASE | {"trace": f"00-{'a' * 32}-{'b' * 16}-01"},
    "retry": BASE
    | {
        "retry": {
            "min_backoff_seconds": 1,
            "max_backoff_seconds": 1,
            "task_age_limit": 2.5,
            "max_doublings": 0,
            "task_retry_limit": 2**31 - 1,
        }
    },
    "a retry that gives nothing": BASE | {"retry": {}},
    "one backoff": BASE | {"retry": {"min_backoff_seconds": 2**31 - 1}},
    "the shortest deadline": BASE | {"deadline": 1},
    "a deadline with a fraction": BASE | {"deadline": 1.5},
    "the longest deadline": BASE | {"deadline": 86_400},
    "the root of a re-run": BASE | {"retry_of": "r" * 16, "root": {"id": "r" * 16, "kid": "a"}},
    "a pointer to a re-run": POINTER
    | {"retry_of": "r" * 16, "root": {"id": "s" * 64, "kid": "a" * 64}, "retry": {}, "deadline": 1},
    "arguments": BASE | {"args": [None, True, 1.5, "\u0000é", [{"$tuple": []}]], "kwargs": {"a b": None, "": 1}},
    "a bound None": BASE | {"call": METHOD | {"bound": False}},
    "colons in the URL": BASE | {"aud": "prod:default:default:/a:b:c"},
    "root": BASE | {"aud": "a.b-C:1:2:/"},
    "longest URL": BASE | {"aud": "p:q:t:/" + "x" * 2047},
    "longest life": BASE | {"exp": 1000 + 92 * 86_400},
    "no life": BASE | {"exp": 1000},
    "last second": BASE | {"nbf": 253_402_300_799, "exp": 253_402_300_799, "iat": 253_402_300_799},
}


@pytest.mark.parametrize("label", RIGHT)
def test_right_claims_are_read_and_written_back_as_they_were(label):
    data = json.dumps(RIGHT[label], separators=(",", ":"), ensure_ascii=False).encode()
    claims, _ = read_claims(data)
    assert claims == json.loads(write_json(claims)) == RIGHT[label]
    assert read_claims(write_json(claims)) == (claims, True)


@pytest.mark.parametrize("label", RIGHT)
def test_claims_in_another_order_are_the_same_but_not_canonical(label):
    claims, canonical = read_claims(json.dumps(dict(reversed(RIGHT[label].items()))).encode())
    assert (claims, canonical) == (RIGHT[label], False)


JTI = [
    "",
    "a" * 15,
    "a" * 65,
    "a" * 16 + "\n",
    "a" * 15 + " ",
    "a" * 15 + "é",
    "a" * 15 + ".",
    1,
    None,
    [],
    {},
    True,
    ["a" * 16],
]
TIME = [-1, 1.0, 1.5, "1", True, False, None, [], {}, 2**63, 253_402_300_800, 10**4000]
WRONG = {
    "v": [0, 2, -1, "1", 1.0, True, False, None, [1], {}, 1.5, 2**64],
    "jti": JTI,
    "retry_of": JTI,
    "iat": TIME,
    "nbf": TIME,
    "exp": TIME,
    "aud": [
        "", "prod", "prod:default:default", "prod:default:default:", "prod:default:default:u", ":default:default:/u", "prod::default:/u", "prod:default::/u",
        "prod:default:default:/u\n", "prod:default:default:/u v", "prod:default:default:/é", "prod:default:default:/u\0", "prod:def_ault:default:/u", "pr od:default:default:/u",
        "prod:default:default://evil.example/u", "prod:default:default:/u?x=1", "prod:default:default:/u#x", "a" * 101 + ":default:default:/u", "prod:default:default:/" + "x" * 2048,
        "prod:default:default:http://evil.example/", "prod\n:default:default:/u", "prod:default:default:/u\x7f", 1, None, [], {}, ["prod:default:default:/u"],
    ],
    "cty": ["", "Typed", "typed\n", "json", "application/jose", 1, None, [], True],
    "name": ["", "a" * 501, "a\n", "a b", "é", "a.b", "a:b", 1, None, [], True],
    "headers": [[], "", None, {"": "a"}, {"a b": "c"}, {"a\n": "b"}, {"a:": "b"}, {"a": "b\n"}, {"a": "b\r\nc: d"}, {"a": "é"}, {"a": 1}, {"a": None}, {"a": "x" * 4097}, {"é": "a"}],
    "trace": ["", "00", f"00-{'a' * 32}-{'b' * 16}-01\n", f"00-{'A' * 32}-{'b' * 16}-01", f"00-{'a' * 31}-{'b' * 16}-01", 1, None, []],
    "args": [None, {}, "", 1, True],
    "kwargs": [None, [], "", 1, True, [["a", 1]]],
    "call": [
        None, [], "", 1, {}, "shop.tasks:send", CALL | {"kind": "lambda"}, CALL | {"kind": None}, CALL | {"module": None}, CALL | {"module": ""}, CALL | {"module": "os\0"},
        CALL | {"module": "a..b"}, CALL | {"module": "café"}, CALL | {"module": "x" * 256}, CALL | {"module": 1}, CALL | {"module": "os\n"}, CALL | {"qualname": "a.<locals>.b"}, CALL | {"qualname": ""},
        CALL | {"qualname": None}, CALL | {"member": None}, CALL | {"member": "x"}, CALL | {"bound": None}, CALL | {"bound": 1}, CALL | {"extra": 1}, METHOD | {"member": "__init__"},
        METHOD | {"member": "a.b"}, METHOD | {"member": ""}, METHOD | {"bound": None}, {k: v for k, v in METHOD.items() if k != "bound"}, {k: v for k, v in METHOD.items() if k != "member"},
        METHOD | {"kind": "classmethod"}, METHOD | {"kind": "instance"}, METHOD | {"kind": "builtin"}, METHOD | {"kind": "class"}, {k: v for k, v in CALL.items() if k != "kind"},
        {k: v for k, v in CALL.items() if k != "module"}, {k: v for k, v in CALL.items() if k != "qualname"}, CALL | {"kind": "builtin_method", "member": "append"},
    ],
    "blob": [None, [], "", BLOB],
    "retry": [
        None, [], "", 1, True, {"limit": 1}, {"": 1}, {"min_backoff_seconds": 2, "max_backoff_seconds": 1}, {"min_backoff_seconds": 2, "max_backoff_seconds": 1.5},
        *[{name: value} for name in ("min_backoff_seconds", "max_backoff_seconds", "task_age_limit", "max_doublings", "task_retry_limit") for value in (-1, None, True, "1", [], 2**31, 10**400)],
        *[{name: 1.0} for name in ("max_doublings", "task_retry_limit")], {"task_age_limit": -0.5}, {"task_age_limit": float("nan")}, {"task_age_limit": float("inf")},
    ],
    "deadline": [None, [], "", "1", True, 0, 0.5, -1, 86_401, 86_400.5, float("nan"), float("inf"), 10**400],
    "root": [None, [], "", "r" * 16, {}, {"id": "r" * 16}, {"kid": "a"}, {"id": "r" * 15, "kid": "a"}, {"id": "r" * 16 + "\n", "kid": "a"}, {"id": "r" * 16, "kid": ""},
        {"id": "r" * 16, "kid": "a\n"}, {"id": "r" * 16, "kid": "a" * 65}, {"id": "r" * 16, "kid": None}, {"id": "r" * 16, "kid": "a", "exp": 1}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_claim_that_is_wrong_in_any_way_is_refused_and_not_quoted(name, value):
    text = refused(payload(**{name: value}))
    for part in ("secret", "evil", "send"):
        assert part not in text


@pytest.mark.parametrize("blob", [
    BLOB | {"id": "b" * 15}, BLOB | {"id": 1}, BLOB | {"sha256": "0" * 63}, BLOB | {"sha256": "0" * 64 + "\n"}, BLOB | {"sha256": "A" * 64}, BLOB | {"sha256": None}, BLOB | {"length": 0},
    BLOB | {"length": -1}, BLOB | {"length": 1.0}, BLOB | {"length": True}, BLOB | {"length": "1"}, BLOB | {"extra": 1}, {"id": "b" * 32}, {}, [], "b" * 32,
])  # fmt: skip
def test_a_pointer_that_is_wrong_in_any_way_is_refused(blob):
    refused(payload(POINTER, blob=blob))


@pytest.mark.parametrize("name", ["v", "jti", "iat", "nbf", "exp", "aud", "cty", "call", "args", "kwargs"])
def test_a_missing_claim_is_refused(name):
    refused(payload(**{name: ABSENT}))


@pytest.mark.parametrize("name", ["V", "iss", "sub", "secret", "", "$ref", "__class__", "model_config", "exp "])
def test_an_unknown_claim_is_refused_and_not_named(name):
    assert "secret" not in refused(payload(**{name: 1}))


@pytest.mark.parametrize(
    "extra", [{"call": CALL}, {"args": []}, {"kwargs": {}}, {"call": CALL, "args": [], "kwargs": {}}]
)
def test_a_pointer_carries_no_call(extra):
    refused(payload(POINTER, **extra), "either call, args and kwargs, or blob")


@pytest.mark.parametrize("root", [{"id": "r" * 16, "kid": "a"}, {"id": "r" * 15}])
def test_a_root_without_a_task_that_is_run_again_is_refused(root):
    refused(payload(root=root), "retry_of" if "kid" in root else "root")
    refused(payload(POINTER, root=root), "retry_of" if "kid" in root else "root")


@pytest.mark.parametrize(("nbf", "exp"), [(1000, 999), (1000, 1000 + 92 * 86_400 + 1)])
def test_a_task_ends_after_it_is_due_and_within_92_days(nbf, exp):
    refused(payload(nbf=nbf, exp=exp), "exp must lie")


def spelled(text):
    return payload().replace(b'"kwargs":{}', text.encode() if isinstance(text, str) else text)


DEEP = "[" * 100_000
NOT_STRICT = {
    "duplicate": spelled('"kwargs":{},"v":1'), "escaped duplicate": spelled('"kwargs":{},"\\u0076":1'), "nested duplicate": spelled('"kwargs":{"a":1,"a":2}'),
    "escaped nested duplicate": spelled('"kwargs":{"a":1,"\\u0061":2}'), "deep duplicate": spelled('"kwargs":{"a":[[{"b":1,"b":1}]]}'), "NaN": spelled('"kwargs":{"a":NaN}'),
    "Infinity": spelled('"kwargs":{"a":-Infinity}'), "a huge integer": spelled('"kwargs":{"a":' + "9" * 5000 + "}"), "a megabyte of digits": spelled('"kwargs":{"a":' + "9" * 10**6 + "}"),
    "depth": spelled('"kwargs":{"a":' + DEEP + "}"), "closed depth": spelled('"kwargs":{"a":' + DEEP + "]" * 100_000 + "}"), "objects deep": spelled('"kwargs":' + '{"a":' * 100_000),
    "byte order mark": b"\xef\xbb\xbf" + payload(), "UTF-16": payload().decode().encode("utf-16"), "UTF-16 without mark": payload().decode().encode("utf-16-le"),
    "UTF-32": payload().decode().encode("utf-32"), "NUL after": payload() + b"\0", "NUL within": spelled('"kwargs":{"a":"\0"}'), "text after": payload() + b"{}", "brace after": payload() + b"}",
    "comma after": spelled('"kwargs":{},'), "comment": spelled('"kwargs":{}/**/'), "single quotes": payload().replace(b'"', b"'"), "lone surrogate": spelled('"kwargs":{"a":"\\ud800"}'),
    "raw surrogate": spelled(b'"kwargs":{"a":"\xed\xa0\x80"}'), "overlong": spelled(b'"kwargs":{"a":"\xc0\x80"}'), "Latin-1": spelled(b'"kwargs":{"a":"\xe9"}'), "tab in text": spelled('"kwargs":{"a":"\t"}'),
    "leading zero": spelled('"kwargs":{"a":01}'), "plus": spelled('"kwargs":{"a":+1}'), "bare dot": spelled('"kwargs":{"a":1.}'), "hexadecimal": spelled('"kwargs":{"a":0x1}'),
    "nothing": b"", "space": b" ", "array": b"[]", "text": b'"a"', "null": b"null", "number": b"1", "truncated": payload()[:-1], "truncated within a text": payload()[:20], "no break space": b"\xa0" + payload(),
}  # fmt: skip


@pytest.mark.parametrize("label", NOT_STRICT)
def test_what_is_no_strict_json_object_is_refused(label):
    assert "Detected" not in refused(NOT_STRICT[label], "strict JSON|not an object")


def test_audiences_that_were_taken_apart_are_forgotten_again():
    for number in range(2000):
        assert split_audience(f"e:q{number}:t:/u") == ("e", f"q{number}", "t", "/u")
    assert split_audience.cache_info().currsize <= 256


@pytest.mark.parametrize("brackets", [5, 66, 67, 190])
@pytest.mark.parametrize("filler", [[], ["x" * 20_000]])
@pytest.mark.parametrize(
    ("make", "own"),
    [(lambda inner: [inner], 2), (lambda inner: {"a": inner}, 2), (lambda inner: [{"a": [2]}, inner], 4)],
)
def test_what_nests_deeply_in_a_long_text_is_not_canonical(make, own, filler, brackets):
    tree = 0
    for _ in range(brackets - own):
        tree = make(tree)
    data = payload(args=[tree, *filler])
    assert read_claims(data) == (BASE | {"args": [tree, *filler]}, brackets <= 66 or len(data) <= SHORT)


@given(some.payloads())
def test_both_parsers_read_the_same_from_what_is_canonical(document):
    data = write_json({name: document[name] for name in Claims.__annotations__ if name in document})
    assert_exact(jiter.from_json(data), orjson.loads(data))
    assert read_claims(data)[1]


@pytest.mark.parametrize(("data", "value"), [
    (b"18446744073709551616", 18446744073709551616), (b"1e5", 1e5), (b"-0.0", -0.0), (b"9007199254740992", 2**53), (b"1.0000000000000000000001", 1.0), (b'"\\u0041"', "A"), (b" 1", 1),
])  # fmt: skip
def test_numbers_and_texts_of_other_spellings_are_read_as_they_are(data, value):
    claims, canonical = read_claims(spelled(b'"kwargs":{"a":' + data + b"}"))
    assert type(claims["kwargs"]["a"]) is type(value)
    assert claims["kwargs"]["a"] == value
    assert canonical is (data == b"-0.0")


def test_the_audience_is_taken_apart_at_the_first_three_colons():
    assert split_audience(read_claims(payload(aud="e:q:t:/a:b:c"))[0]["aud"]) == ("e", "q", "t", "/a:b:c")


def test_a_call_is_named_as_policies_name_it():
    assert callable_name(CALL) == "shop.tasks:send"
    assert callable_name(METHOD) == "shop.tasks:Order.ship"


# --- Options --------------------------------------------------------------------------------------

NOW = 1_700_000_000.5
SOON = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(("options", "error"), [
    ({"name": ""}, InvalidTaskNameError), ({"name": "a" * 501}, InvalidTaskNameError), ({"name": "a b"}, InvalidTaskNameError), ({"name": "a\n"}, InvalidTaskNameError),
    ({"name": "é"}, InvalidTaskNameError), ({"name": 3}, InvalidTaskNameError), ({"name": b"a"}, InvalidTaskNameError),
    ({"queue": ""}, InvalidTaskError), ({"queue": "a_b"}, InvalidTaskError), ({"queue": "a\n"}, InvalidTaskError), ({"queue": "a:b"}, InvalidTaskError), ({"queue": "a" * 101}, InvalidTaskError),
    ({"queue": 3}, InvalidTaskError), ({"target": ""}, InvalidTaskError), ({"target": "a/b"}, InvalidTaskError), ({"target": 3}, InvalidTaskError),
    ({"retry_options": {}}, InvalidTaskRetryOptionsError), ({"retry_options": 3}, InvalidTaskRetryOptionsError),
    ({"transactional": 1}, InvalidTaskError), ({"transactional": None}, InvalidTaskError), ({"pickle": "no"}, InvalidTaskError), ({"pickle": 0}, InvalidTaskError),
    *[({"deadline": value}, InvalidTaskError) for value in (0, 0.5, -1, 86_401, 86_400.5, float("nan"), float("inf"), 10**400, "60", True, False, timedelta(1), [])],
    ({"url": ""}, InvalidUrlError), ({"url": "u"}, InvalidUrlError), ({"url": "//evil.example/"}, InvalidUrlError), ({"url": "http://evil.example/"}, InvalidUrlError), ({"url": "/a b"}, InvalidUrlError),
    ({"url": "/a?b"}, InvalidUrlError), ({"url": "/a#b"}, InvalidUrlError), ({"url": "/é"}, InvalidUrlError), ({"url": "/a\n"}, InvalidUrlError), ({"url": "/" + "a" * 2048}, InvalidUrlError), ({"url": 3}, InvalidUrlError),
    ({"countdown": 1, "eta": SOON}, InvalidEtaError), ({"countdown": "1"}, InvalidEtaError), ({"countdown": True}, InvalidEtaError), ({"countdown": float("nan")}, InvalidEtaError),
    ({"countdown": float("inf")}, InvalidEtaError), ({"countdown": float("-inf")}, InvalidEtaError), ({"countdown": 10**400}, InvalidEtaError), ({"countdown": MAX_ETA + 1}, InvalidEtaError),
    ({"countdown": timedelta(1)}, InvalidEtaError), ({"eta": 1.0}, InvalidEtaError), ({"eta": datetime(2024, 1, 1)}, InvalidEtaError), ({"eta": "2024-01-01"}, InvalidEtaError),
    ({"headers": []}, InvalidTaskError), ({"headers": "a"}, InvalidTaskError), ({"headers": {"": "a"}}, InvalidTaskError), ({"headers": {"a b": "c"}}, InvalidTaskError), ({"headers": {1: "c"}}, InvalidTaskError),
    ({"headers": {"a": "b\r\nc: d"}}, InvalidTaskError), ({"headers": {"a": "é"}}, InvalidTaskError), ({"headers": {"a": 1}}, InvalidTaskError), ({"headers": {"a": "b", "A": "c"}}, InvalidTaskError),
    ({"headers": {"Host": "a"}}, InvalidTaskError), ({"headers": {"content-LENGTH": "1"}}, InvalidTaskError), ({"headers": {"Transfer-Encoding": "chunked"}}, InvalidTaskError),
    ({"headers": {"X-AppEngine-QueueName": "a"}}, InvalidTaskError), ({"headers": {"X-CloudTasks-TaskName": "a"}}, InvalidTaskError), ({"headers": {"Safedefer-Outcome": "a"}}, InvalidTaskError),
])  # fmt: skip
def test_an_option_that_is_wrong_is_refused_by_its_own_error(options, error):
    with pytest.raises(InvalidTaskError) as caught:
        Options(**options)
    assert type(caught.value) is error


def test_options_say_where_and_when():
    assert Options().path == DEFAULT_URL
    assert Options(url=None, queue="mail").path == "/_ah/queue/mail"
    assert Options().due(NOW) == NOW
    assert Options(countdown=60).due(NOW) == NOW + 60
    assert Options(countdown=MAX_ETA).due(NOW) == NOW + MAX_ETA
    assert Options(countdown=-60).due(NOW) == NOW
    assert Options(eta=datetime.fromtimestamp(NOW + 5, UTC)).due(NOW) == NOW + 5
    assert Options(eta=datetime(1970, 1, 2, tzinfo=timezone(timedelta(hours=5)))).due(NOW) == NOW
    assert Options(eta=datetime.min.replace(tzinfo=UTC)).due(NOW) == NOW
    assert Options(headers=None).headers == {}
    assert Options(headers={"X-A": "b"}, name="n", target="t", retry_options=TaskRetryOptions()).headers == {"X-A": "b"}


@pytest.mark.parametrize("ahead", [timedelta(days=30, seconds=1), timedelta(days=1000)])
def test_a_task_is_due_within_30_days(ahead):
    with pytest.raises(InvalidEtaError, match="30 days"):
        Options(eta=datetime.fromtimestamp(NOW, UTC) + ahead).due(NOW)
    with pytest.raises(InvalidEtaError, match="30 days"):
        Options(eta=datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))).due(NOW)


@pytest.mark.parametrize(
    "name", ["min_backoff_seconds", "max_backoff_seconds", "task_age_limit", "max_doublings", "task_retry_limit"]
)
@pytest.mark.parametrize("value", [-1, -0.5, float("nan"), float("inf"), "1", True, 2**31, 10**400, [1]])
def test_a_retry_option_is_a_number_from_zero_on(name, value):
    with pytest.raises(InvalidTaskRetryOptionsError, match=name):
        TaskRetryOptions(**{name: value})


@pytest.mark.parametrize("name", ["max_doublings", "task_retry_limit"])
def test_a_count_is_whole(name):
    with pytest.raises(InvalidTaskRetryOptionsError, match="whole"):
        TaskRetryOptions(**{name: 1.0})


def test_the_backoffs_do_not_contradict_each_other():
    with pytest.raises(InvalidTaskRetryOptionsError, match="above"):
        TaskRetryOptions(min_backoff_seconds=2, max_backoff_seconds=1)
    assert TaskRetryOptions(min_backoff_seconds=1, max_backoff_seconds=1)


def test_what_was_given_is_told_and_read_back():
    options = TaskRetryOptions(min_backoff_seconds=0.5, task_retry_limit=0)
    assert options.given() == {"min_backoff_seconds": 0.5, "task_retry_limit": 0}
    assert TaskRetryOptions.from_given(options.given()) == options
    with pytest.raises(InvalidTaskRetryOptionsError, match="unknown name"):
        TaskRetryOptions.from_given({"retries": 1})
