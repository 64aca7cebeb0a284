"""The handler over real HTTP, with the real SQLite queue and ledger: every row of the table of answers."""

import asyncio
import gzip
import json
import logging
import threading
import time
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from safedefer import Key, Keyring, KeyState, Limits, Options, deferred
from safedefer.delivery.budget import ByteBudget
from safedefer.queues.base import TaskState
from safedefer.web import body as web_body
from safedefer.web import handler as web_handler
from safedefer.web.body import warn_of_taken_body
from safedefer.web.handler import handler_for
from safedefer.web.server import serving
from tests import sample_tasks as tasks
from tests.unit.apps import JOSE, SECRET, Recorder, make_app, until

KEYS = Keyring(Key("k1", SECRET, KeyState.ACTIVE))
URL = "/_ah/queue/deferred"


class Clock:
    """The present, moved by ``ahead`` seconds."""

    def __init__(self):
        self.ahead = 0.0

    def __call__(self):
        return time.time() + self.ahead


class Served:
    """An App behind a socket."""

    def __init__(self, app, address, session, clock):
        self.app, self.address, self.session, self.clock = app, address, session, clock

    async def post(self, data, headers=None, *, path=URL, method="POST"):
        async with self.session.request(
            method, self.address + path, data=data, headers={**JOSE, **(headers or {})}, allow_redirects=False
        ) as response:
            body = await response.read()
            return response.status, response.headers.get("Safedefer-Outcome"), response.headers, body

    async def outcome(self, data, headers=None, **more):
        status, outcome, _, _ = await self.post(data, headers, **more)
        return status, outcome

    async def raw(self, data, *, wait=120.0, end=True):
        """Write bytes to the socket, and return what comes back; within less than the handler waits for a body."""
        host, port = self.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(data)
            if end and writer.can_write_eof():
                writer.write_eof()
            return await asyncio.wait_for(reader.read(65_536), wait)
        finally:
            writer.close()

    def records(self, task):
        return self.app.queue.find(task.id).records


@pytest.fixture
async def served(tmp_path):
    async with serve(tmp_path) as served:
        yield served


def serve(tmp_path, **changes):
    import contextlib

    @contextlib.asynccontextmanager
    async def context():
        tasks.reset()
        clock = Clock()
        values = {"keyring": KEYS, "queue": f"sqlite:///{tmp_path}/q.db", "clock": clock}
        app = make_app(**{**values, **changes})
        session = aiohttp.ClientSession(skip_auto_headers={"Content-Type"}, auto_decompress=False)
        try:
            async with serving(app, "127.0.0.1", 0) as address, session:
                yield Served(app, address, session, clock)
        finally:
            tasks.GATE.set()
            await asyncio.to_thread(app.close)

    return context()


# --- 200 ------------------------------------------------------------------------------------------


async def test_a_task_that_returns_succeeded_and_is_not_run_again(served):
    task = served.app.defer(tasks.add, 1, 2)
    assert await served.outcome(task.payload) == (200, "succeeded")
    assert await served.outcome(task.payload) == (200, "duplicate")
    assert tasks.RAN == [("add", 1, 2, 1)]
    assert [(record.outcome, record.status) for record in served.records(task)] == [("succeeded", 200)]


async def test_the_content_type_of_the_original_is_taken_too(served):
    for kind in ("application/octet-stream", "application/jose; charset=utf-8", "Application/JOSE"):
        assert await served.outcome(served.app.defer(tasks.add, 1).payload, {"Content-Type": kind}) == (
            200,
            "succeeded",
        )


@pytest.mark.parametrize("kind", ["plain", "subclass"])
async def test_a_permanent_failure_is_not_run_again(served, kind):
    task = served.app.defer(tasks.permanent, kind)
    assert await served.outcome(task.payload) == (200, "failed")
    assert await served.outcome(task.payload) == (200, "duplicate")
    (record,) = served.records(task)
    assert (record.outcome, record.reason) == ("failed", "permanent-task-failure")
    assert record.exception_type.endswith("PermanentTaskFailure" if kind == "plain" else "sample_tasks.Hopeless")
    assert "never" in record.traceback
    assert tasks.RAN == ["permanent"]


async def test_an_expired_task_failed_unrun(served):
    task = served.app.defer(tasks.add, 1)
    served.clock.ahead = 31 * 86_400 + 60
    assert await served.outcome(task.payload) == (200, "failed")
    assert [record.reason for record in served.records(task)] == ["expired-task"]
    assert tasks.RAN == []


async def test_arguments_that_do_not_decode_failed(served):
    token = forge(served, args=[{"$bytes": "***"}])
    assert await served.outcome(token) == (200, "failed")
    assert await served.outcome(token) == (200, "duplicate")
    assert tasks.RAN == []


async def test_a_cancelled_task_is_a_duplicate(served):
    task = served.app.defer(tasks.add, 1)
    assert served.app.cancel(task.id)
    assert await served.outcome(task.payload) == (200, "duplicate")
    assert tasks.RAN == []


# --- 408, 409, 500 --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "subclass"])
async def test_a_singular_failure_is_retried_and_logged_at_debug(served, kind, caplog):
    task = served.app.defer(tasks.singular, kind)
    with caplog.at_level(logging.DEBUG, "safedefer"):
        assert await served.outcome(task.payload) == (408, "retry")
    assert {record.levelno for record in caplog.records if task.id in record.getMessage()} == {logging.DEBUG}
    assert await served.outcome(task.payload) == (500, "retry")
    assert [record.reason for record in served.records(task)] == ["singular-task-failure"]
    assert tasks.RAN == ["singular"], "before the delivery is settled it does not run again"


@pytest.mark.parametrize("name", tasks.RAISES)
@pytest.mark.parametrize("how", [tasks.raise_, tasks.raise_async])
async def test_whatever_else_is_raised_is_retried(served, how, name):
    task = served.app.defer(how, name)
    assert await served.outcome(task.payload) == (500, "retry")
    assert await served.outcome(task.payload) == (500, "retry")
    assert tasks.RAN == [name], "before the delivery is settled it is answered again, and not run"
    assert [record.reason for record in served.records(task)] == ["exception"]
    # The handler lives.
    assert await served.outcome(served.app.defer(tasks.add, 1).payload) == (200, "succeeded")


async def test_a_task_that_runs_is_not_run_beside_itself(served):
    task = served.app.defer(tasks.wait_for_gate)
    first = asyncio.create_task(served.outcome(task.payload))
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    assert await served.outcome(task.payload) == (409, "running")
    tasks.GATE.set()
    assert await first == (200, "succeeded")
    assert await served.outcome(task.payload) == (200, "duplicate")
    assert tasks.RAN == ["waited"]


# --- 500 rejected ---------------------------------------------------------------------------------


def forge(served, keyring=KEYS, **claims):
    """Sign a task with changes, as a holder of the key could."""
    base = served.app.verify(served.app.serialize(tasks.add, 1)).claims
    payload = dict(base)
    payload.update(claims)
    payload = {name: value for name, value in payload.items() if value is not None}
    return keyring.sign(json.dumps(payload).encode())


def call(qualname, module="tests.sample_tasks", kind="function", **more):
    return {"kind": kind, "module": module, "qualname": qualname, **more}


REJECTED = {
    "a function that is not there": ({"call": call("nothing")}, "unresolvable-callable"),
    "another kind": ({"call": call("Counter")}, "unresolvable-callable"),
    "a module that no pattern admits": ({"call": call("run", "subprocess")}, "policy-violation"),
    "eval": ({"call": call("eval", "builtins", "builtin")}, "policy-violation"),
    "arguments that do not bind": ({"args": [1, 2, 3, 4]}, "unresolvable-callable"),
    "a class that is not there": ({"args": [{"$class": "tests.sample_tasks:Nothing"}]}, "unresolvable-callable"),
    "a class that no pattern admits": ({"args": [{"$class": "subprocess:Popen"}]}, "policy-violation"),
}
UNKNOWN = {
    "another version": {"v": 2},
    "an unknown claim": {"new": 1},
    "a missing claim": {"aud": None},
    "a call of another shape": {"call": {"kind": "function"}},
    "a float time": {"iat": 1.5},
    "no object": None,
}


@pytest.mark.parametrize("what", REJECTED)
async def test_an_authentic_task_that_cannot_be_run_here_is_rejected(served, what):
    claims, reason = REJECTED[what]
    task = served.app.defer(tasks.add, 1)
    token = forge(served, jti=task.id, **claims)
    # The queue's row has another digest; a ledger entry is made by the first post alone.
    assert await served.outcome(token) == (500, "rejected")
    assert await served.outcome(token) == (500, "rejected")
    assert [record.reason for record in served.records(task)] == [reason] * 2
    assert tasks.RAN == []


@pytest.mark.parametrize("what", UNKNOWN)
async def test_claims_that_this_version_does_not_know_are_rejected(served, what):
    claims = UNKNOWN[what]
    token = KEYS.sign(b"[]") if claims is None else forge(served, **claims)
    assert await served.outcome(token) == (500, "rejected")
    assert tasks.RAN == []


async def test_a_pointer_to_nothing_or_to_another_token_is_rejected(served):
    task = served.app.defer(tasks.add, "x" * 20_000)
    other = served.app.defer(tasks.add, "y" * 20_000)
    pointer = served.app.verify(task.payload).claims
    swapped = dict(served.app.verify(other.payload).blob)
    token = KEYS.sign(json.dumps({**pointer, "blob": swapped}).encode())
    assert await served.outcome(token) == (500, "rejected")
    assert [record.reason for record in served.records(task)] == ["invalid-claims"]
    served.app.queue.blobs.delete(pointer["blob"]["id"])
    assert await served.outcome(task.payload) == (500, "rejected")
    assert len(served.records(task)) == 2
    assert tasks.RAN == []


async def test_a_large_task_runs_once(served):
    task = served.app.defer(tasks.add, "x" * 20_000, "y")
    assert await served.outcome(task.payload) == (200, "succeeded")
    assert await served.outcome(task.payload) == (200, "duplicate")
    assert len(tasks.RAN) == 1


# --- 503 ------------------------------------------------------------------------------------------


async def test_too_early_says_when_to_come_again(served):
    task = served.app.options(countdown=100).defer(tasks.add, 1)
    status, outcome, headers, _ = await served.post(task.payload)
    assert (status, outcome) == (503, "early")
    assert 85 <= int(headers["Retry-After"]) <= 92
    served.clock.ahead = 100
    assert await served.outcome(task.payload) == (200, "succeeded")


async def test_at_capacity_the_handler_is_busy(tmp_path):
    async with serve(tmp_path, concurrency=1) as served:
        first = asyncio.create_task(served.outcome(served.app.defer(tasks.wait_for_gate).payload))
        await asyncio.to_thread(tasks.STARTED.wait, 30)
        task = served.app.defer(tasks.add, 1)
        status, outcome, headers, _ = await served.post(task.payload)
        assert (status, outcome, headers["Retry-After"]) == (503, "busy", "1")
        tasks.GATE.set()
        assert await first == (200, "succeeded")
        assert await served.outcome(task.payload) == (200, "succeeded")


async def test_while_it_shuts_down_the_handler_is_busy_and_finishes(served):
    first = asyncio.create_task(served.outcome(served.app.defer(tasks.wait_for_gate).payload))
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    served.app.delivery.drain()
    assert await served.outcome(served.app.defer(tasks.add, 1).payload) == (503, "busy")
    assert await served.app.delivery.drained(0.05) is False
    tasks.GATE.set()
    assert await first == (200, "succeeded")
    assert await served.app.delivery.drained(5) is True
    assert tasks.RAN == ["waited"]


async def test_storage_that_fails_is_busy_and_nothing_runs(served):
    task = served.app.defer(tasks.add, 1)
    await asyncio.to_thread(served.app.queue.close)
    status, outcome, headers, _ = await served.post(task.payload)
    assert (status, outcome, headers["Retry-After"]) == (503, "busy", "1")
    # Also where a rejection is to be written down.
    assert await served.outcome(forge(served, call=call("run", "subprocess"))) == (503, "busy")
    assert tasks.RAN == []


# --- 403: one constant answer ---------------------------------------------------------------------


def unauthentic(served):
    """Every cause there is, by name."""
    app = served.app
    token = app.serialize(tasks.add, 1)
    header, payload, mac = token.split(b".")
    flip = b"B" if mac[:1] == b"A" else b"A"
    stranger = Keyring(Key("k1", SECRET[::-1], KeyState.ACTIVE))
    unknown = Keyring(Key("k9", SECRET[::-1], KeyState.ACTIVE))
    audience = {"aud": f"prod:default:default:{URL}"}
    return {
        "empty": b"",
        "text": b"hello",
        "not UTF-8": b"\xff\xfe\x80",
        "truncated": token[:-1],
        "cut in half": token[: len(token) // 2],
        "a segment less": header + b"." + payload,
        "a segment more": token + b".x",
        "flipped MAC": header + b"." + payload + b"." + flip + mac[1:],
        "no MAC": header + b"." + payload + b".",
        "alg none": b"eyJhbGciOiJub25lIn0." + payload + b".",
        "padding": token + b"=",
        "newline": token + b"\n",
        "blank": b" " + token,
        "zero byte": token + b"\0",
        "another secret": stranger.sign(b"{}"),
        "unknown key": unknown.sign(b"{}"),
        "another environment": forge(served, **audience),
        "another URL": forge(served, aud="test:default:default:/other"),
        "gzip": gzip.compress(token),
        "pickle": b"\x80\x04\x95\x00.",
    }


async def test_what_is_not_authentic_gets_one_constant_answer(served, caplog):
    seen = set()
    with caplog.at_level(logging.DEBUG):
        for name, data in unauthentic(served).items():
            status, outcome, headers, body = await served.post(data)
            assert (status, outcome) == (403, "refused"), name
            fixed = {key: value for key, value in headers.items() if key != "Date"}
            seen.add((body, str(sorted(fixed.items()))))
    assert len(seen) == 1
    assert tasks.RAN == []
    assert "eyJ" not in caplog.text


async def test_a_revoked_or_narrow_key_and_another_queue_get_the_same_answer(tmp_path):
    revoked = Key("old", SECRET[::-1], KeyState.REVOKED)
    narrow = Key("narrow", bytes(range(100, 140)), KeyState.VERIFY_ONLY, queues=["mail"], patterns=["tests.zoo.values"])
    ring = Keyring(Key("k1", SECRET, KeyState.ACTIVE), revoked, narrow)
    async with serve(tmp_path, keyring=ring, queues=["mail"], targets={}) as served:
        _, _, _, expected = await served.post(b"")
        as_old = Keyring(Key("old", SECRET[::-1], KeyState.ACTIVE))
        as_narrow = Keyring(Key("narrow", bytes(range(100, 140)), KeyState.ACTIVE))
        mail = f"test:mail:default:{URL}"
        cases = {
            "revoked": forge(served, as_old),
            "key of another queue": forge(served, as_narrow),
            "key of another pattern": forge(served, as_narrow, aud=mail),
            "class of another pattern": forge(
                served, as_narrow, aud=mail, call=call("Plain", "tests.zoo.values", "class"),
                args=[{"$class": "tests.sample_tasks:Counter"}],
            ),
            "unknown queue": forge(served, aud=f"test:unknown:default:{URL}"),
            "unknown target": forge(served, aud=f"test:mail:big:{URL}"),
        }  # fmt: skip
        for name, token in cases.items():
            status, outcome, _, body = await served.post(token)
            assert (status, outcome, body) == (403, "refused", expected), name
    assert tasks.RAN == []


async def test_the_same_id_with_another_token_is_refused(served):
    task = served.app.defer(tasks.add, 1)
    assert await served.outcome(forge(served, jti=task.id, args=[2])) == (200, "succeeded")
    assert await served.outcome(forge(served, jti=task.id, args=[3])) == (403, "refused")
    assert tasks.RAN == [("add", 2, 0, 1)]


async def test_a_queue_header_must_agree(served):
    task = served.app.options(queue="mail").defer(tasks.add, 1)
    for wrong in ("default", "MAIL", "", "mail, mail"):
        assert await served.outcome(task.payload, {"X-AppEngine-QueueName": wrong}) == (403, "refused"), wrong
    assert await served.outcome(task.payload, {"x-appengine-queuename": "mail"}) == (200, "succeeded")


# --- 405, 413, 415: before the body is read -------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
async def test_another_method_is_refused(served, method):
    status, outcome, headers, _ = await served.post(served.app.serialize(tasks.add, 1), method=method)
    assert (status, outcome, headers["Allow"]) == (405, "refused", "POST")


def head(**headers):
    lines = [
        f"POST {URL} HTTP/1.1",
        "Host: x",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


#: Each promises a body that never comes: whoever reads it first waits for ever.
UNREAD = {
    "too large": (head(Content_Type="application/jose", Content_Length=2_000_000), 413),
    "gzip": (head(Content_Type="application/jose", Content_Encoding="gzip", Content_Length=100), 415),
    "identity": (head(Content_Type="application/jose", Content_Encoding="identity", Content_Length=100), 415),
    "no type": (head(Content_Length=100), 415),
    "form": (head(Content_Type="application/x-www-form-urlencoded", Content_Length=100), 415),
    "json": (head(Content_Type="application/json", Content_Length=100), 415),
    "PUT": (head(Content_Type="application/jose", Content_Length=100).replace(b"POST", b"PUT"), 405),
}


@pytest.mark.parametrize("what", UNREAD)
async def test_it_is_refused_before_the_body_is_read(served, what):
    data, status = UNREAD[what]
    answer = await served.raw(data, end=False)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"Safedefer-Outcome: refused" in answer
    assert b"Connection: close" in answer


async def test_a_compressed_bomb_is_not_inflated(served):
    bomb = gzip.compress(b"0" * 50_000_000)
    assert await served.outcome(bomb, {"Content-Encoding": "gzip"}) == (415, "refused")


async def test_a_body_without_length_is_cut_at_the_limit(tmp_path):
    async with serve(tmp_path, limits=Limits(token_bytes=10_000)) as served:
        data = head(Content_Type="application/jose", Transfer_Encoding="chunked")
        chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
        answer = await served.raw(data + chunk * 11, end=False)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"Safedefer-Outcome: refused" in answer
        assert await served.outcome(b"x" * 10_001) == (413, "refused")
        assert await served.outcome(b"x" * 10_000) == (403, "refused")


async def test_a_chunked_task_runs(served):
    token = served.app.defer(tasks.add, 1).payload
    chunks = b"".join(b"%x\r\n%b\r\n" % (1, token[i : i + 1]) for i in range(len(token)))
    data = head(Content_Type="application/jose", Transfer_Encoding="chunked", Connection="close")
    answer = await served.raw(data + chunks + b"0\r\n\r\n", end=False)
    assert b"Safedefer-Outcome: succeeded" in answer


# --- Bad connections ------------------------------------------------------------------------------


async def test_a_body_that_stalls_is_given_up(served, monkeypatch):
    monkeypatch.setattr(web_body, "BODY_TIMEOUT", 0.2)
    token = served.app.defer(tasks.add, 1).payload
    data = head(Content_Type="application/jose", Content_Length=len(token)) + token[:-1]
    answer = await served.raw(data, end=False)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"Safedefer-Outcome: refused" in answer
    assert tasks.RAN == []


async def held(served, count, size):
    """Open requests that stop one byte before their end, and return their streams."""
    host, port = served.address.removeprefix("http://").split(":")
    streams = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head(Content_Type="application/jose", Content_Length=size) + b"x" * (size - 1))
        streams.append((reader, writer))
    return streams


async def answers(streams, count):
    """The statuses of those that are answered: wait for so many, and a moment for more."""
    reading = [asyncio.ensure_future(reader.readline()) for reader, _ in streams]
    await until(lambda: sum(map(asyncio.Future.done, reading)) >= count)
    await asyncio.sleep(0.3)
    found = [int(line.result().split()[1]) for line in reading if line.done()]
    for line in reading:
        line.cancel()
    return found


async def test_bodies_that_stop_before_their_end_share_a_budget(tmp_path):
    """Without a key, 600 of them took 700 MB."""
    size = 100_000
    async with serve(tmp_path) as served:
        served.app.delivery.budget = ByteBudget(10 * size)
        streams = await held(served, 30, size)
        refused = await answers(streams, 20)
        assert refused == [503] * 20, "what is beyond the budget is told to come again, and keeps nothing"
        # What comes with its headers takes nothing of it: the neighbours' tasks run.
        task = served.app.defer(tasks.add, 1)
        assert await served.outcome(task.payload) == (200, "succeeded")
        for _, writer in streams:
            writer.close()
        await until(lambda: served.app.delivery.budget._left == 10 * size)
        (again,) = await held(served, 1, size)
        again[1].write(b"x")
        assert await answers([again], 1) == [403], "what was given up is given back"
        assert served.app.delivery.budget.take(10 * size), "all of it"
        again[1].close()


@pytest.mark.parametrize("stored", [False, True])
async def test_a_large_token_does_not_hold_up_the_loop_while_it_is_verified(tmp_path, stored):
    async with serve(tmp_path) as served:
        call = {"values": list(range(20_000))}
        token = (
            served.app.defer(tasks.keywords, **call).payload if stored else served.app.serialize(tasks.keywords, **call)
        )
        where = []
        verifier = served.app.delivery._verifier
        name = "verify_stored" if stored else "verify"
        original = getattr(verifier, name)

        def noted(*args, **kwargs):
            where.append(threading.current_thread() is threading.main_thread())
            return original(*args, **kwargs)

        served.app.delivery._verifier = SimpleNamespace(
            verify=noted if not stored else verifier.verify, verify_stored=noted if stored else verifier.verify_stored
        )
        assert await served.outcome(token) == (200, "succeeded")
        assert where == [False]
        small = served.app.defer(tasks.add, 1).payload
        assert await served.outcome(small) == (200, "succeeded")
        assert where == ([False] if stored else [False, True])


@pytest.mark.parametrize("how", ["read", "text", "twice"])
async def test_a_body_that_a_middleware_has_read_is_taken_from_the_request(tmp_path, how):
    @web.middleware
    async def reads(request, handler):
        await (request.text() if how == "text" else request.read())
        if how == "twice":
            await request.read()
        return await handler(request)

    tasks.reset()
    app = make_app(keyring=KEYS, queue=f"sqlite:///{tmp_path}/q.db")
    web_app = web.Application(middlewares=[reads])
    web_app.add_routes(app.routes())
    async with TestClient(TestServer(web_app)) as client:
        for size in (1, 50_000, 300_000):
            token = app.options(url=URL).defer(tasks.keywords, text="x" * size).payload
            response = await client.post(URL, data=token, headers=JOSE)
            assert (response.status, response.headers["Safedefer-Outcome"]) == (200, "succeeded")
        whole = app.serialize(tasks.keywords, text="y" * 200_000)
        response = await client.post(URL, data=whole, headers=JOSE)
        assert response.headers["Safedefer-Outcome"] == "succeeded"
        response = await client.post(URL, data=b"", headers=JOSE)
        assert (response.status, response.headers["Safedefer-Outcome"]) == (403, "refused")
    await asyncio.to_thread(app.close)


@pytest.mark.parametrize("how", ["all at once", "in chunks", "the first bytes"])
async def test_a_body_that_a_middleware_took_from_the_stream_charges_nothing_and_is_told(tmp_path, how, caplog):
    """It is gone, and nobody's fault but the middleware's: the tasks wait for its repair, and are not dead after an hour."""

    @web.middleware
    async def takes(request, handler):
        if how == "all at once":
            await request.content.read()
        elif how == "in chunks":
            async for _ in request.content.iter_chunked(10):
                pass
        else:
            await request.content.readexactly(5)
        return await handler(request)

    tasks.reset()
    warn_of_taken_body.cache_clear()
    app = make_app(keyring=KEYS, queue=f"sqlite:///{tmp_path}/q.db")
    web_app = web.Application(middlewares=[takes])
    web_app.add_routes(app.routes())
    async with TestClient(TestServer(web_app)) as client:
        for size in (1, 5_000):
            token = app.options(url=URL).defer(tasks.keywords, text="x" * size).payload
            response = await client.post(URL, data=token, headers=JOSE)
            assert (response.status, response.headers["Safedefer-Outcome"]) == (503, "busy")
    assert tasks.RAN == []
    (line,) = [record.getMessage() for record in caplog.records if "middleware" in record.getMessage()]
    assert "await request.read()" in line
    await asyncio.to_thread(app.close)


NASTY = {
    "body cut off": lambda token: head(Content_Type="application/jose", Content_Length=len(token)) + token[:-5],
    "chunk cut off": lambda token: head(Content_Type="application/jose", Transfer_Encoding="chunked") + b"ff\r\nabc",
    "no chunk": lambda token: head(Content_Type="application/jose", Transfer_Encoding="chunked") + b"zz\r\nabc\r\n0\r\n\r\n",
    "two types": lambda token: head(
        Content_Type="application/jose\r\nContent-Type: application/jose", Content_Length=len(token)
    ) + token,
    "two lengths": lambda token: head(Content_Type="application/jose", Content_Length="5\r\nContent-Length: 6") + token,
    "length and chunks": lambda token: head(
        Content_Type="application/jose", Content_Length=5, Transfer_Encoding="chunked"
    ) + b"0\r\n\r\n",
    "negative length": lambda token: head(Content_Type="application/jose", Content_Length=-1) + token,
    "large header": lambda token: head(Content_Type="application/jose", X_Large="x" * 100_000) + token,
    "no HTTP": lambda token: token,
    "zero bytes": lambda token: b"\0" * 100,
}  # fmt: skip


@pytest.mark.parametrize("what", NASTY)
async def test_a_broken_request_runs_nothing_and_the_handler_lives(served, what, caplog):
    task = served.app.defer(tasks.keywords, secret=tasks.SECRET)
    with caplog.at_level(logging.INFO):
        answer = await served.raw(NASTY[what](task.payload))
    assert not answer.startswith(b"HTTP/1.1 2")
    assert tasks.RAN == []
    assert "Traceback" not in caplog.text
    assert "eyJ" not in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert await served.outcome(task.payload) == (200, "succeeded")


async def test_a_client_that_hangs_up_loses_nothing(served):
    task = served.app.defer(tasks.wait_for_gate)
    token = task.payload
    host, port = served.address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(head(Content_Type="application/jose", Content_Length=len(token)) + token)
    await asyncio.to_thread(tasks.STARTED.wait, 30)
    writer.close()
    tasks.GATE.set()
    await until(lambda: served.records(task))
    assert [record.outcome for record in served.records(task)] == ["succeeded"]
    assert await served.outcome(token) == (200, "duplicate")


# --- Where it is served ---------------------------------------------------------------------------


async def test_the_url_of_a_queue_is_served(served):
    task = served.app.defer_with(Options(queue="mail", url=None), tasks.add, [1], {})
    assert task.url == "/_ah/queue/mail"
    assert await served.outcome(task.payload) == (403, "refused")
    assert await served.outcome(task.payload, path="/_ah/queue/default") == (403, "refused")
    assert await served.outcome(task.payload, path="/_ah/queue/mail") == (200, "succeeded")
    assert (await served.post(task.payload, path="/other"))[0] == 404


async def test_a_prefix_is_in_front_of_the_path_that_a_token_names(tmp_path):
    async with serve(tmp_path, prefix="/api/v1/") as served:
        task = served.app.defer(tasks.add, 1)
        assert (await served.post(task.payload))[0] == 404
        assert await served.outcome(task.payload, path="/api/v1" + URL) == (200, "succeeded")


MOUNTS = {  # where the application is mounted, its prefix, and the path of the request
    "a sub-app": (["/api/"], "", "/api"),
    "a sub-app in a sub-app": (["/shop", "/api"], "", "/shop/api"),
    "a sub-app that a proxy has a prefix for": (["/api"], "/tasks", "/api/tasks"),
    "a prefix like the mount": (["/api"], "/api", "/api/api"),
}


@pytest.mark.parametrize("mount", MOUNTS)
@pytest.mark.parametrize("route", ["routes", "handler_for", "TaskHandler"])
async def test_below_a_mount_the_token_names_the_path_that_was_signed(mount, route, tmp_path):
    tasks.reset()
    folders, prefix, before = MOUNTS[mount]
    if route != "routes" and prefix:
        pytest.skip("a route that is added by hand has its own prefix")
    app = make_app(keyring=KEYS, queue=f"sqlite:///{tmp_path}/q.db", prefix=prefix)
    inner = top = web.Application()
    if route == "routes":
        inner.add_routes(app.routes())
    elif route == "handler_for":
        inner.router.add_route("*", URL, handler_for(app))
    else:
        inner.router.add_view(URL, web_handler.task_view(lambda: app))
    for folder in reversed(folders):
        top, mounted = web.Application(), top
        top.add_subapp(folder, mounted)
    task = app.defer(tasks.add, 1)
    full = app.options(url=before + URL).defer(tasks.add, 3)
    other = app.options(url="/other").defer(tasks.add, 2)
    async with TestClient(TestServer(top)) as client:
        async with aiohttp.ClientSession() as session:
            served = Served(app, str(client.make_url("/")).rstrip("/"), session, None)
            if not prefix:  # with one, the path behind it is the signed one
                assert await served.outcome(full.payload, path=before + URL) == (200, "succeeded")
            assert await served.outcome(other.payload, path=before + URL) == (403, "refused")
            assert await served.outcome(task.payload, path=before + URL) == (200, "succeeded")
            assert (await served.post(task.payload, path="/other" + URL))[0] == 404
    app.close()


@pytest.mark.parametrize("path", ["/tasks/mail", "/a%20b", "/~x/(y)", "/a/../b"])
async def test_a_url_of_ones_own_is_served_by_handler_for(tmp_path, path):
    tasks.reset()
    app = make_app(keyring=KEYS, queue=f"sqlite:///{tmp_path}/q.db")
    web_app = web.Application()
    web_app.router.add_route("*", "/{rest:.*}", handler_for(app))
    runner = web.AppRunner(web_app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        from safedefer.dispatcher.loop import HttpDelivery, attempt_headers

        task = app.options(url=path).defer(tasks.add, 1)
        (lease,) = app.queue.lease(owner="t", limit=1, seconds=60, now=time.time())
        async with HttpDelivery("http://127.0.0.1:%d" % runner.addresses[0][1]) as deliver:
            answer = await deliver(lease.task, attempt_headers(lease))
        assert (answer.status, answer.headers["Safedefer-Outcome"]) == (200, "succeeded"), task.url
    finally:
        await runner.cleanup()
        await asyncio.to_thread(app.close)


async def test_the_view_serves_the_configured_app_and_can_be_subclassed(tmp_path):
    tasks.reset()
    app = make_app(keyring=KEYS, queue=f"sqlite:///{tmp_path}/q.db")
    deferred.configure(app)
    posted = []

    class Mine(deferred.TaskHandler):
        async def post(self):
            posted.append(self.request.path)
            return await super().post()

        async def get(self):
            return web.Response(text="alive")

    web_app = web.Application()
    web_app.router.add_view(URL, Mine)
    runner = web.AppRunner(web_app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        async with aiohttp.ClientSession() as session:
            served = Served(app, "http://127.0.0.1:%d" % runner.addresses[0][1], session, None)
            assert await served.outcome(app.defer(tasks.add, 1).payload) == (200, "succeeded")
            assert posted == [URL]
            assert await served.outcome(b"", method="PUT") == (405, "refused")
            assert (await served.post(b"", method="GET"))[3] == b"alive"
    finally:
        deferred.configure(None)
        await runner.cleanup()
        await asyncio.to_thread(app.close)


# --- What is not said -----------------------------------------------------------------------------


async def test_answers_and_logs_quote_nothing(served, caplog):
    task = served.app.options(headers={"X-Private": tasks.SECRET}).defer(tasks.loud, tasks.SECRET)
    with caplog.at_level(logging.DEBUG):
        status, _, headers, body = await served.post(task.payload)
        assert status == 500
        for hostile in (b"\x1b[31m\r\nFORGED", task.payload[:-3] + b"\r\nX"):
            await served.post(hostile, {"X-AppEngine-TaskRetryCount": "1", "X-AppEngine-TaskName": "FORGED"})
    said = caplog.text + str(headers) + body.decode()
    for hidden in (tasks.SECRET, "FORGED", "eyJ", "\x1b"):
        assert hidden not in said, hidden
    assert "ValueError" in caplog.text
    assert "ValueError" not in str(headers) + body.decode()
    assert all(line.isprintable() for record in caplog.records for line in [record.getMessage()])
    (record,) = served.records(task)
    assert tasks.SECRET in record.traceback
    assert "\x1b" not in record.traceback


async def test_events_identify(tmp_path):
    seen = Recorder()
    async with serve(tmp_path, observer=seen) as served:
        task = served.app.defer(tasks.add, 1)
        await served.post(task.payload, {"X-AppEngine-TaskRetryCount": "4"})
        await served.post(b"x")
    started, handled, refused = seen.events[1:]
    for event in (started, handled):
        assert (event.task_id, event.queue, event.callable, event.kid, event.attempt) == (
            task.id, "default", "tests.sample_tasks:add", "k1", 5,
        )  # fmt: skip
    assert (handled.outcome, handled.status, handled.reason) == ("succeeded", 200, None)
    assert handled.seconds > 0
    assert (refused.status, refused.reason) == (403, "malformed-token")


@pytest.mark.parametrize(("headers", "attempt"), [
    ({}, 1), ({"X-AppEngine-TaskRetryCount": "6"}, 7), ({"X-AppEngine-TaskRetryCount": "6", "Safedefer-Attempt": "1"}, 1),
    ({"Safedefer-Attempt": "-3"}, 1), ({"Safedefer-Attempt": "0", "X-AppEngine-TaskRetryCount": "6"}, 7), ({"Safedefer-Attempt": "2, 3"}, 1),
])  # fmt: skip
async def test_an_event_counts_the_deliveries_that_a_handler_took(headers, attempt, tmp_path):
    seen = Recorder()
    async with serve(tmp_path, observer=seen) as served:
        await served.post(served.app.defer(tasks.add, 1).payload, headers)
    assert seen.events[-1].attempt == attempt


async def test_an_observer_that_raises_changes_nothing(tmp_path, caplog):
    def broken(event):
        raise ValueError(tasks.SECRET)

    async with serve(tmp_path, observer=broken) as served:
        assert await served.outcome(served.app.defer(tasks.add, 1).payload) == (200, "succeeded")
    assert "an observer failed" in caplog.text


async def test_nothing_is_lost_whatever_was_posted(served):
    task = served.app.defer(tasks.add, 1)
    for data in unauthentic(served).values():
        await served.post(data)
    view = served.app.queue.find(task.id)
    assert (view.state, view.attempts, view.records) == (TaskState.WAITING, 0, [])
