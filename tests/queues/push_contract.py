"""What every push engine does, by ``safedefer.queues.push_engine.PushEngine``. An engine's tests inherit ``PushContract``."""

import pytest

from safedefer.errors import QueueUnavailable, TaskAlreadyExistsError
from safedefer.queues.base import NotAllStored, QueuedTask
from safedefer.queues.push_engine import Attempt

NOW = 1_800_000_000.0


def pushed_task(number=1, **changes):
    """Return a task as ``PushQueue`` hands it to an engine: without a blob."""
    task = QueuedTask(
        id=f"{number:032x}", queue="mail", token=b"a.b.%d" % number, audience="prod:mail:default:/run", url="/run",
        target="default", eta=NOW, created=NOW, expires=int(NOW) + 2_678_400,
    )  # fmt: skip
    return task._replace(**changes)


class PushContract:
    """A subclass has the fixtures ``engine``, ``deliveries`` and ``stop``.

    ``deliveries(number)`` lets the engine deliver, each answered 2xx, and returns headers and body of so many; after ``stop()``
    the engine cannot reach what keeps its tasks.
    """

    BY_HTTP = True
    """Whether requests come over a network. Where they do not, no headers that somebody else wrote prove anything."""
    KNOWS_ITS_TASKS = True
    """Whether the engine counts what it has, and takes a task back. One that does not says nothing, and cancels nothing."""

    def test_a_token_is_delivered_as_it_is_by_a_sender_that_proves_itself(self, engine, deliveries):
        engine.enqueue_many([pushed_task(1)])
        ((headers, body),) = deliveries(1)
        assert body == b"a.b.1"
        assert engine.authenticate(headers) is True
        attempt = engine.attempt(headers)
        assert (attempt.retries, attempt.task_id) == (0, f"{1:032x}")

    def test_several_tasks_are_each_delivered_once(self, engine, deliveries):
        engine.enqueue_many(pushed_task(number) for number in range(1, 6))
        assert sorted(body for _, body in deliveries(5)) == [b"a.b.%d" % number for number in range(1, 6)]

    def test_what_waits_is_counted(self, engine):
        engine.enqueue_many([pushed_task(1), pushed_task(2)])
        if not self.KNOWS_ITS_TASKS:
            assert list(engine.stats(now=NOW)) == []
            return
        (stats,) = engine.stats(now=NOW)
        assert (stats.queue, stats.waiting + stats.running, stats.dead) == ("mail", 2, 0)

    def test_a_task_that_is_taken_back_is_not_delivered(self, engine, deliveries):
        engine.enqueue_many([pushed_task(1), pushed_task(2)])
        if not self.KNOWS_ITS_TASKS:
            assert engine.cancel(f"{1:032x}", now=NOW) is False
            return
        assert engine.cancel(f"{1:032x}", now=NOW)
        assert not engine.cancel(f"{1:032x}", now=NOW)
        assert [body for _, body in deliveries(1)] == [b"a.b.2"]

    def test_nothing_in_headers_is_an_error_or_a_proof(self, engine):
        for headers in (
            {}, {"Authorization": ""}, {"Authorization": "Bearer \udcff"}, {"X-CloudTasks-TaskRetryCount": "1e9"},
            {"X-CloudTasks-TaskName": "x", "X-AppEngine-QueueName": "mail"}, {"\0": "\0"}, {"Safedefer-Due": "9" * 400},
        ):  # fmt: skip
            assert engine.authenticate(headers) is False
            assert isinstance(engine.attempt(headers), Attempt)

    def test_headers_have_names_in_any_case_and_whatever_values(self, engine, deliveries):
        engine.enqueue_many([pushed_task(1)])
        ((headers, _),) = deliveries(1)
        upper = {name.upper(): value for name, value in headers.items()}
        assert engine.authenticate(upper) is self.BY_HTTP
        if self.BY_HTTP:
            assert engine.attempt(upper) == engine.attempt(headers)
        for name in headers:
            odd = {**headers, name: "caf\xe9 \udcff"}
            assert engine.authenticate(odd) in {True, False}
            assert isinstance(engine.attempt(odd), Attempt)
        assert engine.authenticate(dict.fromkeys(headers, "\xe9")) is False

    def test_a_name_is_taken_once_where_there_are_names(self, engine):
        if engine.capabilities.names:
            engine.enqueue_many([pushed_task(1, name="once")])
            with pytest.raises(TaskAlreadyExistsError):
                engine.enqueue_many([pushed_task(2, name="once")])
            with pytest.raises(NotAllStored) as caught:
                engine.enqueue_many([pushed_task(3, name="once"), pushed_task(4)])
            assert list(caught.value.failed) == [f"{3:032x}"]

    def test_an_engine_that_does_not_answer_is_unavailable(self, engine, stop):
        assert not engine.capabilities.batch_atomic
        stop()
        for tasks in ([pushed_task(1)], [pushed_task(2), pushed_task(3)]):
            with pytest.raises(QueueUnavailable):
                engine.enqueue_many(tasks)
        engine.close()
        engine.close()
