"""Framing: one spelling for every token, and no other."""

import base64
import re

import pytest

from safedefer.errors import MalformedToken
from safedefer.token import Token, decode_segment, encode_segment, is_canonical

MAC = b"A" * 43


@pytest.mark.parametrize("length", range(20))
def test_a_segment_is_base64url_without_padding(length):
    data = bytes(range(240, 240 + length)) if length < 16 else bytes(length)
    segment = encode_segment(data)
    assert segment == base64.urlsafe_b64encode(data).rstrip(b"=")
    assert is_canonical(segment)
    assert decode_segment(segment) == data


@pytest.mark.parametrize("segment", [
    b"A", b"AAAAA", b"AB", b"AAB", b"A=", b"AA==", b"AAA=", b"AAAA=", b"A A", b"AA\n", b"\nAA", b"A+A8", b"A/A8", b"\xc3\xa9AA", b"AA.A", b"AA\0A", b"____\x7f",
    b"_x", b"AA-", b"AAA_",
][:-1])  # fmt: skip
def test_another_spelling_of_a_segment_is_refused(segment):
    assert not is_canonical(segment)
    with pytest.raises(MalformedToken, match="canonical"):
        decode_segment(segment)


def test_exactly_the_canonical_spellings_of_two_and_three_characters_pass():
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for stem, count in (("A", 4), ("AA", 16)):
        canonical = [c for c in alphabet if is_canonical((stem + c).encode())]
        assert len(canonical) == count
        for c in canonical:
            text = (stem + c).encode()
            assert encode_segment(decode_segment(text)) == text


def test_a_token_is_three_segments():
    token = Token.parse(b"aaaa.bbbb." + MAC, max_bytes=100)
    assert (token.header, token.payload, token.mac) == (b"aaaa", b"bbbb", MAC)


@pytest.mark.parametrize(("data", "why"), [
    (b"", "three segments"), (b".", "three segments"), (b"..", "impossible length"), (b"...", "three segments"), (b"aaaa.bbbb", "three segments"),
    (b"aaaa.bbbb." + MAC + b".", "three segments"), (b"aaaa.bbbb." + MAC + b".cccc", "three segments"), (b"aaaa.." + MAC, "impossible length"),
    (b"aaaa.bbbb." + MAC[1:], "impossible length"), (b"aaaa.bbbb." + MAC + b"A", "impossible length"), (b"a" * 516 + b".bbbb." + MAC, "impossible length"),
    (b"aaaa.bbbb." + MAC[1:] + b"B", "canonical"), (b"aaaa.bbb=." + MAC, "canonical"), (b"aaa=.bbbb." + MAC, "canonical"), (b"aaaa.b." + MAC, "canonical"),
    (b"aaaa.bbbb." + MAC[1:] + b"\n", "canonical"), (b"\xef\xbb\xbfaaaa.bbbb." + MAC, "canonical"), ("aaaa.bbbb.".encode("utf-16") + MAC, "impossible length"),
    (b"aaaa.bb\0b." + MAC, "canonical"), (b" aaaa.bbbb." + MAC, "canonical"), (b'{"protected":"aaaa","payload":"bbbb"}', "three segments"),
    (b"aaaa.bbbb." + b"A" * 100, "size limit"), ("aaaa.bbbb." + "A" * 43, "bytes"), (bytearray(b"aaaa.bbbb." + MAC), "bytes"), (memoryview(b"aaaa.bbbb." + MAC), "bytes"),
    (None, "bytes"), (3, "bytes"),
])  # fmt: skip
def test_what_is_not_three_canonical_segments_is_malformed(data, why):
    with pytest.raises(MalformedToken, match=why) as caught:
        Token.parse(data, max_bytes=100 if why == "size limit" else 600).check_spelling()
    assert "; " in str(caught.value)


def test_the_size_limit_is_exact():
    data = b"aaaa.bbbb." + MAC
    assert Token.parse(data, max_bytes=len(data))
    with pytest.raises(MalformedToken, match="size limit"):
        Token.parse(data, max_bytes=len(data) - 1)


def test_a_header_may_be_as_long_as_the_longest_key_name_needs():
    assert Token.parse(b"a" * 512 + b".bbbb." + MAC, max_bytes=600).header == b"a" * 512


def test_a_token_shows_neither_its_payload_nor_its_mac():
    assert re.fullmatch(r"Token\(header=b'aaaa'\)", repr(Token.parse(b"aaaa.bbbb." + MAC, max_bytes=100)))
