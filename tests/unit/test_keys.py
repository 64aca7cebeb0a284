"""Keys: what is refused when configured, what verifies, and that no secret shows."""

import base64
import copy
import hashlib
import hmac
import json
import pickle
import traceback
from itertools import permutations
from pathlib import Path

import pytest

import safedefer
from safedefer.errors import BadSignature, ConfigurationError, RevokedKey, UnknownKey, WeakKey
from safedefer.keys import Key, Keyring, KeyState, end_mac
from safedefer.token import Token, encode_segment

PACKAGE = Path(safedefer.__file__).parent
SECRET = bytes(range(200, 250))
OTHER = bytes(range(100, 150))
TEXT = encode_segment(SECRET).decode()
OTHER_TEXT = encode_segment(OTHER).decode()


def parse(data):
    return Token.parse(data, max_bytes=10_000)


# --- Key ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "secret", [SECRET, SECRET[:32], SECRET * 2 + b"x", bytearray(SECRET), bytes(range(64)), bytes(range(65))], ids=len
)
@pytest.mark.parametrize("message", [b"", b"a", b"a" * 1000])
def test_a_mac_is_hmac_sha_256(secret, message):
    expected = hmac.digest(bytes(secret), message, "sha256")
    for at in (0, len(message) // 3, len(message)):
        begun = Key("k", secret).begin_mac(message[:at])
        for _ in range(2):
            assert end_mac(begun, message[at:]) == base64.urlsafe_b64encode(expected).rstrip(b"=")


@pytest.mark.parametrize(("secret", "why"), [
    (b"", "0 bytes"), (SECRET[:31], "31 bytes"), (bytes(32), "repeats"), (b"ab" * 16, "repeats"), (b"abcdefghijklmnop" * 2, "repeats"), (b"abcdefghijk" * 3, "repeats"),
    (b"abcdefghijklmnopqrs" * 2, "repeats"), (b"a" * 31 + b"b", "repeats"), (b"abcdefgabcdefgbacdefgabcdefgabcd", "repeats"),
    (b"-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC", "placeholder"), (b'{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObw"}', "placeholder"),
    (b'[{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObw"}]', "placeholder"), (b"  \n{'k': 'AyM1SysPpbyDfgZld3umj1qzKObw'}", "placeholder"),
    (b"changeme-AyM1SysPpbyDfgZld3umj1qzKObw", "placeholder"), (b"CHANGE_ME-AyM1SysPpbyDfgZld3umj1qzKObw", "placeholder"), (b"this-is-my-Password-0123456789-abc", "placeholder"),
    (b"your-secret-goes-in-here-0123456789", "placeholder"), (b"ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQ", "placeholder"), (b"an example key of 32 bytes and more", "placeholder"),
    (b"insecure-0123456789-abcdefghijklmnop", "placeholder"), (b"default-0123456789-abcdefghijklmnop", "placeholder"),
])  # fmt: skip
def test_a_weak_secret_is_refused_and_not_shown(secret, why):
    with pytest.raises(WeakKey, match=why) as caught:
        Key("k", secret)
    assert "safedefer keys new" in str(caught.value)
    shown(caught.value, secret)


def test_looks_are_judged_of_text_only():
    for start in (b"{", b"[", b"-----BEGIN", b"changeme"):
        assert Key("k", start + SECRET)


@pytest.mark.parametrize("kid", ["", "a b", "é", "a" * 65, "a\n", "a:b", "a.b", 'a"', None, 3, b"k"])
def test_a_key_has_a_plain_name(kid):
    with pytest.raises(ConfigurationError, match="kid"):
        Key(kid, SECRET)


@pytest.mark.parametrize("kid", ["a", "A-_9", "a" * 64])
def test_a_plain_name_is_kept(kid):
    assert Key(kid, SECRET).kid == kid


@pytest.mark.parametrize(("options", "why"), [
    ({"state": "retired"}, "state"), ({"state": None}, "state"), ({"state": ""}, "state"), ({"state": []}, "state"), ({"queues": "default"}, "lists of texts"),
    ({"patterns": "shop"}, "lists of texts"), ({"queues": ["a b"]}, "impossible"), ({"queues": [""]}, "impossible"), ({"queues": ["a\n"]}, "impossible"),
])  # fmt: skip
def test_a_malformed_limit_is_refused(options, why):
    with pytest.raises(ConfigurationError, match=why):
        Key("k", SECRET, **options)


@pytest.mark.parametrize(
    "secret", ["text" * 10, None, 3, memoryview(SECRET), list(SECRET)], ids=lambda s: type(s).__name__
)
def test_a_secret_is_bytes(secret):
    with pytest.raises(ConfigurationError, match="is bytes"):
        Key("k", secret)


def test_pickling_is_allowed_by_true_alone():
    assert not Key("k", SECRET).pickle
    assert not Key("k", SECRET, pickle=1).pickle
    assert Key("k", SECRET, pickle=True).pickle


def test_limits_are_kept():
    key = Key("k", SECRET, queues=iter(["a", "b"]), patterns=iter(["shop.*"]))
    assert key.queues == {"a", "b"}
    assert key.patterns == ("shop.*",)
    assert (Key("k", SECRET).queues, Key("k", SECRET).patterns) == (None, None)


def test_a_key_is_immutable():
    key = Key("k", SECRET)
    for change in (
        lambda: setattr(key, "state", "active"),
        lambda: delattr(key, "state"),
        lambda: setattr(key, "x", 1),
        lambda: setattr(Keyring(key), "active", key),
    ):
        with pytest.raises(AttributeError, match="immutable"):
            change()


# --- No secret shows ------------------------------------------------------------------------------


def shown(error, *secrets):
    """Assert that a traceback with local variables, and every cause, shows none of the secrets from our frames."""
    report = traceback.TracebackException.from_exception(error, capture_locals=True, max_group_width=100)
    pending, texts = [report], []
    while pending:
        item = pending.pop()
        # The first frame is the caller's, which had the secret to begin with.
        ours = [frame for frame in item.stack if Path(frame.filename).is_relative_to(PACKAGE)]
        texts += [str(item), *(f"{name}={value}" for frame in ours for name, value in (frame.locals or {}).items())]
        pending += [other for other in (item.__cause__, item.__context__) if other is not None]
    text = "\n".join(texts)
    for secret in secrets:
        forms = {secret, encode_segment(secret)} if isinstance(secret, bytes) else {str(secret).encode()}
        for form in forms:
            assert not form or repr(form)[2:-1] not in text


@pytest.mark.parametrize("show", [repr, str, "{!r}".format, lambda key: traceback.format_exception(ValueError(key))])
def test_a_key_shows_its_name_and_state(show):
    for thing in (Key("name", SECRET), Keyring(Key("name", SECRET))):
        text = str(show(thing))
        assert "name" in text
        assert "active" in text
        assert repr(SECRET)[2:-1] not in text
        assert TEXT not in text


@pytest.mark.parametrize("clone", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_key_is_neither_pickled_nor_copied(clone):
    for thing in (Key("k", SECRET), Keyring(Key("k", SECRET))):
        with pytest.raises(TypeError, match="not pickled"):
            clone(thing)


BROKEN = [
    f"a:{TEXT},b", f"a:{TEXT},b:!!", f"a:{TEXT},b:{OTHER_TEXT}=", f"a:{TEXT},a:{OTHER_TEXT}", f"a:{TEXT},b:{TEXT}", f"a:{TEXT},b:QUJD", f"a b:{TEXT}", TEXT, "",
    f"a:{TEXT},", f"a:{TEXT},b:{OTHER_TEXT}\udc80", f"a:{TEXT},b:é", f":{TEXT}", f"SAFEDEFER_KEYS=a:{TEXT}",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_list_of_keys_is_refused_and_shows_none_of_them(text):
    with pytest.raises(ConfigurationError) as caught:
        Keyring.from_text(text)
    shown(caught.value, SECRET, OTHER, TEXT, OTHER_TEXT)


def jwk(**changes):
    return {"kty": "oct", "kid": "a", "k": TEXT, "safedefer_state": "active"} | changes


BROKEN_SETS = {
    "no json": TEXT, "no object": f'["{TEXT}"]', "no keys": json.dumps({"k": TEXT}), "keys no list": json.dumps({"keys": jwk()}),
    "another kty": json.dumps({"keys": [jwk(kty="RSA")]}), "another alg": json.dumps({"keys": [jwk(alg="HS512")]}), "no kid": json.dumps({"keys": [{"kty": "oct", "k": TEXT}]}),
    "unknown state": json.dumps({"keys": [jwk(safedefer_state="retired")]}), "queues a text": json.dumps({"keys": [jwk(safedefer_queues="a")]}),
    "pickle a text": json.dumps({"keys": [jwk(safedefer_pickle="yes")]}), "none active": json.dumps({"keys": [jwk(safedefer_state="verify_only")]}),
    "two active": json.dumps({"keys": [jwk(), jwk(kid="b", k=OTHER_TEXT)]}), "same kid": json.dumps({"keys": [jwk(), jwk(k=OTHER_TEXT, safedefer_state="revoked")]}),
    "same secret": json.dumps({"keys": [jwk(), jwk(kid="b", safedefer_state="revoked")]}), "padded": json.dumps({"keys": [jwk(), jwk(kid="b", k=OTHER_TEXT + "==")]}),
    "weak": json.dumps({"keys": [jwk(), jwk(kid="b", k="QUJD", safedefer_state="revoked")]}), "k a number": json.dumps({"keys": [jwk(), jwk(k=1)]}),
}  # fmt: skip


@pytest.mark.parametrize("label", BROKEN_SETS)
def test_a_broken_key_file_is_refused_and_shows_no_secret(label):
    for text in (BROKEN_SETS[label], BROKEN_SETS[label].encode()):
        with pytest.raises(ConfigurationError) as caught:
            Keyring.from_jwks(text)
        shown(caught.value, SECRET, OTHER, TEXT, OTHER_TEXT)


def test_a_failed_verification_shows_no_mac():
    ring = Keyring(Key("a", SECRET))
    header, payload, mac = ring.sign(b"payload").split(b".")
    forged = b".".join((header, payload, b"A" * 43))
    with pytest.raises(BadSignature) as caught:
        ring.verify(parse(forged))
    shown(caught.value, mac)


# --- Keyring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    [], [Key("a", SECRET, "verify_only")], [Key("a", SECRET), Key("b", OTHER)], [Key("a", SECRET, "revoked")],
])  # fmt: skip
def test_a_ring_has_exactly_one_active_key(keys):
    with pytest.raises(ConfigurationError, match="exactly one active"):
        Keyring(*keys)


def test_keys_of_one_ring_share_neither_name_nor_secret():
    with pytest.raises(ConfigurationError, match="same kid"):
        Keyring(Key("a", SECRET), Key("a", OTHER, "verify_only"))
    with pytest.raises(WeakKey, match="same secret"):
        Keyring(Key("a", SECRET), Key("b", SECRET, "revoked"))


def test_a_ring_verifies_what_it_signed():
    ring = Keyring(Key("b", OTHER, "verify_only"), Key("a", SECRET))
    done = ring.verify(parse(ring.sign(b'{"x":1}')))
    assert done == (ring.active, b'{"x":1}')
    assert ring.active.kid == "a"
    assert [key.kid for key in ring.keys] == ["b", "a"]


def header(text):
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=")


def minted(head, secret=SECRET, payload=b"payload"):
    signing_input = head + b"." + encode_segment(payload)
    return signing_input + b"." + encode_segment(hmac.new(secret, signing_input, hashlib.sha256).digest())


@pytest.mark.parametrize(
    "order", list(permutations(['"alg":"HS256"', '"kid":"a"', '"typ":"safedefer+jwt"'])), ids="/".join
)
def test_all_six_orders_of_the_header_verify(order):
    token = minted(header("{" + ",".join(order) + "}"))
    assert Keyring(Key("a", SECRET)).verify(parse(token))[1] == b"payload"


@pytest.mark.parametrize("text", [
    '{"alg":"none","kid":"a","typ":"safedefer+jwt"}', '{"alg":"HS512","kid":"a","typ":"safedefer+jwt"}', '{"alg":"hs256","kid":"a","typ":"safedefer+jwt"}',
    '{"alg":"HS256","kid":"b","typ":"safedefer+jwt"}', '{"alg":"HS256","kid":"A","typ":"safedefer+jwt"}', '{"alg":"HS256","kid":"a","typ":"JWT"}',
    '{"alg":"HS256","kid":"a","typ":"SAFEDEFER+JWT"}', '{"alg":"HS256","kid":"a"}', '{"alg":"HS256","typ":"safedefer+jwt"}', '{"alg":"HS256","kid":"a","typ":"safedefer+jwt","x":1}',
    '{"alg": "HS256","kid":"a","typ":"safedefer+jwt"}', ' {"alg":"HS256","kid":"a","typ":"safedefer+jwt"}', '{"alg":"HS256","kid":"a","typ":"safedefer+jwt"}\n',
    '{"alg":"HS256","kid":"a","kid":"a","typ":"safedefer+jwt"}', '{"alg":"HS256","\\u006bid":"a","typ":"safedefer+jwt"}', '{"alg":"HS256","crit":["b64"],"b64":false,"kid":"a"}',
    '{"alg":"HS256","jku":"https://example.org","kid":"a","typ":"safedefer+jwt"}', '{"alg":"HS256","jwk":{"kty":"oct","k":"AAAA"},"kid":"a","typ":"safedefer+jwt"}', "", "{}", "[]",
    '{"alg":"HS256","kid":"decoy","typ":"safedefer+jwt"}', '{"alg":"HS256","kid":"../../dev/null","typ":"safedefer+jwt"}',
])  # fmt: skip
@pytest.mark.parametrize("secret", [SECRET, b"", bytes(range(32))], ids=["ours", "empty", "decoy"])
def test_no_other_header_verifies_whoever_signed_it(text, secret):
    with pytest.raises(UnknownKey):
        Keyring(Key("a", SECRET)).verify(parse(minted(header(text), secret)))


def test_the_algorithm_none_has_no_spelling():
    for token in (b"eyJhbGciOiJub25lIn0.e30.", b"eyJhbGciOiJub25lIn0.e30." + b"A" * 43):
        with pytest.raises((UnknownKey, ConfigurationError, Exception), match="no key of this ring|impossible length"):
            Keyring(Key("a", SECRET)).verify(parse(token))


def test_another_key_of_the_same_name_is_a_bad_signature():
    token = Keyring(Key("a", OTHER)).sign(b"payload")
    with pytest.raises(BadSignature):
        Keyring(Key("a", SECRET)).verify(parse(token))


def test_a_key_signs_under_no_other_keys_name():
    ring = Keyring(Key("a", SECRET), Key("b", OTHER, "verify_only"))
    own = '{"alg":"HS256","kid":"b","typ":"safedefer+jwt"}'
    with pytest.raises(BadSignature):
        ring.verify(parse(minted(header(own), SECRET)))
    assert ring.verify(parse(minted(header(own), OTHER)))[0].kid == "b"


def test_a_revoked_key_is_named_only_to_who_has_it():
    ring = Keyring(Key("a", SECRET), Key("b", OTHER, KeyState.REVOKED))
    theirs = Keyring(Key("b", OTHER)).sign(b"payload")
    with pytest.raises(RevokedKey, match="key b is revoked"):
        ring.verify(parse(theirs))
    with pytest.raises(BadSignature):
        ring.verify(parse(theirs[:-43] + b"A" * 43))


def test_a_rotation_from_end_to_end():
    old, new = (lambda state: Key("old", SECRET, state)), (lambda state: Key("new", OTHER, state))
    appended = Keyring(old("active"), new("verify_only"))
    promoted = Keyring(old("verify_only"), new("active"))
    first, second = Keyring(old("active")).sign(b"first"), promoted.sign(b"second")
    for ring in (appended, promoted):
        assert ring.verify(parse(first))[0].kid == "old"
        assert ring.verify(parse(second))[0].kid == "new"
    with pytest.raises(UnknownKey):
        Keyring(old("active")).verify(parse(second))
    revoked = Keyring(old("revoked"), new("active"))
    with pytest.raises(RevokedKey):
        revoked.verify(parse(first))
    dropped = Keyring(new("active"))
    with pytest.raises(UnknownKey):
        dropped.verify(parse(first))
    assert dropped.verify(parse(second))[1] == b"second"


# --- Loading --------------------------------------------------------------------------------------


def test_keys_are_read_from_text_and_the_first_one_is_active():
    ring = Keyring.from_text(f"a:{TEXT} , b:{OTHER_TEXT}")
    assert [(key.kid, key.state) for key in ring.keys] == [("a", "active"), ("b", "verify_only")]
    assert ring.sign(b"x") == Keyring(Key("a", SECRET)).sign(b"x")


def test_the_line_that_keys_new_prints_is_refused_with_the_command_that_sets_the_variable():
    with pytest.raises(
        ConfigurationError, match=r"without SAFEDEFER_KEYS= in front; `export \$\(safedefer keys new\)`"
    ):
        Keyring.from_text(f"SAFEDEFER_KEYS=a:{TEXT}")


def test_keys_are_read_from_a_jwk_set_with_their_limits():
    first = jwk(safedefer_queues=["mail"], safedefer_patterns=["shop.*"], safedefer_pickle=True, use="sig")
    second = {"kty": "oct", "kid": "b", "k": OTHER_TEXT, "alg": "HS256"}
    ring = Keyring.from_jwks(json.dumps({"keys": [first, second], "x": 1}))
    a, b = ring.keys
    assert (a.kid, a.state, a.queues, a.patterns, a.pickle) == ("a", "active", {"mail"}, ("shop.*",), True)
    assert (b.kid, b.state, b.queues, b.patterns, b.pickle) == ("b", "verify_only", None, None, False)
    assert ring.sign(b"x") == Keyring(Key("a", SECRET)).sign(b"x")


def test_an_unknown_key_costs_the_same_work_as_a_known_one(monkeypatch):
    done = []
    monkeypatch.setattr("safedefer.keys.end_mac", lambda begun, rest: done.append(len(rest)) or end_mac(begun, rest))
    ring = Keyring(Key("a", SECRET))
    done.clear()
    token = ring.sign(b"payload")
    payload = token.split(b".")[1]
    assert done == [len(payload)]
    for forged in (token[:-43] + b"A" * 43, b"A" + token[1:]):
        with pytest.raises((BadSignature, UnknownKey)):
            ring.verify(parse(forged))
        assert done.pop() == len(payload)


def test_a_keyring_takes_keys_and_lists_of_keys():
    active, old = Key("a", bytes(range(32))), Key("b", bytes(range(1, 33)), "verify_only")
    assert Keyring([active, old]).keys == Keyring(active, old).keys == Keyring(active, [old]).keys == (active, old)


@pytest.mark.parametrize("wrong", ["a:AAAA", 5, None, [b"secret"]])
def test_what_is_no_key_is_refused_with_the_form_that_takes_texts(wrong):
    with pytest.raises(ConfigurationError, match="from_text"):
        Keyring(wrong)
