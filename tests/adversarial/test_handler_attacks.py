"""A network caller without a key: what the handler gives away, and what a request costs it."""

import asyncio
import gc
import gzip
import importlib
import json
import logging
import os
import pickle
import random
import re
import time
import tracemalloc
import zlib
from types import FrameType, TracebackType

import jiter
import orjson
import pytest
from aiohttp import web

import safedefer.claims
import safedefer.keys
import safedefer.refs
import safedefer.signing
import safedefer.web.handler
from fuzz.audit import nothing_happens
from safedefer.codecs.typed import TypedCodec
from safedefer.web.server import _Discreet, serving
from tests.adversarial import victim
from tests.adversarial.forge import HEADERS, NOW, URL, call, make_app, mint, post
from tests.schema import vectors

#: The whole proof is a hundred thousand requests; CI and everyday runs make do with a part.
FORGERIES = int(os.environ.get("SAFEDEFER_FORGERIES", "5000"))

UNAUTHENTIC = {
    "malformed-token",
    "unknown-key",
    "bad-signature",
    "revoked-key",
    "wrong-audience",
    "capability-exceeded",
}


@pytest.fixture
def app():
    app = make_app()
    app.delivery  # the policy's modules are imported before the first request
    yield app
    app.close()


class ParserReached(Exception):
    pass


@pytest.fixture
def no_parser(monkeypatch):
    """Every parser, decoder and importer raises."""

    def reached(*args, **kwargs):
        raise ParserReached

    for place, name in (
        (jiter, "from_json"),
        (orjson, "loads"),
        (json, "loads"),
        (safedefer.claims, "adapter"),
        (safedefer.signing, "read_claims"),
        (safedefer.keys, "decode_segment"),
        (TypedCodec, "decode"),
        (importlib, "import_module"),
        (safedefer.refs, "import_module"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (zlib, "decompress"),
        (zlib, "decompressobj"),
        (gzip, "decompress"),
    ):
        monkeypatch.setattr(place, name, reached)


def forgeries(count):
    """Tokens without a right MAC: changed ones, ones of other keys, and noise."""
    source = random.Random(4)
    good = [mint(), mint(kid="before", args=["x" * 50]), mint(call=call("other"))]
    for number in range(count):
        token = bytearray(source.choice(good))
        kind = number % 6
        if kind == 0:
            token[source.randrange(len(token))] ^= 1 << source.randrange(8)
        elif kind == 1:
            at = source.randrange(len(token))
            token[at : at + source.randrange(1, 9)] = source.randbytes(source.randrange(9))
        elif kind == 2:
            token[-43:] = vectors.encode(source.randbytes(32)).encode()
        elif kind == 3:
            token = bytearray(vectors.mint(source.randbytes(40), mac=source.randbytes(32)).encode())
        elif kind == 4:
            token = bytearray(
                vectors.mint(vectors.claims(), head=vectors.header(alg="none"), mac=source.randbytes(32)).encode()
            )
        else:
            token = bytearray(source.randbytes(source.randrange(200)))
        if bytes(token) not in good:
            yield bytes(token)


def test_no_parser_runs_before_the_mac_is_verified(app, no_parser, ran):
    async def attack():
        answers = set()
        with nothing_happens():
            for token in forgeries(FORGERIES):
                status, headers, body = await app.handle(HEADERS, token, path=URL)
                answers.add((status, tuple(sorted(headers.items())), body))
        return answers

    answers = asyncio.run(attack())
    assert answers == {(403, (("Safedefer-Outcome", "refused"),), b"refused\n")}
    assert ran == []


def test_the_parsers_of_that_proof_do_run_for_a_token_with_a_right_mac(app, no_parser):
    """The control: without it, the proof could not fail."""
    status, headers, _ = post(app, mint())
    assert (status, headers["Safedefer-Outcome"]) == (500, "retry")


def test_forged_requests_leave_nothing_to_the_garbage_collector(app):
    """An exception whose traceback holds its own frame would keep every forged body until the collector comes."""

    async def attack():
        for _ in range(20):
            await app.handle(HEADERS, mint()[:-4] + b"AAAA", path=URL)
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.disable()
        try:
            for _ in range(20):
                await app.handle(HEADERS, mint()[:-4] + b"AAAA", path=URL)
            gc.collect()
            return [found for found in gc.garbage if isinstance(found, BaseException | FrameType | TracebackType)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    # Only what can hold a body: the test run's own tools (coverage, threads of other tests) leave other objects.
    assert asyncio.run(attack()) == []


def test_every_unauthentic_token_gets_the_same_answer(app):
    refused = [test for test in vectors.invalid()["tests"] if test["slug"] in UNAUTHENTIC]
    answers = set()
    for test in refused:
        if test.get("stored") is None and test["token"]:
            hint = {"X-AppEngine-QueueName": test["queue"]} if "queue" in test else {}
            status, headers, body = post(app, test["token"].encode(), hint, path=test.get("url", URL))
            answers.add((status, tuple(sorted(headers.items())), body))
    assert answers == {(403, (("Safedefer-Outcome", "refused"),), b"refused\n")}
    assert len(refused) > 100


# --- What is logged and answered ------------------------------------------------------------------

SECRET = "s3cr3t-argument\r\nSet-Cookie: owned=1\x1b[31m"


def everything_said(caplog, *answers):
    lines = [record.getMessage() for record in caplog.records]
    told = [repr(answer) for answer in answers]
    return lines, "\n".join([*lines, *told, caplog.text])


def test_answers_and_logs_hold_no_argument_no_exception_text_no_key_and_no_token(app, caplog, ran):
    caplog.set_level(logging.DEBUG)
    answers = []
    for number, name in enumerate(("note", "fail", "stumble", "other")):
        token = mint(call=call(name), args=[SECRET], jti=f"{number:032x}", name=f"n{number}")
        answers.append(post(app, token))
        answers.append(post(app, token[:-5] + b"AAAAA"))
    assert [answer[0] for answer in answers] == [200, 403, 200, 403, 500, 403, 200, 403]
    lines, said = everything_said(caplog, *answers)
    assert len(ran) == 4
    for text in (
        "s3cr3t",
        "Set-Cookie",
        "eyJ",
        "the task says no",
        "ValueError(",
        vectors.encode(vectors.secret("now")),
    ):
        assert text not in said
    assert vectors.secret("now").hex() not in said
    assert lines
    assert all(re.fullmatch(r"[ -~]*", line) for line in lines)


def test_no_log_line_of_a_refused_token_has_anything_of_the_request(app, caplog):
    caplog.set_level(logging.DEBUG)
    for test in vectors.invalid()["tests"]:
        if test["slug"] in UNAUTHENTIC and test["token"]:
            post(app, test["token"].encode(), {"X-Forwarded-For": "evil\r\nline", "X-AppEngine-QueueName": "a\nb"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("safedefer")]
    assert len(lines) > 3
    assert set(lines) <= {f"request refused: {slug}" for slug in UNAUTHENTIC}
    assert len(set(lines)) == len(lines)


def test_a_flood_of_forgeries_makes_no_flood_of_lines(app, caplog):
    caplog.set_level(logging.DEBUG)
    token = mint()
    for _ in range(300):
        assert post(app, token[:-4] + b"AAAA").status == 403
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("safedefer")]
    assert lines == ["request refused: bad-signature"]


def test_what_is_recorded_of_an_attempt_holds_the_exception_but_neither_token_nor_control_characters(app, ran):
    text = f"about {mint().decode()}\x1b[2J\0"
    task = app.defer(victim.stumble, text)
    assert post(app, task.payload)[0] == 500
    (record,) = app.queue.find(task.id).records
    assert record.exception_type == "builtins.ValueError"
    assert "ValueError: about [token]" in record.traceback
    assert "eyJ" not in record.traceback
    assert "\x1b" not in record.traceback
    assert "\0" not in record.traceback


# --- Over HTTP -----------------------------------------------------------------------------------


async def talk(url, *pieces, pause=0.0, until=120.0):
    """Send bytes as they are, and return all that comes back, and how many bytes were taken."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    sent = 0
    answer = b""
    try:
        for piece in pieces:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
        answer = await asyncio.wait_for(reader.read(), until)
    except ConnectionError:  # hung up on, maybe with an answer that was sent before
        answer = bytes(reader._buffer)
    finally:
        writer.transport.abort()
    return answer, sent


def request(*lines, body=b"", path=URL):
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *lines, "", ""]).encode() + body


async def raw(app, *pieces, **options):
    async with serving(app, "127.0.0.1", 0) as url:
        return await talk(url, *pieces, **options)


JOSE = "Content-Type: application/jose"


def length(body):
    return f"Content-Length: {len(body)}"


TOKEN = mint()

#: Request, and the status of its answer.
REQUESTS = {
    "a good one": (request(JOSE, length(TOKEN), body=TOKEN), 200),
    "GET": (request(JOSE).replace(b"POST", b"GET"), 405),
    "gzip": (request(JOSE, "Content-Encoding: gzip", length(b"x"), body=b"x"), 415),
    "identity is an encoding too": (request(JOSE, "Content-Encoding: identity", length(TOKEN), body=TOKEN), 415),
    "another type": (request("Content-Type: text/plain", length(TOKEN), body=TOKEN), 415),
    "no type": (request(length(TOKEN), body=TOKEN), 415),
    "JSON": (request("Content-Type: application/json", length(b"{}"), body=b"{}"), 415),
    "two types": (request(JOSE, "Content-Type: text/plain", length(TOKEN), body=TOKEN), 400),
    "two queues, of which one is right": (
        request(JOSE, "X-AppEngine-QueueName: default", "X-AppEngine-QueueName: mail", length(TOKEN), body=TOKEN),
        403,
    ),
    "the right queue twice": (
        request(JOSE, "X-AppEngine-QueueName: default", "x-appengine-queuename: default", length(TOKEN), body=TOKEN),
        403,
    ),
    "a length over the limit": (request(JOSE, "Content-Length: 999999999"), 413),
    "two lengths": (request(JOSE, length(TOKEN), "Content-Length: 1", body=TOKEN), 400),
    "a length and chunks": (request(JOSE, length(TOKEN), "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
    "a negative length": (request(JOSE, "Content-Length: -1", body=TOKEN), 400),
    "a header of 10,000 bytes": (request(JOSE, f"X-Big: {'x' * 10_000}", length(TOKEN), body=TOKEN), 400),
    "a query, which is no part of the path": (request(JOSE, length(TOKEN), body=TOKEN, path=f"{URL}?x=1"), 200),
    "a query instead of the path": (request(JOSE, length(TOKEN), body=TOKEN, path=f"/?{URL}"), 404),
    "the URL escaped": (request(JOSE, length(TOKEN), body=TOKEN, path="/_ah/queue/%64eferred"), 403),
    "the URL with a dot segment": (request(JOSE, length(TOKEN), body=TOKEN, path="/_ah/queue/./deferred"), 404),
    "an empty body": (request(JOSE, "Content-Length: 0"), 403),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_is_answered_with_its_status(app, name, ran):
    data, status = REQUESTS[name]
    answer, _ = await raw(app, data)
    assert int(answer.split(b" ", 2)[1]) == status
    assert len(ran) == (status == 200)


async def test_a_gzip_bomb_is_refused_before_it_is_inflated(app, monkeypatch):
    inflated = []
    monkeypatch.setattr(zlib, "decompressobj", lambda *a, **k: inflated.append(a))
    bomb = gzip.compress(bytes(50_000_000))
    answer, _ = await raw(app, request(JOSE, "Content-Encoding: gzip", length(bomb), body=bomb))
    assert b" 415 " in answer
    assert inflated == []


async def test_a_gzip_bomb_keeps_no_memory_in_a_server_of_the_user_s_that_inflates(app):
    """``app.routes()`` in an application of aiohttp as it comes, which inflates what it reads."""
    web_app = web.Application()
    web_app.add_routes(app.routes())
    runner = web.AppRunner(web_app, lingering_time=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    bomb = gzip.compress(bytes(50_000_000))
    tracemalloc.start()
    answer, _ = await talk(f"http://{host}:{port}", request(JOSE, "Content-Encoding: gzip", length(bomb), body=bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    await runner.cleanup()
    assert b" 415 " in answer
    assert peak < 8 * 2**20, "of 50 MB"


async def test_chunks_without_a_length_stop_at_the_limit(app, monkeypatch):
    """What is over the limit is thrown away for a second, so that the sender sees the answer; none of it is kept."""
    kept = []
    too_large = app.delivery.too_large
    monkeypatch.setattr(app.delivery, "too_large", lambda: kept.append(tracemalloc.get_traced_memory()) or too_large())
    chunk = b"10000\r\n" + b"A" * 65_536 + b"\r\n"
    tracemalloc.start()
    try:
        began = time.monotonic()
        answer, _ = await raw(app, request(JOSE, "Transfer-Encoding: chunked"), *[chunk] * 800)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 60
    assert answer == b"" or b" 413 " in answer
    assert len(kept) == 1
    assert peak < 12 * 2**20, "of 50 MiB"


async def test_a_body_that_stalls_and_one_that_trickles_time_out(app, monkeypatch, ran):
    monkeypatch.setattr(safedefer.web.body, "BODY_TIMEOUT", 0.3)
    head = request(JOSE, length(TOKEN))
    stalled = raw(app, head, TOKEN[:10])
    trickled = raw(app, head, *(bytes([byte]) for byte in TOKEN), pause=0.1)
    for answer, sent in await asyncio.gather(stalled, trickled):
        assert answer == b"" or b" 408 " in answer
        assert sent < len(head) + len(TOKEN)
    assert ran == []


async def test_every_refusal_looks_the_same_on_the_wire(app):
    tokens = [
        TOKEN[:-1] + b"!",
        TOKEN[1:],
        mint(kid="stolen"),
        mint(aud=f"prod:default:default:{URL}"),
        mint(kid="mail-only"),
        # After the ledger and the decoder: a key's patterns, and the id of another task.
        mint(kid="narrow", args=[{"$class": "tests.adversarial.victim:Other"}]),
        mint(jti="a" * 32, args=[2]),
        b"",
        b"." * 70_000,
        TOKEN[:-1] + (b"A" if TOKEN[-1:] != b"A" else b"B") + b"A" * 70_000,
    ]
    async with serving(app, "127.0.0.1", 0) as url:
        first = mint(jti="a" * 32, args=[1])
        assert b" 200 " in (await talk(url, request(JOSE, length(first), body=first)))[0]
        answers = {(await talk(url, request(JOSE, length(token), body=token)))[0] for token in tokens}
    assert len({re.sub(rb"Date: [^\r]*", b"", answer) for answer in answers}) == 1


async def test_a_flood_of_malformed_requests_makes_no_flood_of_lines(app, caplog):
    malformed = [
        b"POST / HTTP/9.x\r\n\r\n",
        b"POST / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n",
    ]
    async with serving(app, "127.0.0.1", 0) as url:
        for _ in range(20):
            for data in malformed:
                answer, _ = await talk(url, data)
                assert b" 400 " in answer
    lines = [record.getMessage() for record in caplog.records if record.name == "safedefer.web"]
    assert len(lines) == len(set(lines)) <= len(malformed)


def test_the_lines_of_malformed_requests_are_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("safedefer.web.server.time.monotonic", lambda: now[0])
    discreet = _Discreet()

    def line():
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "from %s", ("1.2.3.4",), (ValueError, ValueError("x"), None)
        )
        return record.getMessage() if discreet.filter(record) else None

    assert line() == "a request could not be answered (ValueError)"
    assert [line() for _ in range(5)] == [None] * 5
    now[0] = 60.0
    assert line() == "a request could not be answered (ValueError), 5 more since the last line"
    now[0] = 120.0
    assert line() == "a request could not be answered (ValueError)"


async def test_a_thousand_idle_connections_do_not_keep_others_out(app):
    async with serving(app, "127.0.0.1", 0) as url:
        host, port = url.removeprefix("http://").split(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
        for _, writer in idle:
            writer.write(request(JOSE, "Content-Length: 1000")[:-10])
        answer, _ = await talk(url, request(JOSE, length(TOKEN), body=TOKEN))
        assert b" 200 " in answer
        for _, writer in idle:
            writer.close()


def test_now_is_not_the_clock_of_the_machine():
    """The vectors' clock: no test here depends on the day."""
    assert NOW == 1_900_000_000
    assert victim.RAN == []
