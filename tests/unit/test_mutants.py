"""What no test had noticed when mutation testing changed it."""

import cmath
import json
import math
import sys
import tracemalloc
from abc import ABCMeta
from base64 import urlsafe_b64decode
from types import ModuleType

import pytest

from safedefer.callables import wrappers
from safedefer.claims import read_claims
from safedefer.errors import (
    BadSignature,
    CapabilityExceeded,
    ConfigurationError,
    MalformedToken,
    NotDeferrable,
    PolicyViolation,
    UnresolvableCallable,
    WrongAudience,
)
from safedefer.keys import Key, Keyring
from safedefer.options import Limits, Serves
from safedefer.policy import Policy, deferrable
from safedefer.refs import METACLASSES, UNBOUND, CallableRef, find, generic_origin
from safedefer.signing import Signer, Verifier
from safedefer.token import Token, decode_segment, encode_segment
from tests.zoo import parsed

NOW = 1_700_000_000


@pytest.mark.parametrize(
    ("data", "text"),
    [(bytes([0, 0, last]), b"AAA" + bytes([letter])) for last, letter in enumerate(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")],
)  # fmt: skip
def test_a_segment_may_end_in_any_letter(data, text):
    assert encode_segment(data) == text
    assert decode_segment(text) == data


def test_our_own_header_has_its_members_in_the_order_of_the_alphabet():
    head = Keyring(Key("k", bytes(range(3, 40)))).sign(b"x").partition(b".")[0]
    assert urlsafe_b64decode(head + b"=" * (-len(head) % 4)) == b'{"alg":"HS256","kid":"k","typ":"safedefer+jwt"}'


def test_a_megabyte_of_dots_is_not_split_into_a_million_parts():
    dots = b"." * 1_000_000
    tracemalloc.start()
    with pytest.raises(MalformedToken):
        Token.parse(dots, max_bytes=len(dots))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_100_000, "three parts share the million bytes among them"


@pytest.mark.parametrize(
    "segment", [b"!!!!", b"AAAA!!!!", b"!!!!AAAA", b"AA!!!!AA", b"AAAA\n\n\n\nAAAA", b"AAAA    AA", b"A~A~A~A~"]
)
def test_what_a_lax_decoder_skips_is_refused(segment):
    with pytest.raises(MalformedToken, match="canonical"):
        decode_segment(segment)


def token(key, payload=b"x", **parts):
    return Token.parse(Keyring(key).sign(payload), max_bytes=1_000)._replace(**parts)


@pytest.mark.parametrize("mac", [b"A" * 42 + b"B", b"!" * 43])
def test_a_mac_of_a_known_key_that_is_no_base64url_is_malformed(mac):
    key = Key("k", bytes(range(3, 40)))
    with pytest.raises(MalformedToken):
        Keyring(key).verify(token(key, mac=mac))
    with pytest.raises(BadSignature):
        Keyring(key).verify(token(key, mac=b"A" * 43))


def signed(**claims):
    ring = Keyring(Key("a", bytes(range(3, 40)), pickle=True))
    claims = {
        "v": 1, "jti": "a" * 32, "iat": NOW, "nbf": NOW, "exp": NOW + 100, "aud": "prod:default:default:/u", "cty": "typed",
        "call": {"kind": "function", "module": "tests.zoo.callables", "qualname": "function"}, "args": [1], "kwargs": {},
    } | claims  # fmt: skip
    text = json.dumps({name: value for name, value in claims.items() if value is not None})
    verifier = Verifier(ring, Policy("tests.zoo.callables"), serves=Serves(environment="prod"), limits=Limits())
    return verifier, ring.sign(text.encode())


def test_pickled_arguments_are_off_unless_they_are_turned_on():
    verifier, data = signed(cty="pickle")
    with pytest.raises(PolicyViolation, match="pickled"):
        verifier.verify(data, url="/u", now=NOW)


def test_a_pointer_says_which_key_signed_it():
    blob = {"id": "b" * 32, "sha256": "0" * 64, "length": 1}
    verifier, data = signed(blob=blob, call=None, args=None, kwargs=None)
    found = verifier.verify(data, url="/u", now=NOW)
    assert (found.kid, found.identity.kid) == ("a", "a")


def test_a_refusal_says_which_key_signed():
    verifier, data = signed()
    with pytest.raises(WrongAudience) as caught:
        verifier.verify(data, url="/v", now=NOW)
    assert caught.value.identity.kid == "a"


def test_a_payload_in_our_own_spelling_is_known_as_such():
    verifier, data = signed()
    assert verifier.verify(data, url="/u", now=NOW).canonical is False
    ours = Signer(Keyring(Key("a", bytes(range(3, 40)))), Policy(), limits=Limits())
    claims = read_claims(decode_segment(data.split(b".")[1]))[0]
    assert verifier.verify(ours.sign(claims), url="/u", now=NOW).canonical is True


def test_a_key_without_pickle_says_so_by_a_slug():
    verifier, data = signed()
    claims = read_claims(decode_segment(data.split(b".")[1]))[0]
    with pytest.raises(NotDeferrable) as caught:
        Signer(Keyring(Key("a", bytes(range(3, 40)))), Policy(), limits=Limits()).sign(claims | {"cty": "pickle"})
    assert caught.value.reason == "pickle-off"


@pytest.fixture
def module(monkeypatch):
    """A module with a function and a class, found in ``sys.modules``."""
    found = ModuleType("tests.found")
    found.ABCMeta = ABCMeta
    exec("def f(): pass\nclass C(metaclass=ABCMeta): pass\nclass D:\n    class E: pass\n", found.__dict__)
    monkeypatch.setitem(sys.modules, "tests.found", found)
    return found


class Meta(ABCMeta):
    def __call__(cls):
        return super().__call__()


def test_a_class_within_a_class_that_is_missing_does_not_exist(module):
    for name in ("D.F", "D.F.G", "f.G"):
        with pytest.raises(UnresolvableCallable, match="does not exist"):
            find("tests.found", name)


@pytest.fixture
def odd(module):
    """A module with classes of a metaclass that a policy has to name."""
    code = (
        "class M(metaclass=Meta):\n    def go(self): pass\n    def __call__(self): pass\n"
        "    @classmethod\n    def make(cls): pass\n"
        "class L(list, metaclass=Meta): pass\n"
    )
    module.Meta = Meta
    exec(code, module.__dict__)
    return module


@pytest.mark.parametrize("take", [
    lambda odd: (odd.M, UNBOUND), lambda odd: (odd.M.make, UNBOUND), lambda odd: ((m := odd.M()), m), lambda odd: ((m := odd.M()).go, m),
    lambda odd: ((m := odd.L()).append, m),
])  # fmt: skip
def test_a_further_metaclass_counts_for_every_kind(odd, take):
    obj, bound = take(odd)
    ref = CallableRef.of(obj, metaclasses=METACLASSES | {Meta})
    assert ref.resolve(bound, metaclasses=METACLASSES | {Meta}) == obj
    with pytest.raises(NotDeferrable) as caught:
        CallableRef.of(obj)
    assert caught.value.reason == "metaclass"
    with pytest.raises(UnresolvableCallable):
        ref.resolve(bound)


def test_a_built_in_is_found_in_the_module_that_holds_it_or_in_the_one_it_names(monkeypatch):
    monkeypatch.setattr(math.sqrt, "__module__", "nowhere")
    assert str(CallableRef.of(math.sqrt)) == "math:sqrt"
    monkeypatch.delattr(math, "sqrt")
    sqrt = cmath.sqrt
    monkeypatch.delattr(cmath, "sqrt")
    with pytest.raises(NotDeferrable) as caught:
        CallableRef.of(sqrt)
    assert caught.value.reason == "not-found"
    home = ModuleType("m" * 255)
    home.sqrt = sqrt
    monkeypatch.setitem(sys.modules, "m" * 255, home)
    monkeypatch.setattr(sqrt, "__module__", "m" * 255)
    assert str(CallableRef.of(sqrt)) == "m" * 255 + ":sqrt"


@pytest.mark.parametrize(("of_module", "of_function", "right"), [(255, 255, True), (256, 1, False), (1, 256, False)])
def test_a_name_may_have_255_characters(monkeypatch, of_module, of_function, right):
    module = ModuleType("m" * of_module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(f"def {'f' * of_function}(): pass", module.__dict__)
    function = getattr(module, "f" * of_function)
    if right:
        assert CallableRef.of(function).resolve() is function
    else:
        with pytest.raises(NotDeferrable, match="255"):
            CallableRef.of(function)


@pytest.mark.parametrize(("length", "right"), [(255, True), (256, False)])
def test_a_method_may_have_a_name_of_255_characters(module, length, right):
    name = "f" * length
    exec(f"class N:\n    def {name}(self): pass", module.__dict__)
    method = getattr(module.N(), name)
    if right:
        assert CallableRef.of(method).member == name
    else:
        with pytest.raises(NotDeferrable, match="255"):
            CallableRef.of(method)


def test_a_built_in_method_under_the_name_of_another_is_not_that_other(module):
    exec("class L(list):\n    append = list.pop", module.__dict__)
    hidden = super(module.L, module.L([1])).append
    with pytest.raises(NotDeferrable) as caught:
        CallableRef.of(hidden)
    assert caught.value.reason == "overridden"


def test_classes_are_marked_and_admitted_by_their_marks(module):
    assert deferrable(module.C) is module.C
    policy = Policy(deferrable=True)
    assert policy.callable_ref(module.C).qualname == "C"
    with pytest.raises(NotDeferrable):
        policy.callable_ref(module.D)


def test_modules_after_one_that_moved_are_imported_all_the_same():
    policy = Policy("tests.a_gone", "tests.z_missing", moved={"tests.a_gone:f": "tests.zoo.callables:function"})
    with pytest.raises(ConfigurationError, match="z_missing"):
        policy.load()


def test_a_policy_that_names_a_metaclass_admits_its_classes_everywhere(odd):
    policy, without = Policy("tests.found", metaclasses=[Meta]), Policy("tests.found")
    method = odd.M().go
    ref = policy.callable_ref(method)
    assert policy.load_callable(ref, method.__self__) == method
    assert policy.class_name(odd.M) == "tests.found:M"
    assert policy.load_class("tests.found:M") is odd.M
    for call in (lambda: without.callable_ref(method), lambda: without.class_name(odd.M)):
        with pytest.raises(NotDeferrable):
            call()
    for call in (lambda: without.load_callable(ref, method.__self__), lambda: without.load_class("tests.found:M")):
        with pytest.raises(UnresolvableCallable):
            call()


def test_a_built_in_method_of_an_admitted_class_is_refused(module):
    exec("from io import BytesIO\nclass B(BytesIO): pass", module.__dict__)
    policy, bound = Policy("tests.found"), module.B(b"x")
    ref = CallableRef.of(bound.getvalue)
    with pytest.raises(PolicyViolation, match="built-in method"):
        policy.load_callable(ref, bound)


@pytest.mark.parametrize(("extra", "right"), [("", True), ("C", False)])
def test_the_name_of_a_class_may_have_511_characters(extra, right):
    policy, name = Policy("m" * 255), "m" * 255 + ":" + "C" * 255 + extra
    if right:
        assert policy.check_class_name(name) == name
    else:
        with pytest.raises(PolicyViolation):
            policy.check_class_name(name)


def test_an_exact_pattern_may_lie_deep(module):
    exec("class O:\n    class I:\n        def run(self): pass", module.__dict__)
    assert repr(Policy("xml.sax.saxutils:escape", "tests.found:O.I.run")).count(":") == 2


def test_a_class_in_a_named_class_in_a_class_goes_with_that_one(module):
    code = "class O:\n    class I:\n        class X: pass"
    exec(code, module.__dict__)
    policy = Policy("tests.found:O.I")
    assert policy.load_class("tests.found:O.I.X") is module.O.I.X
    exec(code, module.__dict__)
    with pytest.raises(PolicyViolation, match="not the class that the exact pattern named"):
        policy.load_class("tests.found:O.I.X")


def test_a_name_ends_at_a_task_object_only_if_its_function_says_that_name(module, monkeypatch):
    code = "class W:\n    def __init__(self, func): self.func = func\ndef run(): pass\nbare, run = run, W(run)\nother = W(bare)"
    exec(code, module.__dict__)
    monkeypatch.setattr(wrappers, "_REGISTERED", {})
    wrappers.register_wrapper(module.W, "func")
    assert find("tests.found", "run") is module.bare
    assert find("tests.found", "other") is module.other
    module.bare.__module__ = "tests.elsewhere"
    assert find("tests.found", "run") is module.run


@pytest.mark.parametrize("metadata", [None, ("origin",), {}, {"origin": None}, {"origin": dict}])
def test_only_what_pydantic_made_of_a_generic_model_is_named_by_it(metadata):
    assert generic_origin(parsed.Page[int]) is parsed.Page
    assert generic_origin(parsed.Page) is parsed.Page
    assert generic_origin(parsed.IntPage) is parsed.IntPage
    forged = type("Forged", (list,), {"__pydantic_generic_metadata__": metadata})
    assert generic_origin(forged) is forged


def test_who_looks_at_a_token_learns_of_the_limits_of_its_key():
    secret, limits = bytes(range(32)), Limits()
    serves = Serves(environment="prod")
    signer = Signer(Keyring(Key("k", secret)), Policy("tests.zoo.callables"), limits=limits)
    limited = Keyring(Key("k", secret, queues=["mail"]))
    verifier = Verifier(limited, Policy("tests.zoo.callables"), serves=serves, limits=limits)
    for queue in ("mail", "default"):
        audience = f"prod:{queue}:default:/_ah/queue/deferred"
        call = {"kind": "function", "module": "tests.zoo.callables", "qualname": "function"}
        times = {"iat": NOW, "nbf": NOW, "exp": NOW + 60}
        claims = {
            "v": 1,
            "jti": "j" * 32,
            **times,
            "aud": audience,
            "cty": "typed",
            "call": call,
            "args": [],
            "kwargs": {},
        }
        if queue == "mail":
            assert verifier.authenticate(signer.sign(claims))["aud"] == audience
        else:
            with pytest.raises(CapabilityExceeded) as refusal:
                verifier.authenticate(signer.sign(claims))
            assert (refusal.value.identity.kid, refusal.value.identity.audience) == ("k", audience)
