"""Dead letters that run again: what the storage says of one must not make its token worth more than it was.

The attacker writes the queue's storage and has captured tokens, but no key. The operator runs ``safedefer dead retry``.
"""

import asyncio
import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from safedefer import PermanentTaskFailure, TaskRetryOptions, deferred
from safedefer.app import App
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery
from safedefer.errors import (
    CapabilityExceeded,
    ExpiredTask,
    NotYetValid,
    QueueUnavailable,
    RejectedTask,
    ReplayedTask,
    RevokedKey,
    UnknownKey,
)
from safedefer.keys import Key, Keyring
from safedefer.ledger import Admission
from safedefer.policy import Policy
from safedefer.queues.base import DeadFilter, QueuedTask, Settlement, TaskState, Verdict
from safedefer.queues.memory import MemoryQueue
from safedefer.queues.sqlite import SQLiteQueue
from tests.adversarial import victim
from tests.adversarial.forge import DAY, NOW, URL, Clock, make_app, mint, post
from tests.queues.contract import execution_of
from tests.queues.single import begin, settle

HOUR = 3600
DEAD = Settlement(verdict=Verdict.DEAD, reason="planted")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def queue(request, tmp_path):
    queue = MemoryQueue() if request.param == "memory" else SQLiteQueue(str(tmp_path / "tasks.db"))
    yield queue
    queue.close()


def app_on(queue, clock, keyring=None, **options):
    """An application on a queue that others use as well."""
    if keyring is None:
        app = make_app(clock=clock, **options)
        app._queue = queue
        return app
    return App(keyring=keyring, policy=Policy(victim.__name__), queue=queue, environment="test", clock=clock, **options)


@pytest.fixture
def app(queue, clock):
    return app_on(queue, clock)


def deliver(app, clock):
    """Deliver all that waits, retries too."""

    async def run():
        options = DispatcherOptions(concurrency=1, poll_seconds=0.05)
        dispatcher = Dispatcher(
            app.queue, InProcessDelivery(app.handle), clock=clock, options=options, rng=random.Random(1)
        )
        for _ in range(40):
            await asyncio.wait_for(dispatcher.run_until_empty(), 60)
            due = app.queue.next_due(now=clock())
            if due is None:
                return
            clock.now = max(clock.now, due)

    asyncio.run(run())


def plant(app, clock, token, *, as_id=None, audience=f"test:default:default:{URL}"):
    """Put a captured token among the dead letters, with hints of the attacker's choice.

    The row is buried under another audience, as a writer of the table would leave the ledger alone: the entry of the
    token's own audience stays what it was.
    """
    claims = app.verify(token, expired=True).claims
    row = QueuedTask(
        id=as_id or claims["jti"],
        queue="default",
        token=token,
        audience="planted:default:default:/",
        url=URL,
        target="default",
        eta=0.0,
        created=clock(),
        expires=claims["exp"],
    )
    # What succeeded is in the history, and no id is in two places: the attacker deletes it.
    forget(app.queue, row.id)
    app.queue.enqueue_many([row])
    (lease,) = [one for one in app.queue.lease(owner="x", limit=9, seconds=1, now=clock()) if one.task.id == row.id]
    settle(app.queue, lease, DEAD, now=clock())
    return row.id


def forget(queue, task_id):
    queue.stats(now=NOW)  # a file has its tables when it is first used
    if isinstance(queue, MemoryQueue):
        queue._state.ended.pop(task_id, None)
    else:
        write(queue, "DELETE FROM safedefer_ended WHERE id = ?", task_id)


def write(queue, statement, *values):
    """What the attacker does: another connection, no checks of ours."""
    with closing(apsw.Connection(queue.file.path)) as connection:
        connection.execute(statement, values)


def refuses(app, task_id, error):
    with pytest.raises(RejectedTask) as caught:
        app.retry(task_id)
    assert type(caught.value) is error, caught.value
    assert app.queue.find(task_id).state is TaskState.DEAD
    return str(caught.value)


# --- A captured token is worth nothing more --------------------------------------------------------


@pytest.mark.parametrize("later", [0, 40 * DAY], ids=["valid", "expired"])
def test_a_captured_token_of_a_task_that_succeeded_is_not_paid_again_from_dead_rows(app, clock, ran, later):
    task = app.defer(victim.note, "pay")
    deliver(app, clock)
    assert ran == [(("pay",), {})]
    clock.now += later
    app.queue.prune(now=clock())
    names = [task.id, *(f"{number:032x}" for number in range(4))]
    for name in names:
        plant(app, clock, task.payload, as_id=name)
    if later:
        assert "defer it anew" in refuses(app, task.id, ExpiredTask)
    else:
        assert "has succeeded" in refuses(app, task.id, ReplayedTask)
    for name in names[1:]:
        assert "an id that its token does not have" in refuses(app, name, ReplayedTask)
    clock.now += 1
    again, refused = app.retry_all(DeadFilter())
    assert (again, set(refused)) == ([], set(names))
    deliver(app, clock)
    assert len(ran) == 1


def test_a_cancelled_task_does_not_come_back_as_a_dead_letter(app, clock, ran):
    task = app.options(countdown=60).defer(victim.note, "pay")
    assert app.cancel(task.id)
    clock.now += 60
    plant(app, clock, task.payload)
    refuses(app, task.id, ReplayedTask)


def test_a_dead_letter_that_was_run_again_does_not_come_back(app, clock, ran):
    task = app.defer(victim.fail, "once")
    deliver(app, clock)
    letter = app.queue.find(task.id)
    app.retry(task.id)
    plant(app, clock, letter.token)
    refuses(app, task.id, ReplayedTask)
    clock.now += 40 * DAY
    app.queue.prune(now=clock())
    assert "re-run" in refuses(app, task.id, ReplayedTask)
    app.queue.drop_dead([task.id])
    app.queue.prune(now=clock())
    plant(app, clock, letter.token)
    refuses(app, task.id, ExpiredTask)


def test_a_task_that_waits_is_not_brought_forward_by_a_dead_row(app, clock, ran):
    captured = mint(nbf=NOW + DAY, exp=NOW + 2 * DAY, args=["later"])
    refuses(app, plant(app, clock, captured), NotYetValid)
    clock.now += DAY
    assert app.retry("0123456789abcdef0123456789abcdef") is not None


def test_a_task_that_runs_now_is_not_run_a_second_time(app, clock, ran):
    task = app.defer(victim.note, "pay")
    (lease,) = app.queue.lease(owner="d", limit=1, seconds=60, now=clock())
    assert begin(app.queue.ledger, execution_of(lease.task), now=clock(), lease=60.0) is Admission.RUN
    settle(app.queue, lease, Settlement(verdict=Verdict.RETRY, at=clock() + DAY), now=clock())
    token = lease.task.token
    if isinstance(app.queue, MemoryQueue):
        del app.queue._state.rows[task.id]
    else:
        write(app.queue, "DELETE FROM safedefer_tasks")
    plant(app, clock, token)
    assert "runs now" in refuses(app, task.id, ReplayedTask)


def test_a_letter_runs_again_for_as_long_as_it_is_there(app, clock, ran):
    """Without an attacker: nothing is lost because somebody looked after two months."""
    task = app.defer(victim.fail, "wanted")
    deliver(app, clock)
    for _ in range(3):
        clock.now += 20 * DAY
        app.queue.prune(now=clock())
    again = app.retry(task.id)
    assert again.payload != task.payload
    deliver(app, clock)
    assert ran == [("fail", ("wanted",))] * 2
    assert post(app, task.payload)[1]["Safedefer-Outcome"] != "succeeded"


# --- What is signed is what was signed --------------------------------------------------------------


def test_a_re_run_says_what_the_first_task_said_and_not_what_the_row_says(queue, clock):
    app = app_on(queue, clock)
    retry = TaskRetryOptions(task_retry_limit=0, min_backoff_seconds=1.0)
    task = app.options(retry_options=retry, deadline=90, headers={"X-Shop": "1"}).defer(victim.fail)
    bare = app.options(queue="mail").defer(victim.fail)
    deliver(app, clock)
    hostile = {"task_retry_limit": 1000, "task_age_limit": 90 * DAY}
    if isinstance(queue, MemoryQueue):
        for task_id, view in list(queue._state.ended.items()):
            queue._state.ended[task_id] = type(view)(
                **{name: getattr(view, name) for name in view.__slots__} | {"retry_options": hostile}
            )
    else:
        write(queue, "UPDATE safedefer_dead SET retry_options = ?", json.dumps(hostile))
    again = app.retry(task.id)
    claims = app.verify(again.payload).claims
    assert (claims["retry"], claims["deadline"]) == ({"min_backoff_seconds": 1.0, "task_retry_limit": 0}, 90)
    assert (again.retry_options, claims["headers"]) == (retry, {"X-Shop": "1"})
    plain = app.verify(app.retry(bare.id).payload).claims
    assert "retry" not in plain
    assert [one["exp"] - one["nbf"] for one in (claims, plain)] == [31 * DAY] * 2


def test_the_chain_keeps_its_first_task_and_names_its_last(app, clock):
    first = app.defer(victim.fail)
    deliver(app, clock)
    chain = [first.id]
    for _ in range(3):
        again = app.retry(chain[-1])
        claims = app.verify(again.payload).claims
        assert (claims["retry_of"], claims["root"]) == (chain[-1], {"id": first.id, "kid": "now"})
        assert app.verify(again.payload).canonical
        chain.append(again.id)
        deliver(app, clock)


def test_a_limited_key_does_not_choose_the_root_of_its_re_run(app, clock):
    """Its tokens may name any task in ``retry_of``; the effects of that one must not be had in their name."""
    token = mint(kid="mail-only", aud=f"test:mail:default:{URL}", retry_of="f" * 32)
    with pytest.raises(CapabilityExceeded):
        app.verify(
            mint(
                kid="mail-only", aud=f"test:mail:default:{URL}", retry_of="f" * 32, root={"id": "f" * 32, "kid": "now"}
            )
        )
    plant(app, clock, token)
    again = app.retry("0123456789abcdef0123456789abcdef")
    assert app.verify(again.payload).claims["root"] == {"id": "0123456789abcdef0123456789abcdef", "kid": "mail-only"}


SECRETS = {"old": bytes(range(100, 150)), "new": bytes(range(60, 110))}


@pytest.mark.parametrize(("how", "error"), [("revoked", RevokedKey), ("gone", UnknownKey)])
def test_a_task_of_a_stolen_key_does_not_live_on_in_its_re_runs(queue, clock, ran, how, error):
    thief = app_on(queue, clock, Keyring(Key("old", SECRETS["old"])))
    stolen = thief.defer(victim.fail, "thief")
    deliver(thief, clock)
    rotated = Keyring(Key("new", SECRETS["new"]), Key("old", SECRETS["old"], "verify_only"))
    again = app_on(queue, clock, rotated).retry(stolen.id)
    ended = [Key("old", SECRETS["old"], "revoked")] if how == "revoked" else []
    safe = app_on(queue, clock, Keyring(Key("new", SECRETS["new"]), *ended))
    assert post(safe, again.payload)[0] == 403
    assert len(ran) == 1
    deliver(safe, clock)
    assert len(ran) == 1
    assert safe.queue.find(again.id).state is TaskState.DEAD
    refuses(safe, again.id, error)


# --- One letter keeps no other from running again ----------------------------------------------------


class Bomb:
    """Sets itself up for ever."""

    def __getstate__(self):
        return 1

    def __setstate__(self, state):
        raise AssertionError("decoded")


def take(*args):
    victim.RAN.append(("take", args))


def test_no_argument_is_decoded_by_whoever_runs_letters_again(queue, clock, ran):
    app = app_on(queue, clock, policy=Policy(victim.__name__, __name__))
    bomb, other = app.defer(take, Bomb()), app.defer(victim.fail, "behind")
    for lease in app.queue.lease(owner="d", limit=9, seconds=60, now=clock()):
        settle(app.queue, lease, DEAD, now=clock())
    clock.now += 1
    again, refused = app.retry_all(DeadFilter())
    assert {app.verify(task.payload).claims["retry_of"] for task in again} == {bomb.id, other.id}
    assert refused == {}


def test_a_letter_that_is_too_large_to_sign_again_keeps_no_other_from_running_again(queue, clock, ran):
    from safedefer.options import Limits

    probe = app_on(MemoryQueue(), clock)
    size = len(probe.serialize(victim.fail, "x" * 3000))
    app = app_on(queue, clock, limits=Limits(token_bytes=size))
    large, other = app.defer(victim.fail, "x" * 3000), app.defer(victim.fail, "behind")
    deliver(app, clock)
    clock.now += 1
    again, refused = app.retry_all(DeadFilter())
    assert [app.verify(task.payload).claims["retry_of"] for task in again] == [other.id]
    assert {task_id: error.slug for task_id, error in refused.items()} == {large.id: "task-too-large-error"}


def test_a_storage_that_fails_is_no_refusal(app, clock, monkeypatch):
    app.defer(victim.fail)
    deliver(app, clock)
    clock.now += 1

    def fails(*args, **kwargs):
        raise QueueUnavailable("the disk is full; make room")

    monkeypatch.setattr(type(app.queue), "replace_dead", fails)
    with pytest.raises(QueueUnavailable):
        app.retry_all(DeadFilter())


# --- An effect that is had once ------------------------------------------------------------------------

#: What each run does: "die" before the block, or have the effect and die after it.
PLAN: list[str] = []
HAD: list[bool] = []


def charge(path):
    if PLAN.pop(0) == "die":
        raise PermanentTaskFailure("before the effect")
    with closing(sqlite3.connect(path)) as connection, deferred.current_app().once(connection) as first:
        HAD.append(first)
        if first:
            connection.execute("INSERT INTO orders VALUES (1)")
    raise PermanentTaskFailure("after the effect")


@pytest.fixture
def shop(tmp_path):
    path = Path(tmp_path / "shop.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE orders (amount INTEGER)")
    PLAN.clear()
    HAD.clear()
    return str(path)


@pytest.fixture
def charging(queue, clock):
    app = app_on(queue, clock, policy=Policy(victim.__name__, __name__))
    deferred.configure(app)
    yield app
    deferred.configure(None)


@pytest.mark.parametrize(
    "plan",
    [["have", "die", "have"], ["have", "have", "have"], ["die", "have", "die", "have"], ["have", "die", "die", "have"]],
)
def test_an_effect_is_had_once_in_a_chain_of_re_runs(charging, clock, shop, plan):
    """It was had, and the task died; its re-run died before the block; the re-run of that one had it again."""
    PLAN.extend(plan)
    task = charging.defer(charge, shop)
    deliver(charging, clock)
    for _ in plan[1:]:
        task = charging.retry(task.id)
        deliver(charging, clock)
    assert PLAN == []
    assert HAD == [True, *[False] * (plan.count("have") - 1)]
    with closing(sqlite3.connect(shop)) as connection:
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1,)


def test_a_renamed_row_does_not_make_an_effect_happen_again(charging, clock, shop):
    PLAN.extend(["have", "have"])
    task = charging.defer(charge, shop)
    deliver(charging, clock)
    token = charging.queue.find(task.id).token
    plant(charging, clock, token, as_id="f" * 32)
    refuses(charging, "f" * 32, ReplayedTask)
    assert HAD == [True]
