"""The emulator of Cloud Tasks, by Google's own client. The table in the emulator's docstring names the sources."""

import datetime
import json
import urllib.request

import jwt
import pytest
from google.api_core import exceptions
from google.cloud import tasks_v2
from google.protobuf import duration_pb2, field_mask_pb2, timestamp_pb2

from safedefer.queues.cloudtasks.emulator.resources import RetryConfig
from safedefer.queues.cloudtasks.emulator.tokens import TokenSigner
from safedefer.queues.config import QueueFile
from tests.cloudtasks.emulated import KEY, PARENT, QUEUE, T0, Emulated, new_client, wait_for

DAY = 86_400


@pytest.fixture
def emulated():
    made = Emulated(queues=(QUEUE,))
    yield made
    made.close()


def seconds(number):
    return duration_pb2.Duration(seconds=int(number), nanos=round((number % 1) * 1e9))


def moment(number):
    return timestamp_pb2.Timestamp(seconds=int(number))


def fast(**members):
    return tasks_v2.RetryConfig(
        {"max_attempts": -1, "min_backoff": seconds(10), "max_backoff": seconds(300), **members}
    )


# --- Queues -----------------------------------------------------------------------------------------------------------


def test_a_queue_has_googles_defaults_and_is_listed(emulated):
    client = emulated.client
    made = client.create_queue(parent=PARENT, queue={"name": f"{PARENT}/queues/other"})
    assert (made.rate_limits.max_dispatches_per_second, made.rate_limits.max_concurrent_dispatches) == (500, 1000)
    assert (made.retry_config.max_attempts, made.retry_config.max_doublings) == (100, 16)
    assert (made.retry_config.min_backoff.total_seconds(), made.retry_config.max_backoff.total_seconds()) == (0.1, 3600)
    assert made.state is tasks_v2.Queue.State.RUNNING
    assert client.get_queue(name=made.name) == made
    assert [queue.name for queue in client.list_queues(parent=PARENT)] == [QUEUE, made.name]
    assert [queue.name for queue in client.list_queues(request={"parent": PARENT, "page_size": 1})] == [
        QUEUE,
        made.name,
    ]


def test_a_queue_is_not_made_twice_and_not_again_for_three_days(emulated):
    client = emulated.client
    with pytest.raises(exceptions.Conflict):
        client.create_queue(parent=PARENT, queue={"name": QUEUE})
    client.delete_queue(name=QUEUE)
    with pytest.raises(exceptions.NotFound):
        client.get_queue(name=QUEUE)
    emulated.clock.moment += 3 * DAY - 1
    with pytest.raises(exceptions.BadRequest):
        client.create_queue(parent=PARENT, queue={"name": QUEUE})
    emulated.clock.moment += 1
    client.create_queue(parent=PARENT, queue={"name": QUEUE})


def test_an_update_changes_what_its_mask_names_and_makes_a_queue_that_is_not_there(emulated):
    client = emulated.client
    client.update_queue(
        queue={"name": QUEUE, "rate_limits": {"max_dispatches_per_second": 7}, "retry_config": {"max_attempts": 3}},
        update_mask=field_mask_pb2.FieldMask(paths=["rate_limits.max_dispatches_per_second"]),
    )
    queue = client.get_queue(name=QUEUE)
    assert queue.rate_limits.max_dispatches_per_second == 7
    assert queue.rate_limits.max_burst_size == 7
    assert queue.retry_config.max_attempts == 100
    name = f"{PARENT}/queues/fresh"
    made = client.update_queue(queue={"name": name, "retry_config": {"max_attempts": -1}})
    assert made.retry_config.max_attempts == -1
    assert client.get_queue(name=name) == made


@pytest.mark.parametrize("queue", [
    {"rate_limits": {"max_dispatches_per_second": 501}},
    {"rate_limits": {"max_concurrent_dispatches": 5001}},
    {"retry_config": {"max_attempts": -2}},
    {"retry_config": {"min_backoff": {"seconds": 9}, "max_backoff": {"seconds": 8}}},
])  # fmt: skip
def test_values_beyond_googles_bounds_are_refused(emulated, queue):
    with pytest.raises(exceptions.BadRequest):
        emulated.client.update_queue(queue={"name": QUEUE, **queue})


def test_a_paused_queue_takes_tasks_and_dispatches_none_until_it_is_resumed(emulated):
    client = emulated.client
    assert client.pause_queue(name=QUEUE).state is tasks_v2.Queue.State.PAUSED
    client.create_task(parent=QUEUE, task=emulated.http())
    assert len(list(client.list_tasks(parent=QUEUE))) == 1
    assert emulated.target.requests == []
    client.resume_queue(name=QUEUE)
    emulated.requests(1)


def test_a_purge_deletes_all_tasks(emulated):
    client = emulated.client
    client.pause_queue(name=QUEUE)
    named = client.create_task(parent=QUEUE, task=emulated.http())
    emulated.clock.moment += 5
    assert client.purge_queue(name=QUEUE).purge_time.timestamp() == T0 + 5
    assert list(client.list_tasks(parent=QUEUE)) == []
    with pytest.raises(exceptions.NotFound):
        client.get_task(name=named.name)


# --- Tasks ------------------------------------------------------------------------------------------------------------


def test_a_name_is_used_once_and_free_again_a_day_after_its_task_ended(emulated):
    client, name = emulated.client, f"{QUEUE}/tasks/once"
    client.pause_queue(name=QUEUE)
    client.create_task(parent=QUEUE, task=emulated.http(name=name))
    with pytest.raises(exceptions.Conflict):
        client.create_task(parent=QUEUE, task=emulated.http(name=name))
    assert client.get_task(name=name).name == name
    client.delete_task(name=name)
    with pytest.raises(exceptions.NotFound):
        client.get_task(name=name)
    with pytest.raises(exceptions.NotFound):
        client.delete_task(name=name)
    emulated.clock.moment += DAY - 1
    with pytest.raises(exceptions.Conflict):
        client.create_task(parent=QUEUE, task=emulated.http(name=name))
    emulated.clock.moment += 1
    client.create_task(parent=QUEUE, task=emulated.http(name=name))


def test_in_a_queue_of_queue_yaml_a_name_is_free_after_nine_days():
    file = QueueFile.parse("queue: [{name: mail, rate: 0, bucket_size: 40}]")
    emulated = Emulated(queue_file=file, location=PARENT)
    try:
        client, name = emulated.client, f"{QUEUE}/tasks/once"
        assert client.get_queue(name=QUEUE).state is tasks_v2.Queue.State.PAUSED
        assert client.get_queue(name=QUEUE).rate_limits.max_burst_size == 40
        client.create_task(parent=QUEUE, task=emulated.http(name=name))
        client.delete_task(name=name)
        emulated.clock.moment += 9 * DAY - 1
        with pytest.raises(exceptions.Conflict):
            client.create_task(parent=QUEUE, task=emulated.http(name=name))
        emulated.clock.moment += 1
        client.create_task(parent=QUEUE, task=emulated.http(name=name))
    finally:
        emulated.close()


@pytest.mark.parametrize(("members", "text"), [
    ({"name": f"{QUEUE}/tasks/not a name"}, "name"),
    ({"name": f"{QUEUE}-2/tasks/t"}, "not that of the request"),
    ({"schedule_time": moment(T0 + 30 * DAY + 1)}, "30 days"),
    ({"dispatch_deadline": seconds(14.9)}, "dispatchDeadline"),
    ({"dispatch_deadline": seconds(1_800.1)}, "dispatchDeadline"),
    ({"request": {"url": "ftp://a"}}, "http"),
    ({"request": {"url": "http://a/" + "x" * 2075}}, "2083"),
    ({"request": {"http_method": tasks_v2.HttpMethod.GET}}, "body"),
    ({"request": {"headers": {"X-Long": "x" * 81_920}}}, "80 KB"),
    ({"request": {"body": b"x" * 1_048_570}}, "size"),
    ({"request": {"oidc_token": {"service_account_email": "nobody"}}}, "serviceAccountEmail"),
])  # fmt: skip
def test_a_task_that_google_would_not_take_is_refused(emulated, members, text):
    with pytest.raises(exceptions.BadRequest, match=text):
        emulated.client.create_task(parent=QUEUE, task=emulated.http(**members))
    assert list(emulated.client.list_tasks(parent=QUEUE)) == []


def test_an_app_engine_task_is_smaller_and_may_take_a_day(emulated):
    client = emulated.client
    client.pause_queue(name=QUEUE)

    def task(**members):
        request = {"relative_uri": "/run", **members.pop("request", {})}
        return tasks_v2.Task({"app_engine_http_request": request, **members})

    assert client.create_task(parent=QUEUE, task=task(dispatch_deadline=seconds(86_415)))
    for wrong in (
        {"request": {"body": b"x" * 102_401}}, {"request": {"relative_uri": "run"}},
        {"request": {"relative_uri": "/a b"}}, {"dispatch_deadline": seconds(86_416)},
    ):  # fmt: skip
        with pytest.raises(exceptions.BadRequest):
            client.create_task(parent=QUEUE, task=task(**wrong))


def test_the_body_is_in_the_full_view_only(emulated):
    client = emulated.client
    client.pause_queue(name=QUEUE)
    made = client.create_task(parent=QUEUE, task=emulated.http())
    assert made.http_request.body == b""
    request = {"name": made.name, "response_view": tasks_v2.Task.View.FULL}
    assert client.get_task(request=request).http_request.body == b"token"
    assert made.dispatch_deadline == datetime.timedelta(minutes=10)


def refused(request):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as answer:
        return json.load(answer)


def test_errors_have_googles_shape(emulated):
    assert refused(f"{emulated.url}/v2/{QUEUE}-2") == {
        "error": {"code": 404, "message": "Queue does not exist", "status": "NOT_FOUND"}
    }
    for method, path, body in (
        ("POST", f"{QUEUE}/tasks", b"{"), ("POST", f"{QUEUE}/tasks", b'{"task": {"no_such": 1}}'),
        ("POST", f"{PARENT}/queues", b"[" * 100_000), ("POST", f"{QUEUE}/tasks", b'{"task": {"httpRequest": []}}'),
    ):  # fmt: skip
        request = urllib.request.Request(f"{emulated.url}/v2/{path}", data=body, method=method)
        assert refused(request)["error"]["status"] == "INVALID_ARGUMENT"


def test_a_batch_takes_each_task_by_itself_and_names_those_that_failed(emulated):
    client = emulated.client
    client.pause_queue(name=QUEUE)
    tasks = [emulated.http(name=f"{QUEUE}/tasks/{name}") for name in ("a", "b", "a")]
    request = {"parent": QUEUE, "requests": [{"parent": QUEUE, "task": task} for task in tasks]}
    operation = client.batch_create_tasks(request=request)
    assert [task.name for task in operation.result(timeout=60).tasks] == [f"{QUEUE}/tasks/a", f"{QUEUE}/tasks/b"]
    assert {index: status.code for index, status in operation.metadata.failed_requests.items()} == {2: 6}
    operation = client.batch_delete_tasks(request={"parent": QUEUE, "names": [task.name for task in tasks]})
    assert {index: status.code for index, status in operation.metadata.failed_requests.items()} == {2: 5}
    assert list(client.list_tasks(parent=QUEUE)) == []
    with pytest.raises(exceptions.BadRequest):
        client.batch_create_tasks(request={"parent": QUEUE, "requests": [{"parent": QUEUE, "task": tasks[0]}] * 101})


def test_a_batch_of_which_nothing_succeeds_is_an_error_with_the_failures(emulated):
    client, task = emulated.client, emulated.http(name=f"{QUEUE}/tasks/a")
    client.pause_queue(name=QUEUE)
    client.create_task(parent=QUEUE, task=task)
    operation = client.batch_create_tasks(request={"parent": QUEUE, "requests": [{"parent": QUEUE, "task": task}]})
    assert operation.exception(timeout=60) is not None
    assert {index: status.code for index, status in operation.metadata.failed_requests.items()} == {0: 6}


# --- Dispatching ------------------------------------------------------------------------------------------------------


def test_a_request_has_the_tasks_headers_and_the_services_own(emulated):
    client = emulated.client
    given = {"X-Mine": "1", "Content-Type": "application/jose", "User-Agent": "me", "X-AppEngine-QueueName": "forged",
             "X-CloudTasks-TaskRetryCount": "9"}  # fmt: skip
    client.create_task(parent=QUEUE, task=emulated.http(name=f"{QUEUE}/tasks/t", request={"headers": given}))
    ((method, path, headers, body),) = emulated.requests(1)
    assert (method, path, body) == ("POST", "/run", b"token")
    assert {name: value for name, value in headers.items() if name.startswith("X-") or name in given} == {
        "X-Mine": "1",
        "Content-Type": "application/jose",
        "User-Agent": "Google-Cloud-Tasks",
        "X-CloudTasks-QueueName": "mail",
        "X-CloudTasks-TaskName": "t",
        "X-CloudTasks-TaskRetryCount": "0",
        "X-CloudTasks-TaskExecutionCount": "0",
        "X-CloudTasks-TaskETA": f"{T0:.6f}",
    }
    wait_for(lambda: not list(client.list_tasks(parent=QUEUE)), "the task's end")


@pytest.mark.parametrize(("kind", "family", "executions", "reason"), [
    ("http", "X-CloudTasks", ["0", "0", "1", "2"], ""),
    ("app_engine", "X-AppEngine", ["0", "1", "2", "3"], "App Error"),
])  # fmt: skip
def test_retries_count_dispatches_and_executions_count_answers(emulated, kind, family, executions, reason):
    """5xx are no executions of HTTP tasks, and are of App Engine's."""
    client, name = emulated.client, f"{QUEUE}/tasks/t"
    client.update_queue(queue={"name": QUEUE, "retry_config": fast()})
    emulated.target.answers = [500, 404, 429]
    task = emulated.http(name=name)
    if kind == "app_engine":
        task = tasks_v2.Task({"name": name, "app_engine_http_request": {"relative_uri": "/run", "body": b"token"}})
    client.create_task(parent=QUEUE, task=task)
    for attempt, wait in enumerate((10, 20, 40), 1):
        emulated.requests(attempt)
        assert emulated.settled(name, attempt).schedule_time.timestamp() == emulated.clock.moment + wait
        emulated.tick(wait)
    headers = [each[2] for each in emulated.requests(4)]
    assert [each[f"{family}-TaskRetryCount"] for each in headers] == ["0", "1", "2", "3"]
    assert [each[f"{family}-TaskExecutionCount"] for each in headers] == executions
    assert [each.get(f"{family}-TaskPreviousResponse") for each in headers] == [None, "500", "404", "429"]
    assert [each.get(f"{family}-TaskRetryReason") for each in headers] == [None, reason, reason, reason]


def test_the_backoff_is_the_documented_one():
    config = RetryConfig(min_backoff=10, max_backoff=300, max_doublings=3)
    assert [config.backoff(failures) for failures in range(1, 9)] == [10, 20, 40, 80, 160, 240, 300, 300]
    assert RetryConfig(max_doublings=2**31 - 1).backoff(2**31) == 3600


@pytest.mark.parametrize(("attempts", "duration", "ends"), [
    (3, 0, [False, False, True]), (-1, 0, [False] * 3), (2, 25, [False, False, True]), (-1, 25, [False, False, True]),
])  # fmt: skip
def test_a_task_is_given_up_when_attempts_and_duration_are_both_exceeded(attempts, duration, ends):
    config = RetryConfig(max_attempts=attempts, max_retry_duration=duration)
    assert [config.is_exhausted(number, elapsed) for number, elapsed in ((1, 0), (2, 10), (3, 30))] == ends


def test_a_task_that_is_given_up_is_gone_and_its_name_used(emulated):
    client, name = emulated.client, f"{QUEUE}/tasks/t"
    emulated.target.answers = [500]
    client.create_task(parent=QUEUE, task=emulated.http(name=name, retry_config={"max_attempts": 1}))
    emulated.requests(1)
    wait_for(lambda: not list(client.list_tasks(parent=QUEUE)), "the task's end")
    with pytest.raises(exceptions.Conflict):
        client.create_task(parent=QUEUE, task=emulated.http(name=name))


def test_a_retry_after_is_considered(emulated):
    client, name = emulated.client, f"{QUEUE}/tasks/t"
    client.update_queue(queue={"name": QUEUE, "retry_config": fast()})
    emulated.target.answers, emulated.target.headers = [503], {"Retry-After": "77"}
    client.create_task(parent=QUEUE, task=emulated.http(name=name))
    emulated.requests(1)
    assert emulated.settled(name, 1).schedule_time.timestamp() == T0 + 77


@pytest.mark.parametrize(("status", "slowed"), [(503, True), (429, True), (425, False), (500, False)])
def test_overload_slows_the_whole_queue_and_other_failures_do_not(emulated, status, slowed):
    client = emulated.client
    limits = {"max_dispatches_per_second": 1, "max_concurrent_dispatches": 1}
    client.update_queue(queue={"name": QUEUE, "rate_limits": limits, "retry_config": fast()})
    emulated.target.answers = [status]
    first = client.create_task(parent=QUEUE, task=emulated.http())
    emulated.requests(1)
    emulated.settled(first.name, 1)
    client.create_task(parent=QUEUE, task=emulated.http())
    emulated.tick(1)
    if slowed:
        assert len(emulated.target.requests) == 1
        emulated.tick(1)
    emulated.requests(2)


def test_the_rate_is_a_bucket_of_tokens(emulated):
    client = emulated.client
    client.update_queue(queue={"name": QUEUE, "rate_limits": {"max_dispatches_per_second": 2}})
    for _ in range(5):
        client.create_task(parent=QUEUE, task=emulated.http())
    emulated.requests(2)
    emulated.tick(0.5)
    emulated.requests(3)
    emulated.tick(100)
    emulated.requests(5)


def test_no_more_are_dispatched_at_once_than_the_queue_says(emulated):
    client = emulated.client
    client.update_queue(queue={"name": QUEUE, "rate_limits": {"max_concurrent_dispatches": 2}})
    emulated.target.held = held = emulated.loop.call(_event())
    for _ in range(3):
        client.create_task(parent=QUEUE, task=emulated.http())
    emulated.requests(2)
    emulated.tick(100)
    assert len(emulated.target.requests) == 2
    emulated.loop.loop.call_soon_threadsafe(held.set)
    emulated.requests(3)


async def _event():
    import asyncio

    return asyncio.Event()


def test_a_task_waits_for_its_schedule_time_and_the_past_is_now(emulated):
    client = emulated.client
    later = client.create_task(parent=QUEUE, task=emulated.http(schedule_time=moment(T0 + 30 * DAY)))
    past = client.create_task(parent=QUEUE, task=emulated.http(schedule_time=moment(T0 - 5)))
    assert past.schedule_time.timestamp() == T0
    emulated.requests(1)
    emulated.tick(30 * DAY - 1)
    assert len(emulated.target.requests) == 1
    emulated.tick(1)
    assert emulated.requests(2)[1][2]["X-CloudTasks-TaskETA"] == f"{later.schedule_time.timestamp():.6f}"


def test_tasks_are_deleted_after_31_days(emulated):
    client = emulated.client
    client.pause_queue(name=QUEUE)
    client.create_task(parent=QUEUE, task=emulated.http())
    emulated.tick(31 * DAY)
    wait_for(lambda: not list(client.list_tasks(parent=QUEUE)), "the task's end")
    assert emulated.target.requests == []


def test_run_task_dispatches_though_the_queue_is_paused_and_reschedules_after_a_failure(emulated):
    client, name = emulated.client, f"{QUEUE}/tasks/t"
    client.update_queue(queue={"name": QUEUE, "retry_config": fast()})
    client.pause_queue(name=QUEUE)
    client.create_task(parent=QUEUE, task=emulated.http(name=name, schedule_time=moment(T0 + DAY)))
    emulated.target.answers = [500]
    assert client.run_task(name=name).dispatch_count == 1
    emulated.requests(1)
    assert emulated.settled(name, 1).schedule_time.timestamp() == T0 + 10
    client.run_task(name=name)
    emulated.requests(2)
    wait_for(lambda: not list(client.list_tasks(parent=QUEUE)), "the task's end")
    with pytest.raises(exceptions.NotFound):
        client.run_task(name=name)


def test_a_target_that_is_not_there_is_tried_again_without_an_execution(emulated):
    client, name = emulated.client, f"{QUEUE}/tasks/t"
    client.update_queue(queue={"name": QUEUE, "retry_config": fast()})
    client.create_task(parent=QUEUE, task=emulated.http(name=name, request={"url": "http://127.0.0.1:1/"}))
    task = wait_for(
        lambda: (each := client.get_task(name=name)).schedule_time.timestamp() > T0 and each, "the attempt's end"
    )
    assert (task.dispatch_count, task.response_count) == (1, 0)


# --- OIDC, and what survives ------------------------------------------------------------------------------------------


def test_an_oidc_token_is_signed_by_a_key_that_is_served(emulated):
    oidc = {"service_account_email": "run@p-1.iam.gserviceaccount.com"}
    emulated.client.create_task(parent=QUEUE, task=emulated.http(request={"oidc_token": oidc}))
    token = emulated.requests(1)[0][2]["Authorization"].removeprefix("Bearer ")
    with urllib.request.urlopen(f"{emulated.url}/oauth2/v3/certs") as response:
        keys = jwt.PyJWKSet.from_dict(json.load(response))
    claims = jwt.decode(
        token, keys[jwt.get_unverified_header(token)["kid"]], algorithms=["RS256"], audience=f"{emulated.target_url}/run",
        issuer=emulated.url, options={"verify_exp": False, "verify_iat": False},
    )  # fmt: skip
    assert (claims["email"], claims["email_verified"]) == (oidc["service_account_email"], True)
    assert (claims["iat"], claims["exp"]) == (T0, T0 + 3600)


def test_queues_tasks_names_and_the_key_survive_a_kill(tmp_path):
    """The second emulator reads what the first one had written, which it was not told to keep."""
    first = Emulated(queues=(QUEUE,), data=tmp_path / "tasks.jsonl")
    first.client.pause_queue(name=QUEUE)
    first.client.create_queue(parent=PARENT, queue={"name": f"{QUEUE}-2"})
    first.client.delete_queue(name=f"{QUEUE}-2")
    first.client.create_task(parent=QUEUE, task=first.http(name=f"{QUEUE}/tasks/live"))
    first.client.create_task(parent=QUEUE, task=first.http(name=f"{QUEUE}/tasks/gone"))
    first.client.delete_task(name=f"{QUEUE}/tasks/gone")
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes((tmp_path / "tasks.jsonl").read_bytes() + b'{"task": {"na')
    with urllib.request.urlopen(f"{first.url}/oauth2/v3/certs") as response:
        keys = json.load(response)
    assert keys["keys"][0]["kid"] in str(TokenSigner(KEY).jwks())
    first.close()
    assert oct((tmp_path / "tasks.jsonl").stat().st_mode & 0o777) == "0o600"
    for _ in range(2):  # what is read is written anew
        second = Emulated(data=kept, key=None)
        try:
            with urllib.request.urlopen(f"{second.url}/oauth2/v3/certs") as response:
                assert json.load(response) == keys
            assert [task.name for task in second.client.list_tasks(parent=QUEUE)] == [f"{QUEUE}/tasks/live"]
            assert second.client.get_queue(name=QUEUE).state is tasks_v2.Queue.State.PAUSED
            with pytest.raises(exceptions.Conflict):
                second.client.create_task(parent=QUEUE, task=second.http(name=f"{QUEUE}/tasks/gone"))
            with pytest.raises(exceptions.BadRequest):
                second.client.create_queue(parent=PARENT, queue={"name": f"{QUEUE}-2"})
        finally:
            second.close()


def test_the_command_serves_an_emulator(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "safedefer", "cloudtasks-emulator", "--port", "0", "--queue", QUEUE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            url = process.stdout.readline().split()[-1]
            client = new_client(url)
            assert [queue.name for queue in client.list_queues(parent=PARENT)] == [QUEUE]
            client.transport.close()
        finally:
            process.terminate()
    assert process.returncode == 0
