"""A captured token, replayed: a task that has ended in whatever way does not run again, until its token expires."""

import asyncio
import json
import shutil

import pytest

from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.queues.base import TaskState
from tests.adversarial import victim
from tests.adversarial.forge import DAY, HEADERS, NOW, URL, Clock, make_app, mint, post
from tests.schema import vectors

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def app(request, tmp_path, clock):
    app = make_app(None if request.param == "memory" else tmp_path / "tasks.db", clock=clock)
    yield app
    app.close()


def deliver(app, clock):
    dispatcher = Dispatcher(
        app.queue, InProcessDelivery(app.handle), clock=clock, options=DispatcherOptions(poll_seconds=0.05)
    )
    asyncio.run(asyncio.wait_for(dispatcher.run_until_empty(), 60))


def succeeded(app, clock):
    task = app.defer(victim.note, 1)
    deliver(app, clock)
    return task


def failed(app, clock):
    task = app.defer(victim.fail, 1)
    deliver(app, clock)
    return task


def cancelled(app, clock):
    task = app.defer(victim.note, 1)
    assert app.cancel(task.id)
    return task


def purged(app, clock):
    task = app.defer(victim.note, 1)
    assert app.queue.purge("default", now=clock()) == 1
    return task


def given_up(app, clock):
    from safedefer.options import TaskRetryOptions

    task = app.options(retry_options=TaskRetryOptions(task_retry_limit=0)).defer(victim.stumble, 1)
    deliver(app, clock)
    assert app.queue.find(task.id).state is TaskState.DEAD
    return task


def run_again(app, clock):
    """A dead letter that was run again: its old token is spent all the same."""
    task = failed(app, clock)
    again = app.retry(task.id)
    deliver(app, clock)
    assert app.queue.find(again.id).state is TaskState.DEAD
    return task


def dropped(app, clock):
    task = failed(app, clock)
    assert app.queue.drop_dead([task.id]) == 1
    return task


ENDS = [succeeded, failed, cancelled, purged, given_up, run_again, dropped]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
@pytest.mark.parametrize("later", [0, 3600, 30 * DAY])
def test_a_captured_token_of_a_task_that_ended_does_not_run(app, clock, ran, end, later):
    task = end(app, clock)
    before = list(ran)
    clock.now += later
    app.queue.prune(now=clock())
    for _ in range(3):
        status, headers, _ = post(app, task.payload)
        assert (status, headers["Safedefer-Outcome"]) == (200, "duplicate")
    assert ran == before


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_when_the_ledger_has_forgotten_it_the_token_has_expired(app, clock, ran, end):
    task = end(app, clock)
    before = list(ran)
    for later in (31 * DAY + 20, 32 * DAY, 200 * DAY):
        clock.now = NOW + later
        app.queue.prune(now=clock())
        status, headers, _ = post(app, task.payload)
        assert (status, headers["Safedefer-Outcome"]) in {(200, "failed"), (200, "duplicate")}
    assert ran == before


def test_an_expired_task_does_not_run_whoever_posts_it(app, clock, ran):
    token = mint(exp=NOW + 5, nbf=NOW)
    clock.now = NOW + 16
    assert post(app, token)[1]["Safedefer-Outcome"] == "failed"
    assert ran == []


def test_replays_that_come_at_once_run_once(app, ran):
    token = mint()

    async def flood():
        answers = await asyncio.gather(*(app.handle(HEADERS, token, path=URL) for _ in range(12)))
        return sorted(answer.headers["Safedefer-Outcome"] for answer in answers)

    outcomes = asyncio.run(flood())
    assert outcomes.count("succeeded") == 1
    assert set(outcomes) <= {"succeeded", "duplicate", "running"}
    assert ran == [((), {})]


def test_another_token_of_a_known_id_is_refused_as_if_it_were_forged(app, ran):
    assert post(app, mint())[0] == 200
    reordered = vectors.mint(
        vectors.claims(call=json.loads(json.dumps(vectors.claims()["call"]))), head=vectors.header(order=(2, 1, 0))
    )
    for token in (mint(args=[1]), mint(exp=NOW + DAY), mint(kid="before"), reordered.encode()):
        status, headers, body = post(app, token)
        assert (status, headers["Safedefer-Outcome"], body) == (403, "refused", b"refused\n")
    assert ran == [((), {})]


def test_a_limited_key_does_not_spend_the_ids_of_another_queue(app, ran):
    """It signs the id of somebody else's task for its own queue, first."""
    assert post(app, mint(kid="mail-only", aud=f"test:mail:default:{URL}", args=["attacker"]))[0] == 200
    assert post(app, mint(kid="mail-only", args=["attacker"]))[0] == 403
    assert post(app, mint(args=["victim"]))[0] == 200
    assert ran == [(("attacker",), {}), (("victim",), {})]


def test_a_forged_token_does_not_spend_an_id(app, ran):
    good = mint()
    assert post(app, good[:-4] + b"AAAA")[0] == 403
    assert post(app, mint(kid="stolen"))[0] == 403
    assert post(app, good)[0] == 200
    assert ran == [((), {})]


def test_a_task_that_is_rejected_keeps_its_right_to_run_after_the_deploy(app, ran):
    missing = mint(call={"kind": "function", "module": victim.__name__, "qualname": "to_come"})
    assert post(app, missing)[1]["Safedefer-Outcome"] == "rejected"
    victim.to_come = to_come
    try:
        to_come.__module__, to_come.__qualname__ = victim.__name__, "to_come"
        assert post(app, missing)[0] == 200
    finally:
        del victim.to_come
    assert ran == ["deployed"]


def to_come():
    victim.RAN.append("deployed")


def test_a_pointer_and_its_stored_token_run_once_between_them(app, clock, ran):
    task = app.defer(victim.note, "x" * 20_000)
    pointer = task.payload
    stored = app.queue.find(task.id).token
    assert len(pointer) < 1000 < len(stored)
    assert post(app, stored)[1]["Safedefer-Outcome"] == "succeeded"
    assert post(app, pointer)[1]["Safedefer-Outcome"] == "duplicate"
    deliver(app, clock)
    for token in (pointer, stored):
        assert post(app, token)[1]["Safedefer-Outcome"] == "duplicate"
    assert len(ran) == 1


def test_the_other_way_round_too(app, ran):
    task = app.defer(victim.note, "x" * 20_000)
    stored = app.queue.find(task.id).token
    assert post(app, task.payload)[1]["Safedefer-Outcome"] == "succeeded"
    assert post(app, stored)[1]["Safedefer-Outcome"] == "duplicate"
    assert len(ran) == 1


def test_a_pointer_of_another_blob_with_the_same_id_is_another_token(app, ran):
    task = app.defer(victim.note, "x" * 20_000)
    assert post(app, task.payload)[0] == 200
    assert post(app, mint(jti=task.id))[0] == 403
    assert len(ran) == 1


def test_a_file_that_was_wound_back_runs_what_it_held_and_nothing_that_expired(tmp_path, clock, ran):
    """The ledger is in the file: winding both back is the one replay that it cannot see. ``exp`` bounds it."""
    path, copy = tmp_path / "tasks.db", tmp_path / "copy.db"
    app = make_app(path, clock=clock)
    task = app.defer(victim.note, 1)
    app.close()
    shutil.copy(path, copy)
    app = make_app(path, clock=clock)
    deliver(app, clock)
    app.close()
    for later, runs in ((0, 2), (32 * DAY, 2)):
        clock.now = NOW + later
        for stale in tmp_path.glob("tasks.db*"):
            stale.unlink()
        shutil.copy(copy, path)
        app = make_app(path, clock=clock)
        deliver(app, clock)
        assert app.queue.find(task.id).state in {TaskState.SUCCEEDED, TaskState.DEAD}
        app.close()
        assert len(ran) == runs
