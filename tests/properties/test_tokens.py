"""Properties of tokens: what is signed comes back, and nothing near it does."""

import base64
import json

import jwt
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from joserfc import jws as joserfc_jws
from joserfc.jwk import OctKey
from jwcrypto import jwk as jwcrypto_jwk
from jwcrypto import jws as jwcrypto_jws

from safedefer.claims import Claims, adapter, read_claims, write_json
from safedefer.errors import (
    BadSignature,
    InvalidClaims,
    MalformedToken,
    NotDeferrable,
    RejectedTask,
    UnknownKey,
    UnresolvableCallable,
)
from safedefer.keys import Key, Keyring
from safedefer.options import Limits, Options, Serves, TaskRetryOptions
from safedefer.policy import Policy
from safedefer.refs import CallableRef, bound_object
from safedefer.signing import Signer, Verifier
from safedefer.task import VerifiedTask
from safedefer.token import Token, decode_segment, encode_segment, is_canonical
from tests import strategies as own

SECRET = bytes(range(200, 250))
RING = Keyring(Key("a", SECRET, pickle=True))
NOW = 1_700_000_000
POLICY = Policy("tests.zoo.callables")
LIMITS = Limits()
VERIFIER = Verifier(RING, POLICY, serves=Serves(environment="prod"), limits=LIMITS)
CLAIMS = adapter().validate_python({
    "v": 1, "jti": "a" * 32, "iat": NOW, "nbf": NOW, "exp": NOW + 100, "aud": "prod:default:default:/u", "cty": "typed",
    "call": {"kind": "function", "module": "tests.zoo.callables", "qualname": "function"}, "args": ["é", 1, None], "kwargs": {"a": [True]},
})  # fmt: skip
TOKEN = Signer(RING, POLICY, limits=LIMITS).sign(CLAIMS)


def parse(data):
    return Token.parse(data, max_bytes=2**20)


def refused(data):
    """Assert that a token is refused by the MAC or before it."""
    with pytest.raises(RejectedTask) as caught:
        VERIFIER.verify(data, url="/u", now=NOW)
    assert type(caught.value) in (MalformedToken, UnknownKey, BadSignature)
    assert not caught.value.authentic


# --- Round trips ----------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_a_segment_comes_back(data):
    assert decode_segment(encode_segment(data)) == data


@given(st.text("AQgwBCDabcd019-_=+/ \n.é", max_size=9))
def test_a_segment_is_canonical_exactly_if_encoding_gives_it_back(text):
    data = text.encode()
    try:
        decoded = base64.b64decode(data + b"=" * (-len(data) % 4), altchars=b"-_", validate=True)
        expected = base64.urlsafe_b64encode(decoded).rstrip(b"=") == data
    except ValueError:
        expected = False
    assert is_canonical(data) is expected


@given(own.payloads())
def test_any_right_payload_comes_back_as_it_was(payload):
    claims, _ = read_claims(json.dumps(payload).encode())
    assert json.loads(write_json(claims)) == payload
    assert read_claims(write_json(claims)) == (claims, True)
    assert claims["aud"] == payload["aud"]


@given(own.payloads(), own.secrets)
def test_a_signed_payload_verifies_under_its_key_alone(payload, secret):
    assume(secret != SECRET)
    data = json.dumps(payload).encode()
    token = Keyring(Key("a", secret)).sign(data)
    assert Keyring(Key("a", secret)).verify(parse(token))[1] == data
    with pytest.raises(BadSignature):
        RING.verify(parse(token))


@given(own.payloads(), st.data())
def test_a_payload_without_one_member_or_with_one_more_is_refused_unless_it_may_be_absent(payload, data):
    name = data.draw(st.sampled_from(sorted(payload)))
    less = {key: value for key, value in payload.items() if key != name}
    if name in {"name", "retry_of"}:
        assert read_claims(json.dumps(less).encode())
    else:
        with pytest.raises(InvalidClaims):
            read_claims(json.dumps(less).encode())
    extra = data.draw(st.text(max_size=8).filter(lambda text: text not in Claims.__annotations__))
    with pytest.raises(InvalidClaims):
        read_claims(json.dumps(payload | {extra: 1}).encode())
    twice = json.dumps(payload)[:-1] + f",{json.dumps(name)}:{json.dumps(payload[name])}}}"
    with pytest.raises(InvalidClaims):
        read_claims(twice.encode())


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | own.json_values.map(json.dumps).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 100_000)
@example(b'{"v":1e999}')
def test_any_other_payload_is_refused_and_by_no_other_error(data):
    with pytest.raises(InvalidClaims):
        read_claims(data)


# --- Anything near a token ------------------------------------------------------------------------


def test_flipping_any_one_bit_of_a_token_is_refused():
    for position in range(len(TOKEN)):
        for bit in range(8):
            refused(TOKEN[:position] + bytes([TOKEN[position] ^ (1 << bit)]) + TOKEN[position + 1 :])


def test_truncating_a_token_anywhere_is_refused():
    for length in range(len(TOKEN)):
        refused(TOKEN[:length])
        refused(TOKEN[length + 1 :])


@given(
    st.integers(0, len(TOKEN)),
    st.binary(min_size=1, max_size=8) | st.sampled_from([b".", b"A", b"=", b"\n", b" ", b"AAAA", TOKEN]),
)
def test_inserting_anything_into_a_token_is_refused(position, extra):
    changed = TOKEN[:position] + extra + TOKEN[position:]
    assume(changed != TOKEN)
    refused(changed)


@given(st.integers(0, len(TOKEN) - 1), st.integers(0, len(TOKEN) - 1))
def test_swapping_two_bytes_of_a_token_is_refused(one, two):
    data = bytearray(TOKEN)
    data[one], data[two] = data[two], data[one]
    assume(bytes(data) != TOKEN)
    refused(bytes(data))


@given(
    st.binary(max_size=300)
    | st.lists(st.binary(max_size=60).map(encode_segment), min_size=3, max_size=3).map(b".".join)
)
def test_anything_else_is_refused(data):
    refused(data)


@given(own.payloads())
def test_segments_of_two_tokens_do_not_mix(payload):
    other = RING.sign(json.dumps(payload).encode())
    (a, b, c), (x, y, z) = TOKEN.split(b"."), other.split(b".")
    assume(b != y)
    refused(b".".join((a, b, z)))
    refused(b".".join((x, y, c)))


# --- Callables and options ------------------------------------------------------------------------


@given(own.accepted_callables)
def test_a_reference_survives_its_text_and_leads_back(obj):
    ref = CallableRef.of(obj)
    read = CallableRef.model_validate_json(ref.model_dump_json())
    assert read == ref
    assert read.parts == ref.parts
    found = read.resolve(bound_object(obj))
    assert CallableRef.of(found).parts == ref.parts


@given(own.refused_callables)
def test_a_refused_callable_is_refused_by_its_reason(row):
    obj, reason = row
    with pytest.raises(NotDeferrable) as caught:
        CallableRef.of(obj)
    assert caught.value.reason == reason


@given(own.calls().filter(lambda call: "bound" not in call))
def test_a_reference_to_nothing_never_resolves_and_raises_nothing_else(call):
    ref = CallableRef.model_validate(call)
    assume(ref.module not in ("_", "__main__"))
    with pytest.raises(UnresolvableCallable):
        ref.model_copy(update={"module": f"zoo_absent.{ref.module}"}).resolve()


@given(own.options, st.floats(0, 2**31))
def test_options_are_due_between_now_and_30_days(options, now):
    assert now <= options.due(now) <= now + 30 * 86_400
    assert options.path.startswith("/")
    if options.retry_options is not None:
        assert TaskRetryOptions.from_given(options.retry_options.given()) == options.retry_options
    assert isinstance(options, Options)


# --- Other libraries ------------------------------------------------------------------------------

JWK = jwcrypto_jwk.JWK(kty="oct", k=encode_segment(SECRET).decode())
JOSERFC = OctKey.import_key(SECRET)


def by_pyjwt(token):
    return jwt.decode(
        token.decode(),
        SECRET,
        algorithms=["HS256"],
        options={"verify_aud": False, "verify_exp": False, "verify_nbf": False, "verify_iat": False},
    )


def by_joserfc(token):
    return json.loads(joserfc_jws.deserialize_compact(token, JOSERFC, algorithms=["HS256"]).payload)


def by_jwcrypto(token):
    found = jwcrypto_jws.JWS()
    found.deserialize(token.decode(), JWK)
    return json.loads(found.payload)


@pytest.mark.parametrize("read", [by_pyjwt, by_joserfc, by_jwcrypto])
@given(own.payloads())
def test_other_libraries_verify_what_we_sign(read, payload):
    assert read(RING.sign(json.dumps(payload).encode())) == payload


def with_pyjwt(payload, kid):
    return jwt.encode(payload, SECRET, "HS256", headers={"kid": kid, "typ": "safedefer+jwt"}).encode()


def with_joserfc(payload, kid):
    return joserfc_jws.serialize_compact(
        {"typ": "safedefer+jwt", "kid": kid, "alg": "HS256"}, json.dumps(payload), JOSERFC
    ).encode()


def with_jwcrypto(payload, kid):
    made = jwcrypto_jws.JWS(json.dumps(payload))
    made.add_signature(JWK, None, '{"kid":"%s","alg":"HS256","typ":"safedefer+jwt"}' % kid, None)
    return made.serialize(compact=True).encode()


@pytest.mark.parametrize("mint", [with_pyjwt, with_joserfc, with_jwcrypto])
@given(own.payloads())
def test_what_other_libraries_mint_verifies_here(mint, payload):
    assert json.loads(RING.verify(parse(mint(payload, "a")))[1]) == payload
    with pytest.raises(UnknownKey):
        RING.verify(parse(mint(payload, "b")))


@pytest.mark.parametrize("mint", [with_pyjwt, with_joserfc, with_jwcrypto])
def test_a_task_that_another_library_minted_runs_under_the_same_checks(mint):
    task = VERIFIER.verify(mint(CLAIMS, "a"), url="/u", now=NOW)
    assert isinstance(task, VerifiedTask)
    assert task.claims == CLAIMS


@given(st.data())
def test_nothing_that_we_accept_is_refused_by_the_others(data):
    segments = TOKEN.split(b".")
    place = data.draw(st.integers(0, 2))
    change = data.draw(st.sampled_from([b"", b"=", b"\n", b"A", b" "]))
    segments[place] += change
    token = b".".join(segments)
    try:
        RING.verify(parse(token))
    except RejectedTask:
        assert change
        return
    for read in (by_pyjwt, by_joserfc, by_jwcrypto):
        assert read(token)
