"""Target: unverified bytes through framing and MAC. Only ``RejectedTask`` may come out."""

from fuzz.audit import nothing_happens
from fuzz.common import KEYRING
from fuzz.harness import main, vectors
from safedefer.errors import MalformedToken, RejectedTask
from safedefer.keys import end_mac
from safedefer.token import Token, decode_segment, encode_segment, is_canonical


def one_input(data: bytes) -> None:
    """Parse and verify the bytes as they are, and once more as the payload of a token of our own."""
    with nothing_happens():
        try:
            token = Token.parse(data, max_bytes=1 << 20)
        except MalformedToken:
            pass
        else:
            assert b".".join((token.header, token.payload, token.mac)) == data
            if is_canonical(token.payload):
                assert encode_segment(decode_segment(token.payload)) == token.payload
            _verify(token)
        if is_canonical(data):
            assert encode_segment(decode_segment(data)) == data
        if data:
            signed = KEYRING.sign(data)
            assert KEYRING.verify(Token.parse(signed, max_bytes=len(signed)))[1] == data


def _verify(token: Token) -> None:
    try:
        key, _ = KEYRING.verify(token)
    except RejectedTask:
        return
    # Whatever is accepted, its key would have written: byte for byte, but for the header's order.
    assert end_mac(key.begin_mac(token.header + b"."), token.payload) == token.mac


def seeds() -> list[bytes]:
    """Return the tokens of the vectors."""
    return [test["token"].encode() for test in vectors()]


if __name__ == "__main__":
    main("token", one_input, seeds())
