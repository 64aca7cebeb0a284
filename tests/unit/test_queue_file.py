"""queue.yaml, the App and the dispatcher; ``safedefer queues`` and ``safedefer dead``."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from safedefer import App, Key, Keyring, KeyState, Policy, TaskRetryOptions
from safedefer.cli import main, processes
from safedefer.delivery.handler import Response
from safedefer.dispatcher.loop import Dispatcher, DispatcherOptions, InProcessDelivery, asks_to_wait, judge
from safedefer.errors import (
    ConfigurationError,
    InvalidTaskRetryOptionsError,
    QueueUnavailable,
    RejectedTask,
    UnknownQueueError,
)
from safedefer.options import Options
from safedefer.queues.base import DeadFilter, Lease, Settlement, TaskState, Verdict
from safedefer.queues.config import QueueFile
from safedefer.queues.rates import QueueLimits
from tests import sample_tasks as tasks
from tests.queues.contract import make_task
from tests.unit.apps import make_app, until
from tests.unit.delivering import Delivering

SECRET = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
FILE = """\
queue:
- name: mail
  rate: 20/s
  bucket_size: 1
  target: backend
  retry_parameters:
    task_retry_limit: 1
    min_backoff_seconds: 0
    max_backoff_seconds: 0
    task_age_limit: 60d
- name: default
  rate: 500/s
  bucket_size: 100
"""


NOW = 1_445_326_080.0  # 20 October 2015, 07:28:00 UTC


@pytest.fixture(autouse=True)
def clean():
    tasks.reset()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "queue.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def app(path):
    app = make_app(queue_yaml=path, targets={"backend": "http://127.0.0.1:1"})
    yield app
    app.close()


def dispatcher(app, deliver=None, **options):
    file = app.queue_file
    chosen = DispatcherOptions(
        limits=file.limits,
        retry_options={section.name: section.retry_parameters.given() for section in file.queue},
        **options,
    )
    return Dispatcher(app.queue, deliver or InProcessDelivery(app.handle), clock=time.time, options=chosen)


def work_off(app, condition):
    async def work():
        this = dispatcher(app)
        running = asyncio.create_task(this.run())
        await until(condition)
        this.stop()
        await running

    asyncio.run(work())


# --- The App ------------------------------------------------------------------------------------


def test_a_queue_has_its_target_and_a_task_its_own(app):
    assert app.options(queue="mail").defer(tasks.add, 1).target == "backend"
    assert app.options(queue="mail", target="default").defer(tasks.add, 1).target == "default"
    assert app.defer(tasks.add, 1).target == "default"


def test_only_declared_queues_exist(app):
    with pytest.raises(UnknownQueueError):
        app.options(queue="video").defer(tasks.add, 1)
    assert app.queues == {"default", "mail"}


def test_a_token_lives_as_long_as_its_queue_may_try(app):
    views = [app.queue.find(app.options(queue=queue).defer(tasks.add, 1).id) for queue in ("mail", "default")]
    assert [round((view.expires - view.eta) / 86_400) for view in views] == [60, 31]


def test_options_that_contradict_the_queues_are_refused(app):
    with pytest.raises(InvalidTaskRetryOptionsError, match="swap"):
        app.options(queue="mail", retry_options=TaskRetryOptions(min_backoff_seconds=5)).defer(tasks.add, 1)


def test_a_target_of_the_file_needs_an_address(path):
    with pytest.raises(ConfigurationError, match="backend"):
        make_app(queue_yaml=path, targets={})
    assert make_app(queue_yaml=QueueFile.load(path)).queues == {"default", "mail"}


def test_the_files_limit_on_storage_is_that_of_the_blobs(path, tmp_path):
    path.write_text(f"total_storage_limit: 30K\n{FILE}")
    app = make_app(queue=f"sqlite:///{tmp_path}/tasks.db", queue_yaml=path)
    app.defer(tasks.keywords, text="x" * 20_000)
    with pytest.raises(QueueUnavailable, match="30720 bytes"):
        app.defer(tasks.keywords, text="x" * 20_000)
    app.close()


def test_without_a_file_nothing_is_limited():
    app = make_app()
    assert (app.queue_file, app.queues) == (None, None)
    app.close()


# --- The dispatcher -----------------------------------------------------------------------------


def test_a_rate_is_kept_and_other_queues_go_on(app):
    for number in range(10):
        app.options(queue="mail", target="default").defer(tasks.add, number)
    for number in range(50):
        app.defer(tasks.add, -1 - number)
    began = time.monotonic()
    work_off(app, lambda: len(tasks.RAN) >= 60)
    assert time.monotonic() - began > 9 / 20 - 0.02
    # The mail came one by one, and no other task waited for it.
    before = tasks.RAN[: tasks.RAN.index(("add", 9, 0, 1))]
    assert sum(run[1] < 0 for run in before) > 10
    assert [run[1] for run in tasks.RAN if run[1] >= 0] == list(range(10))


def test_the_queues_retry_parameters_count_where_a_task_has_none(app):
    boom = app.options(queue="mail", target="default").defer(tasks.loud, "x")
    own = app.options(
        queue="mail", target="default", retry_options=TaskRetryOptions(task_retry_limit=2, task_age_limit=0)
    ).defer(tasks.loud, "x")

    work_off(app, lambda: app.queue.find(own.id).state is TaskState.DEAD)
    # Its own limits were exceeded. The other one's retries are over too, and its queue's age limit is 60 days off.
    assert (app.queue.find(own.id).attempts, app.queue.find(own.id).reason) == (3, "retry-and-age-limit")
    assert app.queue.find(boom.id).state is not TaskState.DEAD
    assert app.queue.find(boom.id).attempts >= 2


def test_a_file_that_changed_since_does_not_take_a_tasks_own_limits_away(app, path):
    own = TaskRetryOptions(task_retry_limit=0, min_backoff_seconds=0.1)
    task = app.defer_with(Options(queue="default", retry_options=own), tasks.loud, ["x"], {})
    path.write_text(FILE + "  retry_parameters: {max_backoff_seconds: 0}\n")
    app.queue_file = QueueFile.load(path)
    work_off(app, lambda: app.queue.find(task.id).state is TaskState.DEAD)
    assert app.queue.find(task.id).reason == "retry-limit"


def test_a_paused_queue_rests_and_goes_on_in_a_running_dispatcher(app):
    async def work():
        this = dispatcher(app)
        running = asyncio.create_task(this.run())
        app.queue.pause("default", paused=True, now=time.time())
        app.defer(tasks.add, 1)
        await asyncio.sleep(0.3)
        assert tasks.RAN == []
        app.queue.pause("default", paused=False, now=time.time())
        await until(lambda: tasks.RAN)
        this.stop()
        await running

    asyncio.run(work())
    assert tasks.RAN == [("add", 1, 0, 1)]


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (503, {"retry-after": "7"}, 7.0),
        (429, {"Retry-After": "7"}, 7.0),
        (503, {"Retry-After": "7", "Safedefer-Outcome": "busy"}, 7.0),
        (503, {"Retry-After": "99999"}, 3600.0),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 1.0),
        (503, {"Retry-After": "Tue, 20 Oct 2015 07:38:00 GMT"}, 600.0),
        (429, {"Retry-After": "Tue, 20 Oct 2015 09:38:00 GMT"}, 3600.0),
        (503, {"Retry-After": "7", "Safedefer-Outcome": "early"}, None),
        (503, {}, None),
        (500, {"Retry-After": "7"}, None),
        (409, {"Retry-After": "7", "Safedefer-Outcome": "running"}, None),
    ],
)
def test_which_answers_hold_a_queue(status, headers, seconds):
    assert asks_to_wait(Response(status, headers, b""), now=NOW) == seconds


def test_a_proxy_that_asks_to_wait_charges_no_attempt():
    lease = Lease(task=make_task(), owner="o", until=200.0)
    settlement = judge(lease, Response(503, {"Retry-After": "7"}, b""), now=100.0, jitter=0.0)
    assert (settlement.verdict, settlement.charged, settlement.at) == (Verdict.RETRY, False, 107.0)
    assert not judge(lease, Response(503, {}, b""), now=100.0, jitter=0.0).charged


def test_a_handler_whose_clock_is_an_hour_behind_puts_a_task_off_by_a_minute():
    lease = Lease(task=make_task(), owner="o", until=200.0)
    answer = Response(503, {"Retry-After": "3590", "Safedefer-Outcome": "early"}, b"")
    assert judge(lease, answer, now=100.0, jitter=0.0).at == 160.0


def test_an_answer_that_asks_to_wait_holds_the_whole_queue_and_no_other(app):
    posted = []

    async def deliver(task, headers):
        posted.append(task.queue)
        return Response(*((503, {"Retry-After": "60"}, b"") if task.queue == "default" else (200, {}, b"")))

    async def work():
        this = dispatcher(app, Delivering(deliver), concurrency=1)
        running = asyncio.create_task(this.run())
        for _ in range(5):
            app.defer(tasks.add, 1)
        await until(lambda: any(control.held_until for control in app.queue.controls(now=time.time())))
        app.options(queue="mail").defer(tasks.add, 1)
        await until(lambda: "mail" in posted)
        this.stop()
        await running

    asyncio.run(work())
    assert posted.count("mail") == 1
    assert 1 <= posted.count("default") <= 2
    (held,) = [control for control in app.queue.controls(now=time.time()) if control.queue == "default"]
    assert held.held_until > time.time() + 50


# --- Dead letters -------------------------------------------------------------------------------


def die(app, count=1, **options):
    made = [app.options(**options).defer(tasks.loud, number) for number in range(count)]
    leases = app.queue.lease(owner="test", limit=1000, seconds=60.0, now=time.time() + 1)
    dead = Settlement(verdict=Verdict.DEAD, reason="retry-limit")
    app.queue.settle_many([(lease, dead) for lease in leases], now=time.time() - 1)
    return made


@pytest.fixture
def free(tmp_path):
    app = make_app(queue=f"sqlite:///{tmp_path}/tasks.db", keyring=Keyring.from_text(f"k1:{SECRET}"))
    yield app
    app.close()


def test_a_dead_letter_runs_again_in_another_queue_at_another_time(free):
    (dead,) = die(free, url=None)
    when = datetime.now(UTC) + timedelta(hours=1)
    task = free.retry(dead.id, queue="mail", eta=when)
    view = free.queue.find(task.id)
    assert (task.queue_name, task.url, view.queue) == ("mail", "/_ah/queue/mail", "mail")
    assert view.eta == pytest.approx(when.timestamp())
    claims = json.loads(_payload(view.token))
    assert claims["aud"] == "test:mail:default:/_ah/queue/mail"
    assert (claims["retry_of"], claims["nbf"]) == (dead.id, int(when.timestamp()))
    assert free.queue.find(dead.id) is None


def _payload(token):
    part = token.split(b".")[1]
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


def test_a_dead_letter_stays_if_its_new_place_is_impossible(app):
    (dead,) = die(app)
    with pytest.raises(UnknownQueueError):
        app.retry(dead.id, queue="video")
    assert app.queue.find(dead.id).state is TaskState.DEAD


def test_all_that_a_filter_means_run_again_and_the_rest_is_told(tmp_path):
    path = f"sqlite:///{tmp_path}/tasks.db"
    keyring = Keyring.from_text(f"k1:{SECRET}")
    app = make_app(queue=path, keyring=keyring)
    kept, others = die(app, 150), die(app, 3, queue="mail")
    tasks_again, refused = app.retry_all(DeadFilter(queue="default"))
    assert (len(tasks_again), refused) == (150, {})
    assert {view.id for view in app.queue.dead_letters(DeadFilter())} == {task.id for task in others}
    assert kept[0].id not in {task.id for task in tasks_again}
    app.close()
    stranger = make_app(queue=path, keyring=keyring, policy=Policy("builtins:len"))
    tasks_again, refused = stranger.retry_all(DeadFilter())
    assert (tasks_again, set(refused)) == ([], {task.id for task in others})
    assert all(isinstance(error, RejectedTask) for error in refused.values())
    assert len(stranger.queue.dead_letters(DeadFilter())) == 3
    stranger.close()


def test_a_letter_that_our_key_may_not_sign_keeps_no_other_from_running_again(tmp_path):
    path = f"sqlite:///{tmp_path}/tasks.db"
    secret = bytes(range(7, 39))
    app = make_app(queue=path, keyring=Keyring(Key("k1", secret, pickle=True)), allow_pickle=True)
    (stays,), others = die(app, 1, pickle=True), die(app, 3, queue="mail")
    app.close()
    keys = [Key("k1", secret, KeyState.VERIFY_ONLY, pickle=True), Key("k2", bytes(range(60, 99)), KeyState.ACTIVE)]
    plain = make_app(queue=path, keyring=Keyring(*keys), allow_pickle=True)
    tasks_again, refused = plain.retry_all(DeadFilter())
    assert len(tasks_again) == len(others)
    assert [(task_id, error.slug) for task_id, error in refused.items()] == [(stays.id, "not-deferrable")]
    assert plain.queue.find(stays.id).state is TaskState.DEAD
    plain.close()


@pytest.mark.parametrize("limits", [{"queues": ["mail"]}, {"patterns": ["tests.sample_tasks"]}])
def test_a_limited_key_signs_no_re_run(tmp_path, limits):
    path = f"sqlite:///{tmp_path}/tasks.db"
    secret = bytes(range(7, 39))
    app = make_app(queue=path, keyring=Keyring(Key("k1", secret)))
    dead = die(app, 2, queue="mail")
    app.close()
    keys = [Key("k1", secret, KeyState.VERIFY_ONLY), Key("k2", bytes(range(60, 99)), KeyState.ACTIVE, **limits)]
    limited = make_app(queue=path, keyring=Keyring(*keys))
    tasks_again, refused = limited.retry_all(DeadFilter())
    assert tasks_again == []
    assert {task_id: error.slug for task_id, error in refused.items()} == {
        task.id: "capability-exceeded" for task in dead
    }
    limited.close()


# --- The command line ---------------------------------------------------------------------------


@pytest.fixture
def command(free, path, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEDEFER_KEYS", f"k1:{SECRET}")
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_QUEUE", f"sqlite:///{tmp_path}/tasks.db")
    monkeypatch.setenv("SAFEDEFER_ENVIRONMENT", "test")
    monkeypatch.setenv("SAFEDEFER_QUEUE_YAML", str(path))
    free.queue.stats(now=0.0)  # makes the file

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, result.output
        return result.output

    return run


def test_queues_are_updated_listed_paused_and_resumed(command, free):
    assert command("queues", "list") == "default  no limits in force\nmail  no limits in force\n"
    assert command("queues", "update") == "2 queues have limits\n"
    assert list(free.queue.controls(now=0.0))[1].limits == QueueLimits(queue="mail", rate=20.0, bucket_size=1)
    assert "mail is paused" in command("queues", "pause", "mail")
    assert command("queues", "list") == "default  rate 500/s, bucket 100\nmail  rate 20/s, bucket 1  paused\n"
    command("queues", "resume", "mail")
    assert "paused" not in command("queues", "list")
    assert "there is no queue video" in command("queues", "pause", "video", code=1)


def test_queues_are_counted_and_purged(command, free):
    assert command("queues", "stats") == "no tasks\n"
    free.options(queue="mail").defer_many([(tasks.add, (n,), {}) for n in range(3)])
    free.defer(tasks.add, 1)
    assert "mail  3 waiting  0 running  0 dead" in command("queues", "stats")
    assert json.loads(command("queues", "stats", "--json").splitlines()[1])["waiting"] == 3
    assert command("queues", "purge", "mail", "--yes") == "cancelled 3 tasks of mail\n"
    assert len(free.queue.tasks()) == 1
    command("queues", "purge", "default", code=1)  # it asks, and nobody answers
    assert len(free.queue.tasks()) == 1


def test_dead_letters_are_listed_shown_exported_retried_and_purged(command, free):
    assert command("dead", "list") == "no dead letters\n"
    first, second, third = die(free, 3)
    assert [line.split()[0] for line in command("dead", "list").splitlines()] == sorted(
        t.id for t in (first, second, third)
    )
    assert command("dead", "list", "--reason", "expired-task") == "no dead letters\n"
    assert json.loads(command("dead", "show", first.id))["reason"] == "retry-limit"
    assert command("dead", "list", "--days", "1") == "no dead letters\n"
    lines = [json.loads(line) for line in command("dead", "export", "--queue", "default").splitlines()]
    assert {line["id"]: line["token"].encode() for line in lines}[second.id] == second.payload
    assert "runs again as" in command("dead", "retry", first.id, "--to-queue", "mail", "--in", "60")
    assert [view.queue for view in free.queue.tasks(states=[TaskState.WAITING])] == ["mail"]
    assert "no dead letter" in command("dead", "show", first.id, code=1)
    assert "no dead letter" in command("dead", "retry", first.id, code=1)
    command("dead", "retry", code=2)
    command("dead", "retry", second.id, "--all", code=2)
    assert command("dead", "retry", "--all", "--callable", "tests.sample_tasks:loud") == "2 run again\n"
    die(free, 2)
    assert command("dead", "purge", "--reason", "no-such", "--yes") == "deleted 0 dead letters\n"
    deleted = command("dead", "purge", "--yes")
    assert deleted.startswith("deleted ")
    assert command("dead", "list") == "no dead letters\n"


def test_what_does_not_verify_stays_and_is_told(command, free, monkeypatch):
    (dead,) = die(free)
    monkeypatch.setenv("SAFEDEFER_POLICY", "builtins:len")
    output = command("dead", "retry", "--all", code=1)
    assert f"{dead.id} stays: policy-violation" in output
    assert f"{dead.id} stays" in command("dead", "retry", dead.id, code=1)
    assert free.queue.find(dead.id).state is TaskState.DEAD


def test_settings_say_how_much_the_queue_keeps(command, monkeypatch):
    for name, value in (("BLOB_LIMIT", "1"), ("TOMBSTONE_SECONDS", "0"), ("DEAD_LIMIT", "1")):
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    app = App.from_settings()
    with pytest.raises(QueueUnavailable, match="blob_limit"):
        app.defer(tasks.keywords, text="x" * 20_000)
    for _ in range(2):
        assert app.cancel(app.options(name="n").defer(tasks.add, 1).id)
    die(app, 3)
    app.queue.prune(now=time.time())
    assert len(app.queue.dead_letters(DeadFilter())) == 1
    assert len(command("dead", "list", "--archived").splitlines()) == 2
    app.close()


def test_limits_end_with_the_file_that_declared_them(tmp_path):
    (tmp_path / "queue.yaml").write_text(FILE)
    url = f"sqlite:///{tmp_path}/q.db"
    for path, limited in ((tmp_path / "queue.yaml", True), (None, False)):
        app = make_app(queue=url, queue_yaml=path)
        app.queue.pause("held", paused=True, now=time.time())
        options = processes._dispatcher_options(app, 60.0, 1.0, ())
        deliver = InProcessDelivery(app.handle)
        asyncio.run(Dispatcher(app.queue, deliver, clock=time.time, options=options).run_until_empty())
        controls = {control.queue: control for control in app.queue.controls(now=time.time())}
        assert ("mail" in controls) == limited
        assert controls["held"].paused  # a pause is nobody's declaration
        app.close()
