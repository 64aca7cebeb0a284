"""Whoever writes the queue's storage, without a key: everything beside the token is a hint, and the token is signed."""

import asyncio
import json
import logging
import random

import apsw
import pytest

from safedefer.cli.common import summary
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, HttpDelivery, InProcessDelivery
from safedefer.errors import Error
from safedefer.ledger import AttemptRecord, EndState, Execution
from safedefer.queues.base import DeadFilter, Settlement, TaskState, Verdict
from safedefer.sending.builder import stored_retry_options
from safedefer.web.server import serving
from tests.adversarial import victim
from tests.adversarial.forge import NOW, URL, Clock, make_app, post
from tests.queues.single import begin, finish

HOUR = 3600.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tasks.db"


@pytest.fixture
def app(path, clock):
    app = make_app(path, clock=clock)
    yield app
    app.close()


def write(path, statement, values=()):
    """What the attacker does: another connection, no checks of ours."""
    connection = apsw.Connection(str(path))
    connection.execute(statement, values)
    connection.close()


def read(path, statement):
    connection = apsw.Connection(str(path))
    rows = list(connection.execute(statement))
    connection.close()
    return rows


async def dispatch(app, clock):
    """Deliver what is due, over and over, as hours go by, until nothing waits."""
    dispatcher = Dispatcher(
        app.queue,
        InProcessDelivery(app.handle),
        clock=clock,
        options=DispatcherOptions(concurrency=4, poll_seconds=0.05),
        rng=random.Random(1),
    )
    for _ in range(40):
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)
        due = app.queue.next_due(now=clock())
        if due is None:
            return
        clock.now = max(clock.now + 400.0, min(due, clock.now + HOUR))


#: Column, and what the attacker writes into it (SQL).
HOSTILE = [
    *[("id", text) for text in ("'ffffffffffffffffffffffffffffffff'", "'x'", "'\x1b[31m'", "''")],
    *[("queue", text) for text in ("'mail'", "'other'", "''", "'a' || char(13, 10) || 'X-Evil: 1'", "'default '")],
    *[("name", text) for text in ("'other-name'", "'a' || char(13, 10) || 'X-Evil: 1'", "hex(zeroblob(400))")],
    *[("callable_name", text) for text in ("'os:system'", "char(27) || '[2J'")],
    *[("url", text) for text in ("'/admin'", "'//evil.example/'", "'@evil.example/'", "'http://evil.example/'", "''", "'/_ah/queue/mail'", "'/' || char(10)")],
    *[("target", text) for text in ("'other'", "''", "'evil.example'", "'default' || char(0)")],
    *[("audience", text) for text in ("'test:mail:default:/_ah/queue/deferred'", "''", "'x'")],
    *[("headers", text) for text in ("'{\"Host\": \"evil.example\"}'", "'{\"Content-Encoding\": \"gzip\"}'", "'{\"X-AppEngine-QueueName\": \"mail\"}'",
        "'{\"X\": \"1\\r\\nX-Evil: 1\"}'", "'{\"X\": 1}'", "'[]'", "'null'", "'no json'", "''", "'{\"X\": {}}'", "printf('%.*c', 100000, '[')", "'NaN'")],
    *[("retry_options", text) for text in ("'{\"task_retry_limit\": -1}'", "'{\"min_backoff_seconds\": 1e999}'", "'{\"x\": 1}'", "'[]'", "'no json'", "'null'", "printf('%.*c', 100000, '[')")],
    *[("eta", text) for text in ("0", "-1e308", "9e999", "1e300")],
    *[("created", text) for text in ("0", "9e999")],
    *[("expires", text) for text in ("0", "9223372036854775807", "-1")],
    *[("digest", text) for text in ("x''", "zeroblob(32)", "randomblob(32)")],
    *[("blob_id", text) for text in ("'../../etc/passwd'", "'ffffffffffffffffffffffffffffffff'")],
    *[("due", text) for text in ("0", "-1e308")],
    *[("owner", text) for text in ("'somebody'", "''")],
    *[("leased_at", text) for text in ("0", "9e999")],
    *[("attempts", text) for text in ("-1", "9223372036854775807")],
    *[("deliveries", text) for text in ("-1", "9223372036854775807")],
    *[("executions", text) for text in ("-9", "9223372036854775807")],
    *[("first_attempt", text) for text in ("0", "9e999")],
    *[("rejections", text) for text in ("-9", "9", "9223372036854775807")],
    *[("unique_key", text) for text in ("'x'", "''")],
    *[(column, "CAST(x'61ff' AS TEXT)") for column in ("id", "queue", "name", "callable_name", "url", "target", "audience", "headers",
        "retry_options", "blob_id", "owner", "retry_reason", "unique_key")],
    *[("first_rejection", text) for text in ("0", "9e999")],
    *[("previous_response", text) for text in ("-1", "9223372036854775807")],
    *[("retry_reason", text) for text in ("'a' || char(13, 10) || 'X-Evil: 1'", "''")],
    *[("token", text) for text in ("x''", "x'00'", "zeroblob(2000000)", "CAST('../../etc/passwd' AS BLOB)", "CAST(token || x'0a' AS BLOB)", "substr(token, 2)")],
]  # fmt: skip


def test_every_column_is_attacked(app, path):
    app.queue.stats(now=NOW)
    app.defer(victim.note)
    columns = {row[1] for row in read(path, "PRAGMA table_info(safedefer_tasks)")}
    assert {column for column, _ in HOSTILE} == columns - {"seq"}


@pytest.mark.parametrize(("column", "value"), HOSTILE, ids=lambda value: str(value)[:40])
async def test_a_changed_column_makes_no_other_task_of_it_and_its_neighbours_run(
    app, path, clock, ran, caplog, column, value
):
    caplog.set_level(logging.CRITICAL)
    before = app.options(name="before").defer(victim.note, "before")
    target = app.options(countdown=100).defer(victim.note, "target")
    app.defer(victim.note, "after")
    token = target.payload
    write(path, f"UPDATE safedefer_tasks SET {column} = {value} WHERE id = ?", (target.id,))
    await dispatch(app, clock)
    done = [args[0] for args, _ in ran]
    assert sorted(done) in (["after", "before"], ["after", "before", "target"])
    assert "target" not in done or column not in {"url", "queue"}, "it ran on another URL, or in another queue"
    if "target" not in done:
        (row,) = read(path, "SELECT token, reason FROM safedefer_dead")
        assert row[0] == token or column == "token"
        assert row[1]
    assert app.queue.find(before.id).state is TaskState.SUCCEEDED


async def test_a_task_never_runs_before_the_time_that_was_signed(app, path, clock, ran):
    app.options(countdown=1000).defer(victim.note, "later")
    write(path, "UPDATE safedefer_tasks SET eta = 0, due = 0, created = 0")
    dispatcher = Dispatcher(
        app.queue, InProcessDelivery(app.handle), clock=clock, options=DispatcherOptions(poll_seconds=0.05)
    )
    for now in (NOW, NOW + 500, NOW + 989):
        clock.now = now
        write(path, "UPDATE safedefer_tasks SET due = 0")
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)
        assert ran == []
    clock.now = NOW + 1000
    write(path, "UPDATE safedefer_tasks SET due = 0")
    await asyncio.wait_for(dispatcher.run_until_empty(), 60)
    assert ran == [(("later",), {})]


async def test_a_token_under_another_row_runs_as_itself_once(app, path, clock, ran):
    one, two = app.defer(victim.note, 1), app.defer(victim.note, 2)
    write(path, "UPDATE safedefer_tasks SET token = ? WHERE id = ?", (one.payload, two.id))
    await dispatch(app, clock)
    assert ran == [((1,), {})]


async def test_a_row_copied_to_other_queues_and_urls_runs_nowhere_else(app, path, clock, ran):
    task = app.defer(victim.note, 1)
    columns = [
        row[1]
        for row in read(path, "PRAGMA table_info(safedefer_tasks)")
        if row[1] not in {"seq", "id", "queue", "url", "target"}
    ]
    for number, (queue, url, target) in enumerate(
        [
            ("mail", URL, "default"),
            ("default", "/_ah/queue/mail", "default"),
            ("default", URL, "other"),
            ("default", URL, "default"),
        ]
    ):
        names = ", ".join(columns)
        write(
            path,
            f"INSERT INTO safedefer_tasks (id, queue, url, target, {names}) SELECT ?, ?, ?, ?, {names} FROM safedefer_tasks WHERE id = ?",
            (f"{number:032x}", queue, url, target, task.id),
        )
    await dispatch(app, clock)
    assert ran == [((1,), {})]


def test_no_byte_of_a_stored_token_can_be_changed(app, ran):
    """All of them, through the handler: the queue hands on the bytes as they are."""
    token = app.defer(victim.note, "text", n=1).payload
    for position in range(len(token)):
        for mask in (1, 2, 32, 128):
            changed = bytearray(token)
            changed[position] ^= mask
            status, headers, _ = post(app, bytes(changed))
            assert (status, headers["Safedefer-Outcome"]) == (403, "refused"), position
    for position in range(len(token)):
        assert post(app, token[:position] + token[position + 1 :])[0] == 403
    assert ran == []
    assert post(app, token)[0] == 200
    assert ran == [(("text",), {"n": 1})]


async def test_no_byte_of_an_oversize_task_can_be_changed(app, path, clock, ran):
    task = app.defer(victim.note, "x" * 12_000)
    ((_, stored),) = read(path, "SELECT id, data FROM safedefer_blobs")
    source = random.Random(5)
    for position in [0, 1, len(stored) - 1, *(source.randrange(len(stored)) for _ in range(60))]:
        changed = bytearray(stored)
        changed[position] ^= 1 << source.randrange(8)
        write(path, "UPDATE safedefer_blobs SET data = ?", (bytes(changed),))
        status, headers, _ = await app.handle({"Content-Type": "application/jose"}, task.payload, path=URL)
        assert (status, headers["Safedefer-Outcome"]) == (500, "rejected")
    other = app.serialize(victim.note, "y" * 12_000)
    for data in (b"", other, task.payload, stored + b"A", stored[:-1]):
        write(path, "UPDATE safedefer_blobs SET data = ?", (data,))
        assert (await app.handle({"Content-Type": "application/jose"}, task.payload, path=URL)).status in {403, 500}
    assert ran == []
    write(path, "UPDATE safedefer_blobs SET data = ?", (stored,))
    await dispatch(app, clock)
    assert [len(args[0]) for args, _ in ran] == [12_000]


#: What the attacker does to a dead letter before somebody runs it again.
DEAD = {
    "another token": "token = x'6162'",
    "another byte": "token = CAST(replace(CAST(token AS TEXT), 'A', 'B') AS BLOB)",
    "another URL": "url = '/admin'",
    "headers": """headers = '{"Host": "evil.example"}'""",
    "headers that are none": "headers = '[]'",
    "retry options that are none": "retry_options = 'no json'",
    "retry options out of range": """retry_options = '{"task_age_limit": 1e999}'""",
    "another target": "target = 'evil'",
    "another queue": "queue = 'mail'",
    "another callable": "callable_name = 'os:system'",
}


@pytest.mark.parametrize("how", DEAD)
async def test_a_dead_letter_that_was_changed_is_run_again_as_it_was_signed_or_not_at_all(app, path, clock, ran, how):
    task = app.defer(victim.fail, "once")
    await dispatch(app, clock)
    assert ran == [("fail", ("once",))]
    write(path, f"UPDATE safedefer_dead SET {DEAD[how]}")
    try:
        again = app.retry(task.id)
    except (Error, ValueError, TypeError, AttributeError):
        again = None
    if again is not None:
        assert (again.url, again.queue_name, again.target) == (URL, "default", "default")
        assert "Host" not in again.headers
        await dispatch(app, clock)
    assert ran == [("fail", ("once",))] * (1 if again is None else 2)


async def test_a_poisoned_row_does_not_reach_another_handler_by_http(app, path, clock, ran):
    """Headers of the storage are checked before they become a request."""
    for number, headers in enumerate(
        ('{"X": "1\\r\\nX-Evil: 1"}', '{"Transfer-Encoding": "chunked"}', '{"Content-Length": "1"}')
    ):
        task = app.defer(victim.note, number)
        write(path, "UPDATE safedefer_tasks SET headers = ? WHERE id = ?", (headers, task.id))
    app.defer(victim.note, "fine")
    async with serving(app, "127.0.0.1", 0) as url, HttpDelivery(url) as deliver:
        dispatcher = Dispatcher(app.queue, deliver, clock=clock, options=DispatcherOptions(poll_seconds=0.05))
        await asyncio.wait_for(dispatcher.run_until_empty(), 60)
    assert ran == [(("fine",), {})]


# --- What has ended, and what is being settled ------------------------------------------------------

NO_TEXT = "CAST(x'61ff' AS TEXT)"
NUMBERS = [
    "eta = 9e999",
    "created = -9e999",
    "expires = 9223372036854775807",
    "attempts = -9223372036854775808",
    "ended = 9e999",
    "ended = -1e308",
]
JSON = [
    "'[]'",
    "'null'",
    "'no json'",
    "''",
    "'NaN'",
    "'{\"a\": {}}'",
    '\'{"task_retry_limit": "x"}\'',
    "'{\"a\": 1e999}'",
    "printf('%.*c', 100000, '[')",
]
ENDED = ["id", "queue", "name", "callable_name", "url", "target", "audience", "reason"]
POISONED_DEAD = [
    *[f"{column} = {NO_TEXT}" for column in [*ENDED, "headers", "retry_options"]],
    *[f"{column} = {value}" for column in ("headers", "retry_options") for value in JSON],
    *NUMBERS,
    "token = x''",
    "token = x'ff00'",
]  # fmt: skip
POISONED_ATTEMPT = [
    f"{column} = {NO_TEXT}" for column in ("task_id", "audience", "outcome", "reason", "exception_type", "traceback")
] + ["started = 9e999", "ended = -9e999", "status = 9223372036854775807"]


def look(queue, *states):
    """Everything that there is to see, in pages of one, as the commands print it."""
    letters, after = [], None
    while page := queue.dead_letters(DeadFilter(), after=after, limit=1):
        letters += page
        after = (page[-1].ended or 0.0, page[-1].id)
        assert len(letters) < 10, "the pages have no end"
    queue.stats(now=NOW)
    views = [*letters, *queue.tasks(states=states)]
    for view in views:
        json.dumps(summary(view))
    return {view.id for view in letters}, {view.id for view in views}


def test_every_text_of_what_has_ended_is_attacked(app, path):
    app.queue.stats(now=NOW)
    for table, columns in (("dead", {*ENDED, "headers", "retry_options"}), ("ended", {*ENDED, "state"})):
        rows = read(path, f"PRAGMA table_info(safedefer_{table})")
        assert {row[1] for row in rows if row[2] == "TEXT"} == columns


@pytest.mark.parametrize("poison", POISONED_DEAD)
async def test_a_poisoned_dead_letter_leaves_its_neighbours_in_sight_and_lets_them_run_again(
    app, path, clock, ran, poison
):
    before, target, after = (app.options(name=name).defer(victim.fail, name) for name in ("a", "b", "c"))
    await dispatch(app, clock)
    ran.clear()
    write(path, f"UPDATE safedefer_dead SET {poison} WHERE id = ?", (target.id,))
    letters, views = look(app.queue)
    assert {before.id, after.id} <= letters & views
    assert app.queue.find(before.id).state is TaskState.DEAD
    clock.now += 1
    again, _ = app.retry_all(DeadFilter())
    assert len(again) in {2, 3}
    await dispatch(app, clock)
    assert {("fail", ("a",)), ("fail", ("c",))} <= set(ran)


@pytest.mark.parametrize("poison", [f"{column} = {NO_TEXT}" for column in ENDED] + NUMBERS)
async def test_a_poisoned_row_of_the_history_leaves_its_neighbours_in_sight(app, path, clock, poison):
    before, target, after = (app.defer(victim.note, name) for name in "abc")
    await dispatch(app, clock)
    write(path, f"UPDATE safedefer_ended SET {poison} WHERE id = ?", (target.id,))
    _, views = look(app.queue, TaskState.SUCCEEDED)
    assert {before.id, after.id} <= views
    assert app.queue.find(after.id).state is TaskState.SUCCEEDED


@pytest.mark.parametrize("poison", POISONED_ATTEMPT)
async def test_a_poisoned_record_hides_no_task(app, path, clock, poison):
    before, target = app.defer(victim.fail, "a"), app.defer(victim.fail, "b")
    await dispatch(app, clock)
    write(path, f"UPDATE safedefer_attempts SET {poison} WHERE task_id = ?", (target.id,))
    assert look(app.queue)[0] == {before.id, target.id}
    assert app.queue.find(target.id).state is TaskState.DEAD
    assert app.queue.find(before.id).records


@pytest.mark.parametrize(
    "column", ["id", "queue", "name", "callable_name", "url", "target", "audience", "headers", "retry_options", "owner"]
)
def test_a_poisoned_row_that_waits_leaves_its_neighbours_in_sight(app, path, column):
    before, target, after = (app.defer(victim.note, name) for name in "abc")
    write(path, f"UPDATE safedefer_tasks SET {column} = {NO_TEXT} WHERE id = ?", (target.id,))
    assert {before.id, after.id} <= look(app.queue)[1]
    assert app.queue.find(after.id).state is TaskState.WAITING


#: What the attacker does while three tasks run; ? is the id of the second.
MEANWHILE = [
    *[f"UPDATE safedefer_tasks SET {column} = {value} WHERE id = ?" for column, value in HOSTILE],
    *[f"UPDATE safedefer_ledger SET {column} = {NO_TEXT} WHERE task_id = ?" for column in ("audience", "task_id", "owner")],
    f"UPDATE safedefer_attempts SET reason = {NO_TEXT} WHERE task_id = ?",
    f"UPDATE safedefer_names SET name = {NO_TEXT} WHERE name = 'b' AND ? != ''",
    "DELETE FROM safedefer_tasks WHERE id = ?",
    *[
        f"INSERT INTO safedefer_{table} SELECT 1, id, queue, name, callable_name, url, target, audience, {columns}"
        " FROM safedefer_tasks WHERE id = ?"
        for table, columns in {
            "dead": "headers, retry_options, eta, created, expires, 1, NULL, 0.0, token, NULL",
            "ended": "eta, created, expires, 1, 'succeeded', NULL, 0.0",
        }.items()
    ],
]  # fmt: skip


@pytest.mark.parametrize(("state", "verdict"), [
    (EndState.SUCCEEDED, Verdict.DONE), (EndState.FAILED, Verdict.DEAD), (EndState.FAILED, Verdict.DONE), (None, Verdict.RETRY),
])  # fmt: skip
@pytest.mark.parametrize("poison", MEANWHILE, ids=lambda text: text[:70])
def test_a_row_poisoned_while_it_runs_lets_its_neighbours_be_settled(app, path, poison, verdict, state):
    tasks = [app.options(name=name).defer(victim.note, name) for name in "abc"]
    leases = app.queue.lease(owner="w", limit=3, seconds=60, now=NOW)
    for held in leases:
        task = held.task
        run = Execution(audience=task.audience, task_id=task.id, digest=task.digest, owner="w", expires=task.expires)
        begin(app.queue.ledger, run, now=NOW, lease=60)
        if state is not None:
            record = AttemptRecord(
                task_id=task.id, audience=task.audience, started=NOW, ended=NOW, outcome="x", status=200
            )
            finish(app.queue.ledger, run, state, record)
    write(path, poison.replace("?", f"'{tasks[1].id}'"))
    settlement = Settlement(verdict=verdict, reason="why", at=NOW + 5)
    first, _, last = app.queue.settle_many([(held, settlement) for held in leases], now=NOW + 1)
    assert (first, last) == (True, True)
    for task in (tasks[0], tasks[2]):
        found = app.queue.find(task.id).state
        assert (
            found
            is {EndState.SUCCEEDED: TaskState.SUCCEEDED, EndState.FAILED: TaskState.DEAD, None: TaskState.WAITING}[
                state
            ]
        )


@pytest.mark.parametrize(
    "values",
    [{"task_retry_limit": -1}, {"min_backoff_seconds": 9.0, "max_backoff_seconds": 1.0}, {"task_age_limit": "x"}],
)
def test_retry_options_that_nobody_could_give_are_none_when_a_letter_is_read(values):
    assert stored_retry_options(values) is None
    assert stored_retry_options({"task_retry_limit": 3}).task_retry_limit == 3
