"""Signing and verifying: the order of the checks, the audience, the time, pointers, limits."""

import base64
import hashlib
import hmac
import json
import re

import pytest

from safedefer import claims as claims_module
from safedefer.claims import LEEWAY, write_json
from safedefer.errors import (
    BadSignature,
    CapabilityExceeded,
    ConfigurationError,
    Error,
    ExpiredTask,
    InvalidArguments,
    InvalidClaims,
    MalformedToken,
    MissingExtra,
    NotDeferrable,
    NotYetValid,
    PolicyViolation,
    RejectedTask,
    RevokedKey,
    TaskTooLargeError,
    UnencodableArgument,
    UnknownKey,
    UnknownQueueError,
    WrongAudience,
)
from safedefer.keys import Key, Keyring
from safedefer.options import Limits, Serves, Task
from safedefer.policy import Policy
from safedefer.signing import Signer, Verifier
from safedefer.task import VerifiedPointer, VerifiedTask
from tests.zoo import callables as zoo

NOW = 1_700_000_000
SECRET = bytes(range(200, 250))
OTHER = bytes(range(100, 150))
RING = Keyring(Key("a", SECRET))
POLICY = Policy(zoo.__name__)
CALL = {"kind": "function", "module": "tests.zoo.callables", "qualname": "function"}
BASE = {
    "v": 1, "jti": "a" * 32, "iat": NOW, "nbf": NOW, "exp": NOW + 100, "aud": "prod:default:default:/u", "cty": "typed", "call": CALL, "args": [1], "kwargs": {},
}  # fmt: skip


def make(**changes):
    return {name: value for name, value in (BASE | changes).items() if value is not None}


def signed(ring=RING, **changes):
    """Return a token with whatever payload a holder of the key writes."""
    return ring.sign(json.dumps(make(**changes)).encode())


def verifier(ring=RING, policy=POLICY, *, allow_pickle=False, limits=None, **serves):
    return Verifier(
        ring,
        policy,
        serves=Serves(**({"environment": "prod"} | serves)),
        allow_pickle=allow_pickle,
        limits=limits or Limits(),
    )


def verify(data, using=None, *, url="/u", now=NOW, **options):
    return (using or verifier()).verify(data, url=url, now=now, **options)


def refused(error, data, using=None, **options):
    with pytest.raises(RejectedTask) as caught:
        verify(data, using, **options)
    assert type(caught.value) is error
    assert "; " in str(caught.value)
    return caught.value


# --- The whole way --------------------------------------------------------------------------------


def test_a_signed_task_is_verified_with_all_that_it_said():
    task = dict(make(name="n", headers={"X-A": "b"}, retry_of="r" * 16))
    data = Signer(RING, POLICY, limits=Limits()).sign(task)
    done = verify(data)
    assert isinstance(done, VerifiedTask)
    assert done.claims == task
    assert done.digest == hashlib.sha256(data).digest()
    assert done.text == write_json(task)
    assert done.ref.parts == ("function", "tests.zoo.callables", "function", None)
    assert done.gate.check(done.ref) is done.ref
    assert (done.identity.task_id, done.identity.kid, done.identity.audience) == ("a" * 32, "a", BASE["aud"])
    assert done.identity.callable_name == "tests.zoo.callables:function"


def foreign(payload, secret=SECRET, kid="a"):
    parts = [
        base64.urlsafe_b64encode(p).rstrip(b"=")
        for p in (f'{{"typ":"safedefer+jwt","kid":"{kid}","alg":"HS256"}}'.encode(), payload)
    ]
    mac = hmac.new(secret, b".".join(parts), hashlib.sha256).digest()
    return b".".join([*parts, base64.urlsafe_b64encode(mac).rstrip(b"=")])


def test_a_token_minted_elsewhere_is_verified():
    assert verify(foreign(json.dumps(make(), indent=2).encode())).identity.kid == "a"


#: In the order of the checks: each token has this fault and all those below.
def ladder():
    bad = {
        "aud": "dev:default:default:/u",
        "cty": "pickle",
        "nbf": NOW - 100,
        "iat": NOW - 100,
        "exp": NOW - 50,
        "call": CALL | {"module": "os"},
    }
    ring = Keyring(
        Key("a", SECRET),
        Key("old", OTHER, "revoked"),
        Key("mail", bytes(range(60, 110)), "verify_only", queues=["mail"], patterns=["tests.*"]),
    )
    limited = Keyring(Key("mail", bytes(range(60, 110))))
    using = verifier(ring, allow_pickle=True)
    no_pickle = verifier(ring)
    own = Keyring(Key("a", SECRET, pickle=True))
    yield MalformedToken, b"x" + b"." * 5, using
    yield UnknownKey, signed(Keyring(Key("z", SECRET)), **bad | {"v": 2}), using
    yield BadSignature, signed(Keyring(Key("old", SECRET)), **bad | {"v": 2}), using
    yield RevokedKey, signed(Keyring(Key("old", OTHER)), **bad | {"v": 2}), using
    yield InvalidClaims, signed(limited, **bad | {"v": 2}), using
    yield WrongAudience, signed(limited, **bad), using
    bad["aud"] = BASE["aud"]
    yield CapabilityExceeded, signed(limited, **bad), using
    yield CapabilityExceeded, signed(RING, **bad), using
    yield PolicyViolation, signed(own, **bad), verifier(own)
    bad["cty"] = "typed"
    yield ExpiredTask, signed(**bad), no_pickle
    yield NotYetValid, signed(**bad | {"nbf": NOW + 50, "exp": NOW + 60}), no_pickle
    bad |= {"exp": NOW + 50}
    yield PolicyViolation, signed(**bad), no_pickle
    bad["call"] = CALL
    yield None, signed(**bad), no_pickle


@pytest.mark.parametrize("step", range(13))
def test_the_first_check_that_fails_is_the_one_that_is_named(step):
    error, data, using = list(ladder())[step]
    if error is None:
        assert verify(data, using)
    else:
        found = refused(error, data, using)
        early = error in (MalformedToken, UnknownKey, BadSignature, RevokedKey, InvalidClaims)
        assert (found.identity is None) is early
        assert found.authentic is (error in (InvalidClaims, ExpiredTask, NotYetValid, PolicyViolation))


def test_nothing_is_parsed_before_the_mac_has_matched(monkeypatch):
    def trap(*args, **kwargs):
        raise AssertionError("parsed")

    monkeypatch.setattr(claims_module.jiter, "from_json", trap)
    monkeypatch.setattr(claims_module.orjson, "loads", trap)
    monkeypatch.setattr("safedefer.keys.decode_segment", trap)
    data = signed()
    for forged in (data[:-43] + b"A" * 43, b"A" + data[1:], b"", b"...", b"a.b.c"):
        with pytest.raises((MalformedToken, UnknownKey, BadSignature)):
            verify(forged)
    with pytest.raises(AssertionError, match="parsed"):
        verify(data)


# --- Audience -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("aud", "serves", "options", "right"), [
    ("prod:default:default:/u", {}, {}, True), ("dev:default:default:/u", {}, {}, False), ("Prod:default:default:/u", {}, {}, False), ("prod2:default:default:/u", {}, {}, False),
    ("prod:mail:default:/u", {}, {}, True), ("prod:mail:default:/u", {"queues": ["mail"]}, {}, True), ("prod:mai:default:/u", {"queues": ["mail"]}, {}, False), ("prod:mail:default:/u", {"queues": []}, {}, False),
    ("prod:default:web:/u", {}, {}, True), ("prod:default:web:/u", {"targets": ["default"]}, {}, False), ("prod:default:web:/u", {"targets": ["web"]}, {}, True),
    ("prod:default:default:/v", {}, {}, False), ("prod:default:default:/u/", {}, {}, False), ("prod:default:default:/U", {}, {}, False), ("prod:default:default:/", {}, {}, False),
    ("prod:default:default:/v", {}, {"url": ["/u", "/v"]}, True), ("prod:default:default:/v", {}, {"url": ["/u"]}, False), ("prod:default:default:/u", {}, {"url": []}, False),
    ("prod:default:default:/a:b", {}, {"url": "/a:b"}, True), ("prod:default:default:/a:b", {}, {"url": "/a"}, False), ("prod:default:default:/a:/u", {}, {}, False),
    ("prod:mail:default:/u", {}, {"queue": "mail"}, True), ("prod:mail:default:/u", {}, {"queue": "default"}, False), ("prod:mail:default:/u", {}, {"queue": ""}, False),
    ("prod:mail:default:/u", {"queues": ["default"]}, {"queue": "mail"}, False),
])  # fmt: skip
def test_every_part_of_the_audience_must_be_ours(aud, serves, options, right):
    data = signed(aud=aud)
    if right:
        assert verify(data, verifier(**serves), **options)
    else:
        assert refused(WrongAudience, data, verifier(**serves), **options).identity.audience == aud


@pytest.mark.parametrize("serves", [{"queues": "default"}, {"targets": "default"}])
def test_queues_and_targets_are_lists(serves):
    with pytest.raises(ConfigurationError, match="lists of names"):
        Serves(environment="prod", **serves)


# --- Time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "now", "error"), [
    ({}, NOW, None), ({"nbf": NOW + LEEWAY}, NOW, None), ({"nbf": NOW + LEEWAY + 1}, NOW, NotYetValid), ({"iat": NOW + LEEWAY}, NOW, None), ({"iat": NOW + LEEWAY + 1}, NOW, NotYetValid),
    ({"nbf": NOW + LEEWAY + 1}, NOW + 0.999, NotYetValid), ({"nbf": NOW + LEEWAY + 1}, NOW + 1, None), ({"exp": NOW}, NOW + LEEWAY, None), ({"exp": NOW}, NOW + LEEWAY + 0.001, ExpiredTask),
    ({"exp": NOW}, NOW + LEEWAY + 1, ExpiredTask), ({"nbf": 0, "iat": 0, "exp": 0}, NOW, ExpiredTask), ({"iat": NOW + 1000, "nbf": NOW - 1000, "exp": NOW - 900}, NOW, NotYetValid),
])  # fmt: skip
def test_the_leeway_is_ten_seconds_to_the_edge(times, now, error):
    data = signed(**times)
    if error is None:
        assert verify(data, now=now)
    else:
        refused(error, data, now=now)


@pytest.mark.parametrize(("ahead", "after"), [(11, 2), (10.5, 1), (11.5, 2), (100, 91)])
def test_a_task_that_is_early_says_when_to_come_back(ahead, after):
    early = refused(NotYetValid, signed(nbf=NOW + 200, exp=NOW + 300), now=NOW + 200 - ahead)
    assert early.retry_after == after
    assert verify(signed(nbf=NOW + 200, exp=NOW + 300), now=NOW + 200 - ahead + after)


def test_what_is_over_or_early_may_be_looked_at_but_nothing_else_passes():
    for times in ({"exp": NOW - 50, "nbf": NOW - 60}, {"nbf": NOW + 50, "exp": NOW + 60}):
        assert verify(signed(**times), expired=True)
        refused(WrongAudience, signed(**times), expired=True, url="/v")
        refused(PolicyViolation, signed(**times, call=CALL | {"module": "os"}), expired=True)


# --- Limits of the signer -------------------------------------------------------------------------


def signer(limits=None, **key):
    return Signer(Keyring(Key("a", SECRET, **key)), POLICY, limits=limits or Limits())


def test_the_size_limit_is_exact_on_both_ends():
    task = make()
    data = signer().sign(task)
    exact, short = Limits(token_bytes=len(data)), Limits(token_bytes=len(data) - 1)
    assert signer(exact).sign(task) == data
    assert verify(data, verifier(limits=exact))
    with pytest.raises(TaskTooLargeError) as caught:
        signer(short).sign(task)
    assert (caught.value.size, caught.value.limit) == (len(data), len(data) - 1)
    refused(MalformedToken, data, verifier(limits=short))


def test_what_nests_deeper_than_the_writer_goes_is_too_large():
    tree = 1
    for _ in range(300):
        tree = [tree]
    with pytest.raises(TaskTooLargeError, match="nest too deeply; pass an id"):
        signer().sign(make(args=[tree]))


def test_the_signer_keeps_within_its_key():
    with pytest.raises(UnknownQueueError):
        signer(queues=["mail"]).sign(make())
    assert signer(queues=["default"]).sign(make())
    with pytest.raises(NotDeferrable, match="pickle"):
        signer().sign(make(cty="pickle"))
    assert signer(pickle=True).sign(make(cty="pickle"))
    assert signer().gate.callable_ref(zoo.function) == signer(patterns=[f"{zoo.__name__}:function"]).gate.callable_ref(
        zoo.function
    )
    with pytest.raises(NotDeferrable):
        signer(patterns=[]).gate.callable_ref(test_the_signer_keeps_within_its_key)


# --- Re-runs: the root of a chain -----------------------------------------------------------------

ROOTED = Keyring(
    Key("a", SECRET, pickle=True),
    Key("gone", OTHER, "revoked"),
    Key("before", bytes(range(120, 170)), "verify_only"),
    Key("mail", bytes(range(60, 110)), "verify_only", queues=["mail"], pickle=True),
    Key("narrow", bytes(range(70, 120)), "verify_only", patterns=["tests.zoo.callables:function"]),
)


def rerun(kid, ring=RING, **changes):
    return signed(ring, retry_of="s" * 16, root={"id": "r" * 16, "kid": kid}, **changes)


@pytest.mark.parametrize("kid", ["a", "before"])
def test_a_re_run_of_a_key_without_limits_is_verified(kid):
    task = verify(rerun(kid), verifier(ROOTED))
    assert (task.kid, task.claims["root"]) == ("a", {"id": "r" * 16, "kid": kid})


def test_taking_the_roots_key_out_or_revoking_it_stops_its_re_runs():
    assert "not in this ring" in str(refused(UnknownKey, rerun("lost"), verifier(ROOTED)))
    assert "revoked" in str(refused(RevokedKey, rerun("gone"), verifier(ROOTED)))
    # A revoked key's own token cannot be had back by a re-run of a key that is not.
    assert not refused(RevokedKey, rerun("gone"), verifier(ROOTED), expired=True).authentic


def test_a_re_run_keeps_to_the_queues_of_its_roots_key():
    refused(CapabilityExceeded, rerun("mail"), verifier(ROOTED))
    assert verify(rerun("mail", aud="prod:mail:default:/u"), verifier(ROOTED)).kid == "a"


def test_a_re_run_keeps_to_the_patterns_of_its_roots_key_inside_the_arguments_too():
    other = CALL | {"qualname": "Plain", "kind": "class"}
    refused(CapabilityExceeded, rerun("narrow", call=other), verifier(ROOTED))
    assert verify(rerun("a", call=other), verifier(ROOTED))
    task = verify(rerun("narrow"), verifier(ROOTED))
    with pytest.raises(CapabilityExceeded):
        task.gate.load_class("tests.zoo.callables:Plain")
    assert verify(rerun("a"), verifier(ROOTED)).gate.load_class("tests.zoo.callables:Plain") is zoo.Plain


def test_a_re_run_carries_no_pickles_that_its_roots_key_may_not_sign():
    ring = Keyring(Key("a", SECRET, pickle=True))
    using = verifier(ROOTED, allow_pickle=True)
    refused(CapabilityExceeded, rerun("before", ring, cty="pickle"), using)
    assert verify(rerun("mail", ring, cty="pickle", aud="prod:mail:default:/u"), using)


@pytest.mark.parametrize("limits", [{"queues": ["default"]}, {"patterns": ["tests.zoo.callables"]}, {"patterns": []}])
def test_a_limited_key_signs_no_root(limits):
    key = Key("a", SECRET, **limits)
    claims = make(retry_of="s" * 16, root={"id": "r" * 16, "kid": "b"})
    ring = Keyring(key, Key("b", OTHER, "verify_only"))
    assert "re-runs" in str(refused(CapabilityExceeded, ring.sign(json.dumps(claims).encode()), verifier(ring)))
    with pytest.raises(CapabilityExceeded, match="re-runs"):
        Signer(ring, POLICY, limits=Limits()).sign(claims)


def test_a_pointer_to_a_re_run_is_judged_as_the_re_run():
    blob = {"id": "b" * 32, "sha256": "0" * 64, "length": 1}
    bare = {"blob": blob, "call": None, "args": None, "kwargs": None}
    refused(RevokedKey, rerun("gone", **bare), verifier(ROOTED))
    refused(CapabilityExceeded, rerun("mail", **bare), verifier(ROOTED))
    assert isinstance(verify(rerun("before", **bare), verifier(ROOTED)), VerifiedPointer)


# --- Pointers -------------------------------------------------------------------------------------


def pointer_to(data, ring=RING, **changes):
    blob = {"id": "b" * 32, "sha256": hashlib.sha256(data).hexdigest(), "length": len(data)} | changes.pop("blob", {})
    found = verify(signed(ring, blob=blob, call=None, args=None, kwargs=None, **changes))
    assert isinstance(found, VerifiedPointer)
    return found


def stored(pointer, data, error=None, **options):
    run = lambda: verifier().verify_stored(pointer, data, **({"url": "/u", "now": NOW} | options))  # noqa: E731
    if error is None:
        return run()
    with pytest.raises(RejectedTask) as caught:
        run()
    assert type(caught.value) is error
    return caught.value


def test_a_pointer_leads_to_the_stored_token():
    data = signed(name="n")
    pointer = pointer_to(data, name="n")
    assert pointer.identity.callable_name == ""
    assert pointer.blob["length"] == len(data)
    task = stored(pointer, data)
    assert task.digest == hashlib.sha256(data).digest()
    assert task.identity.task_id == pointer.identity.task_id


@pytest.mark.parametrize("blob", [{"length": 1}, {"sha256": "0" * 64}])
def test_length_and_hash_are_checked_before_the_stored_token_is_verified(blob):
    data = b"not even a token"
    assert "restore" in str(stored(pointer_to(data, blob=blob), data, InvalidClaims))
    stored(pointer_to(data), data, MalformedToken)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jti", "c" * 32),
        ("aud", "prod:mail:default:/u"),
        ("nbf", NOW - 1),
        ("exp", NOW + 99),
        ("name", "other"),
        ("name", None),
        ("cty", "pickle"),
        ("headers", {"X-A": "c"}),
        ("headers", None),
        ("retry", {}),
        ("retry", None),
        ("deadline", 61),
        ("deadline", None),
        ("retry_of", "s" * 16),
        ("root", {"id": "s" * 16, "kid": "a"}),
        ("root", None),
        ("trace", f"00-{'a' * 32}-{'c' * 16}-01"),
        ("trace", None),
    ],
)
def test_a_pointer_and_its_token_have_their_claims_in_common(name, value):
    ring = Keyring(Key("a", SECRET, pickle=True))
    both = {
        "name": "n",
        "headers": {"X-A": "b"},
        "retry": {"task_retry_limit": 1},
        "deadline": 60,
        "retry_of": "r" * 16,
        "root": {"id": "r" * 16, "kid": "a"},
        "trace": f"00-{'a' * 32}-{'b' * 16}-01",
    }
    using = verifier(ring, allow_pickle=True)
    data = signed(ring, **both | {name: value})
    pointer = verify(
        signed(
            ring,
            blob={"id": "b" * 32, "sha256": hashlib.sha256(data).hexdigest(), "length": len(data)},
            **dict.fromkeys(("call", "args", "kwargs")) | both | {"iat": NOW - 1},
        ),
        using,
    )
    with pytest.raises(InvalidClaims, match="disagree"):
        using.verify_stored(pointer, data, url="/u", now=NOW)
    same = signed(ring, **both)
    pointer = verify(
        signed(
            ring,
            blob={"id": "b" * 32, "sha256": hashlib.sha256(same).hexdigest(), "length": len(same)},
            **dict.fromkeys(("call", "args", "kwargs")) | both | {"iat": NOW - 1},
        ),
        using,
    )
    assert using.verify_stored(pointer, same, url="/u", now=NOW).token == same


def test_a_pointer_to_a_pointer_is_refused():
    inner = signed(blob={"id": "b" * 32, "sha256": "0" * 64, "length": 1}, call=None, args=None, kwargs=None)
    assert "points to another" in str(stored(pointer_to(inner), inner, InvalidClaims))


def test_a_stored_token_is_verified_as_any_other():
    data = signed()
    pointer = pointer_to(data)
    stored(pointer, data, WrongAudience, url="/v")
    stored(pointer, data, ExpiredTask, now=NOW + 1000)
    assert stored(pointer, data, now=NOW + 1000, expired=True)
    forged = data[:-43] + b"A" * 43
    stored(pointer_to(forged), forged, BadSignature)
    outside = signed(call=CALL | {"module": "os", "qualname": "system"})
    stored(pointer_to(outside), outside, PolicyViolation)


def test_verified_values_show_no_argument():
    task = verify(signed(args=["secret"], call=CALL))
    assert "secret" not in repr(task)


# --- Small values ---------------------------------------------------------------------------------


def every(cls):
    for child in cls.__subclasses__():
        yield child
        yield from every(child)


@pytest.mark.parametrize(
    "cls", sorted({cls for cls in every(Error) if cls.__module__ == "safedefer.errors"}, key=lambda cls: cls.__name__)
)
def test_every_error_has_its_name_as_slug(cls):
    words = re.findall(r"[A-Z][a-z]*", cls.__name__)
    assert cls.slug == ("_" if cls.__name__.startswith("_") else "") + "-".join(words).lower()


def test_a_missing_extra_says_what_to_install():
    error = MissingExtra("postgres", "PostgresQueue")
    assert (str(error), error.extra) == (
        "PostgresQueue needs an optional dependency: pip install 'safedefer[postgres]'",
        "postgres",
    )
    assert NotDeferrable("x").reason == "unsupported"
    assert UnencodableArgument("x").path == InvalidArguments("x").path == "$"


def test_a_task_tells_its_size_and_time():
    from datetime import UTC, datetime  # noqa: PLC0415

    eta = datetime.fromtimestamp(NOW, UTC)
    task = Task(
        id="a",
        name=None,
        queue_name="q",
        url="/u",
        target="t",
        headers={},
        payload=b"secret",
        eta=eta,
        retry_options=None,
        was_enqueued=True,
    )
    assert (task.size, task.eta_posix) == (6, NOW)
    assert "secret" not in repr(task)


# --- What was signed, without a word on whether it may run ------------------------------------------


def test_authenticating_asks_neither_policy_nor_time_nor_audience():
    for changes in (
        {"call": {**CALL, "module": "os", "qualname": "system"}},
        {"nbf": NOW + 10**6, "exp": NOW + 2 * 10**6, "iat": NOW + 10**6},
        {"nbf": 1, "exp": 2, "iat": 1},
        {"aud": "staging:other:elsewhere:/x"},
        {"call": None, "args": None, "kwargs": None, "blob": {"id": "b" * 32, "sha256": "0" * 64, "length": 9}},
    ):
        assert verifier(queues=["default"], targets=["default"]).authenticate(signed(**changes)) == make(**changes)


def test_authenticating_takes_pickles_of_a_key_that_may_sign_them():
    ring = Keyring(Key("a", SECRET, pickle=True))
    assert verifier(ring).authenticate(signed(ring, cty="pickle"))["cty"] == "pickle"


LIMITED = Keyring(Key("a", SECRET, queues=["mail"]))


@pytest.mark.parametrize(
    ("error", "data", "ring"),
    [
        (MalformedToken, b"", RING),
        (MalformedToken, b"x" * 2_000_000, RING),
        (UnknownKey, signed(Keyring(Key("b", SECRET))), RING),
        (BadSignature, signed(Keyring(Key("a", OTHER))), RING),
        (InvalidClaims, signed(v=2), RING),
        (CapabilityExceeded, signed(cty="pickle"), RING),
        (CapabilityExceeded, signed(), LIMITED),
    ],
)
def test_authenticating_refuses_what_no_key_of_ours_signed_or_may_sign(error, data, ring):
    with pytest.raises(RejectedTask) as caught:
        verifier(ring).authenticate(data)
    assert type(caught.value) is error
    if error is CapabilityExceeded:
        assert caught.value.identity.task_id == "a" * 32
