"""Texts that are sealed for a purpose: what a key ring signs besides tasks."""

import pytest

from safedefer.dashboard.seals import seal, unseal
from safedefer.errors import ConfigurationError, MalformedToken
from safedefer.keys import Key, Keyring
from safedefer.token import Token

SECRET, OTHER = bytes(range(32)), bytes(range(100, 132))
RING = Keyring(Key("a", SECRET))


def test_a_sealed_text_comes_back_for_its_purpose_alone():
    sealed = seal(RING, b"login", b'{"x":1}')
    assert unseal(RING, b"login", sealed) == b'{"x":1}'
    assert unseal(RING, b"session", sealed) is None
    assert unseal(RING, b"logi", sealed) is None


def test_a_sealed_text_is_no_token_and_a_token_is_no_sealed_text():
    token = RING.sign(b"{}")
    assert unseal(RING, b"login", token) is None
    header, payload, mac = token.split(b".")
    assert unseal(RING, b"", b".".join((b"a", payload, mac))) is None
    kid, text, mac = seal(RING, b"login", b"{}").split(b".")
    with pytest.raises(Exception, match="signature|unknown|length|no key"):
        RING.verify(Token.parse(b".".join((header, text, mac)), 10_000))


@pytest.mark.parametrize("position", range(0, 60, 7))
def test_any_change_is_refused(position):
    sealed = seal(RING, b"login", b"some text of a session")
    changed = bytearray(sealed)
    changed[position] = ord("A") if changed[position] != ord("A") else ord("B")
    assert unseal(RING, b"login", bytes(changed)) is None


@pytest.mark.parametrize("text", [b"", b"a", b"a.b", b"a.b.c.d", b"..", b"b.e30.x", b"\xff.\xff.\xff"])
def test_what_is_not_sealed_is_refused(text):
    assert unseal(RING, b"login", text) is None


def test_a_key_that_only_verifies_reads_and_a_revoked_one_does_not():
    sealed = seal(RING, b"login", b"x")
    assert unseal(Keyring(Key("b", OTHER), Key("a", SECRET, "verify_only")), b"login", sealed) == b"x"
    assert unseal(Keyring(Key("b", OTHER), Key("a", SECRET, "revoked")), b"login", sealed) is None
    assert unseal(Keyring(Key("a", OTHER)), b"login", sealed) is None


@pytest.mark.parametrize("limit", [{"queues": ["mail"]}, {"patterns": ["shop.tasks:*"]}])
def test_a_key_with_limits_neither_seals_nor_is_believed(limit):
    with pytest.raises(ConfigurationError, match="limited"):
        seal(Keyring(Key("a", SECRET, **limit)), b"login", b"x")
    sealed = seal(RING, b"login", b"x")
    assert unseal(Keyring(Key("b", OTHER), Key("a", SECRET, "verify_only", **limit)), b"login", sealed) is None


def test_a_sealed_text_that_is_not_canonical_is_refused():
    # Only a holder of the key can write one.
    from safedefer.keys import end_mac

    mac = end_mac(RING.active.begin_mac(b"login\0"), b"e30=")
    with pytest.raises(MalformedToken):
        unseal(RING, b"login", b"a.e30=." + mac)
