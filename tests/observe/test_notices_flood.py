"""A flood of refused requests, which needs no key, costs little where it is counted."""

from safedefer.events import Observers, RequestRefused
from safedefer.observe import notices
from safedefer.queues.memory.queue import MemoryQueue
from tests.queues.test_sqlite_writer import until


def test_a_flood_of_refusals_wakes_the_writer_once_for_each_time_that_it_looks(monkeypatch):
    """To wake a thread takes as long as a whole refusal."""
    calls, reports = [], []
    queue = MemoryQueue()
    monkeypatch.setattr(queue, "put_notice", lambda _process, text, *, now: reports.append(text))  # noqa: ARG005
    observers = Observers()
    written = notices.Notices(lambda: queue, observers, lambda: 1e9)
    try:
        observers(RequestRefused(status=403, reason="bad-signature"))
        woken = written._woken
        wake = woken.set
        monkeypatch.setattr(woken, "set", lambda: calls.append(1) or wake())
        for _ in range(2_000):
            observers(RequestRefused(status=403, reason="bad-signature"))
        assert len(calls) <= 20
        until(lambda: any("2001" in text for text in reports))
    finally:
        written.close()
        queue.close()


def test_reasons_beyond_those_that_are_kept_are_not_counted_and_the_others_go_on():
    observers = Observers()
    troubles = notices.Troubles(lambda: 1e9)
    observers.add(troubles)
    for number in range(80):
        observers(RequestRefused(status=403, reason=f"reason-{number}"))
    observers(RequestRefused(status=403, reason="reason-3"))
    refused = troubles.report().refused
    assert len(refused) == 50
    assert (refused[0].reason, refused[0].times) == ("reason-3", 2)
