"""Target: the payload of a verified token. ``InvalidClaims``, or claims that say what the JSON says."""

import json

from fuzz.audit import nothing_happens
from fuzz.harness import main, vectors
from safedefer.claims import CANONICAL_BRACKETS, adapter, read_claims, write_json
from safedefer.errors import InvalidClaims
from safedefer.token import decode_segment

adapter()  # made at the first token, which imports a part of pydantic


def one_input(data: bytes) -> None:
    """Parse a payload, and compare with Python's own JSON parser."""
    with nothing_happens():
        try:
            claims, canonical = read_claims(data)
        except InvalidClaims:
            return
    text = data.decode()  # strict: no overlong forms, no surrogates
    document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_refuse)
    assert claims == document
    assert claims["nbf"] <= claims["exp"]
    try:
        json.dumps(document, allow_nan=False)
        again = write_json(claims)
    except (TypeError, ValueError):  # raw integers beyond 53 bits and 1e999 are refused by the typed codec
        assert not canonical
        return
    deep = data.count(b"[") + data.count(b"{") > CANONICAL_BRACKETS
    assert canonical is (again == data) or deep
    found, canonical = read_claims(again)
    assert found == claims
    assert canonical or deep


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    assert len(found) == len(pairs), "a duplicate member was accepted"
    return found


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} was accepted")


def seeds() -> list[bytes]:
    """Return the payloads of the vectors."""
    unread = {"malformed-token", "unknown-key", "bad-signature"}
    tokens = [test["token"].encode() for test in vectors() if test.get("slug") not in unread]
    return [decode_segment(token.split(b".")[1]) for token in tokens]


if __name__ == "__main__":
    main("claims", one_input, seeds())
