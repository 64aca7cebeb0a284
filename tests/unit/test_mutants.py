"""What no test had noticed when mutation testing changed it."""

import tracemalloc
from base64 import urlsafe_b64decode

import pytest

from safedefer.errors import MalformedToken
from safedefer.keys import Key, Keyring
from safedefer.token import Token, decode_segment, encode_segment


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
