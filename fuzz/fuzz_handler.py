"""Target: the whole handler. An audit hook proves that nothing outside the policy is imported, run or opened."""

import asyncio

from fuzz import fuzz_claims, fuzz_token
from fuzz.audit import nothing_happens
from fuzz.common import KEYRING, URL, make_app
from fuzz.harness import main

_LOOP = asyncio.new_event_loop()
_APP = make_app()
_STATUSES = {200, 403, 405, 408, 409, 413, 415, 500, 503}
_UNSIGNED = {403, 405, 413, 415}


def _warm_up() -> None:
    # Threads and lazy imports of the standard library are started by the first task.
    ok = next(test for test in fuzz_token.vectors() if test["comment"] == "coroutine function")
    _handle({"Content-Type": "application/jose"}, ok["token"].encode(), "POST")


def _handle(headers: dict[str, str], body: bytes, method: str) -> tuple[int, dict[str, str], bytes]:
    return tuple(_LOOP.run_until_complete(_APP.handle(headers, body, path=URL, method=method)))  # type: ignore[return-value]


def one_input(data: bytes) -> None:
    """Post a request. The first byte says what the rest is: a body, a payload to sign, a request with headers."""
    how, rest = data[:1], data[1:]
    headers, method = {"Content-Type": "application/jose"}, "POST"
    body, signed = rest, False
    if how == b"s" and rest:
        body, signed = KEYRING.sign(rest), True
    elif how == b"h":
        head, _, body = rest.partition(b"\n\n")
        lines = head.decode("latin-1").split("\n")
        method = lines[0]
        headers |= {name: value for name, _, value in (line.partition(":") for line in lines[1:])}
    with nothing_happens():
        status, answer, text = _handle(headers, body, method)
    assert status in _STATUSES, status
    outcome = answer["Safedefer-Outcome"]
    assert text == f"{outcome}\n".encode()
    if status in _UNSIGNED:
        assert (outcome, text) == ("refused", b"refused\n")
    if not signed and how != b"h":
        assert status != 500 or body in _KNOWN, "an unsigned body got as far as the claims"


_KNOWN = set(fuzz_token.seeds())
_warm_up()


def seeds() -> list[bytes]:
    """Return the tokens and payloads of the vectors, and requests with headers."""
    tokens, payloads = fuzz_token.seeds(), fuzz_claims.seeds()
    good = tokens[0]
    return [
        *(b"t" + token for token in tokens),
        *(b"s" + payload for payload in payloads),
        b"hGET\n\n" + good,
        b"hPOST\nContent-Encoding:gzip\n\n" + good,
        b"hPOST\nX-AppEngine-QueueName:mail\n\n" + good,
        b"hPOST\nX-AppEngine-TaskRetryCount:99999999999\nx-appengine-taskretrycount:2\n\n" + good,
        b"hPOST\ncontent-type:text/plain\n\n" + good,
    ]


if __name__ == "__main__":
    main("handler", one_input, seeds())
