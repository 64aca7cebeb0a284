"""Other JOSE libraries read what we sign, and whatever we accept none of them refuses."""

import json

import joserfc.jws
import jwcrypto.jwk
import jwcrypto.jws
import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import OctKey

from safedefer.errors import RejectedTask
from safedefer.keys import Key, Keyring
from safedefer.token import Token
from tests.schema import vectors
from tests.strategies import plain_trees

_REGISTRY = joserfc.jws.JWSRegistry(algorithms=["HS256"])
_REGISTRY.max_payload_length = 2**20  # joserfc's own limit is below ours


def _pyjwt(token, secret):
    return jwt.api_jws.decode_complete(token, secret, algorithms=["HS256"])["payload"]


def _joserfc(token, secret):
    return joserfc.jws.deserialize_compact(token, OctKey.import_key(secret), registry=_REGISTRY).payload


def _jwcrypto(token, secret):
    jws = jwcrypto.jws.JWS()
    jws.deserialize(token.decode(), jwcrypto.jwk.JWK(kty="oct", k=vectors.encode(secret)), alg="HS256")
    return jws.payload


LIBRARIES = {"PyJWT": _pyjwt, "joserfc": _joserfc, "jwcrypto": _jwcrypto}

kids = st.text("ABCXYZabcxyz0189_-", min_size=1, max_size=64)
secrets = st.binary(min_size=32, max_size=80).filter(lambda secret: len(set(secret)) > 16)


def _ring(kid, secret):
    try:
        return Keyring(Key(kid, secret))
    except ValueError:  # it repeats itself, or looks like a placeholder
        return None


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_verifies_every_token_of_ours(name):
    @settings(max_examples=60, deadline=None)
    @given(kids, secrets, plain_trees)
    def check(kid, secret, tree):
        ring = _ring(kid, secret)
        if ring is not None:
            payload = json.dumps({"args": [tree]}).encode()
            assert LIBRARIES[name](ring.sign(payload), secret) == payload

    check()


@st.composite
def tampered(draw):
    """Tokens of ours with a few characters changed, removed or added, or a header in another order."""
    order = draw(st.permutations(range(3)))
    token = bytearray(vectors.mint(draw(st.binary(min_size=1, max_size=40)), head=vectors.header(order=order)).encode())
    for _ in range(draw(st.integers(0, 2))):
        position = draw(st.integers(0, len(token)))
        replaced = draw(st.integers(0, 1))
        token[position : position + replaced] = draw(
            st.sampled_from([b"", b"A", b"=", b".", b"-", b"\n", b" ", b"+", b"/", b"\xff"])
        )
    return bytes(token)


@settings(max_examples=300, deadline=None)
@given(tampered())
def test_nothing_that_we_accept_is_refused_or_read_otherwise_by_any_of_them(token):
    ring = Keyring.from_jwks(json.dumps(vectors.jwks()))
    try:
        payload = ring.verify(Token.parse(token, max_bytes=2**20))[1]
    except RejectedTask:
        return
    for name, read in LIBRARIES.items():
        assert read(token, vectors.secret("now")) == payload, name


def test_the_control_of_that_property_accepts_some_and_refuses_some():
    ring = Keyring.from_jwks(json.dumps(vectors.jwks()))
    good = vectors.mint(b"x").encode()
    assert ring.verify(Token.parse(good, max_bytes=1000))[1] == b"x"
    for name, read in LIBRARIES.items():
        assert read(good, vectors.secret("now")) == b"x", name
        with pytest.raises(Exception):
            read(good[:-3] + b"AAA", vectors.secret("now"))


MINTED = {
    "PyJWT": lambda claims, secret: jwt.encode(claims, secret, "HS256", headers={"typ": "safedefer+jwt", "kid": "now"}),
    "joserfc": lambda claims, secret: joserfc.jws.serialize_compact(
        {"typ": "safedefer+jwt", "kid": "now", "alg": "HS256"},
        vectors.compact(claims),
        OctKey.import_key(secret),
        registry=_REGISTRY,
    ),
    "jwcrypto": lambda claims, secret: _jwcrypto_mint(claims, secret),
}


def _jwcrypto_mint(claims, secret):
    jws = jwcrypto.jws.JWS(vectors.compact(claims))
    head = json.dumps({"kid": "now", "alg": "HS256", "typ": "safedefer+jwt"}, separators=(",", ":"))
    jws.add_signature(jwcrypto.jwk.JWK(kty="oct", k=vectors.encode(secret)), None, head)
    return jws.serialize(compact=True)


@pytest.mark.parametrize("name", MINTED)
def test_a_task_that_a_foreign_library_minted_runs(name):
    from tests.adversarial.forge import make_app

    app = make_app()
    token = MINTED[name](vectors.claims(args=["é"]), vectors.secret("now"))
    assert app.run(token.encode()) == (("é",), {})
    app.close()
