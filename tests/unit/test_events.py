"""The log of refusals: the first one at once, those that follow as a number, at most one line of a reason a minute."""

import logging
import threading
import time

import pytest

from safedefer.events import (
    LogObserver,
    Observers,
    ProcessStarted,
    ProcessStopping,
    RequestRefused,
    TaskHandled,
    TaskStarted,
    banner,
    hears_enqueued,
    hears_started,
    is_heard,
)
from safedefer.observe.counts import Counts
from safedefer.observe.troubles import Troubles

HANDLED = TaskHandled(
    task_id="i", queue="default", callable="m:f", kid="k", outcome="succeeded", status=200, reason=None, attempt=1, seconds=0.1
)  # fmt: skip


def refused(reason="bad-signature"):
    return RequestRefused(status=403, reason=reason)


class Log:
    """An observer whose time stands still, and the lines about refusals that it wrote."""

    def __init__(self, caplog):
        self.now = 1000.0
        self.observer = LogObserver(clock=lambda: self.now)
        self.caplog = caplog
        caplog.set_level(logging.INFO)

    def __call__(self, *events):
        for event in events:
            self.observer(event)

    @property
    def lines(self):
        return [record.getMessage() for record in self.caplog.records if "refused" in record.getMessage()]


@pytest.fixture
def log(caplog):
    return Log(caplog)


def test_a_flood_of_refusals_is_one_line_at_once_and_one_a_minute(log):
    for second in range(180):
        log.now = 1000.0 + second
        log(*[refused()] * 100)
    more = "request refused: bad-signature, 6000 more since the last line"
    assert log.lines == ["request refused: bad-signature", more, more]
    log.now = 1180.0
    log(HANDLED)
    assert log.lines[3:] == ["request refused: bad-signature, 5999 more since the last line"]


def test_a_refusal_for_another_reason_is_logged_at_once_amid_a_flood(log):
    log(*[refused()] * 1000, refused("revoked-key"), *[refused()] * 1000)
    assert log.lines == ["request refused: bad-signature", "request refused: revoked-key"]


def test_the_last_refusals_of_a_flood_are_logged_with_whatever_comes_a_minute_later(log):
    log(*[refused()] * 10, HANDLED)
    log.now += 59.9
    log(HANDLED)
    assert len(log.lines) == 1
    log.now += 0.1
    log(HANDLED, HANDLED)
    assert log.lines[1:] == ["request refused: bad-signature, 9 more since the last line"]


def test_after_a_quiet_minute_the_next_refusal_is_a_first_one(log):
    log(refused())
    log.now += 60.0
    log(HANDLED)
    assert log.observer._refusals == {}
    log(refused())
    assert log.lines == ["request refused: bad-signature"] * 2


def test_a_refusal_after_a_quiet_minute_without_any_event_is_counted_and_logged_at_once(log):
    log(refused())
    log.now += 3600.0
    log(refused())
    assert log.lines[1:] == ["request refused: bad-signature, 1 more since the last line"]


def test_no_number_of_reasons_fills_the_memory(log):
    log(*[refused(f"reason-{number}") for number in range(10_000)])
    assert len(log.observer._refusals) == 101
    assert len(log.lines) == 101
    log.now += 60.0
    log(HANDLED)
    assert log.lines[101:] == ["request refused: others, 9899 more since the last line"]


def test_every_refusal_is_counted_from_any_number_of_threads(log):
    threads = [threading.Thread(target=lambda: log(*[refused()] * 1000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.now += 60.0
    log(HANDLED)
    assert log.lines == [
        "request refused: bad-signature",
        "request refused: bad-signature, 7999 more since the last line",
    ]


def test_the_lines_hold_the_event_and_nothing_else_of_the_request(log):
    log(refused(), refused())
    log.now += 60.0
    log(HANDLED)
    events = [record.safedefer for record in log.caplog.records if "refused" in record.getMessage()]
    assert events == [refused()] * 2


# --- Several observers ---


def test_each_observer_gets_every_event_whatever_another_one_raises(caplog):
    first, last = [], []

    def broken(event):
        raise RuntimeError("broken")

    several = Observers(first.append, broken)
    several(HANDLED)
    several.add(last.append)
    several(HANDLED)
    assert (first, last) == ([HANDLED, HANDLED], [HANDLED])
    assert caplog.text.count("an observer failed") == 2


def test_an_event_is_made_if_any_of_several_observers_may_act_on_it():
    log = LogObserver()
    assert not hears_enqueued(Observers(log))
    assert hears_enqueued(Observers(log, print))
    logging.getLogger("safedefer").setLevel(logging.ERROR)
    try:
        assert not is_heard(Observers(log), "succeeded", None)
        assert is_heard(Observers(log, print), "succeeded", None)
    finally:
        logging.getLogger("safedefer").setLevel(logging.NOTSET)


def test_the_start_of_an_attempt_is_an_event_only_where_an_observer_acts_on_it(caplog):
    quiet = Observers(LogObserver(), Troubles(time.time), Counts())
    assert not hears_started(quiet)
    assert not any(map(hears_started, quiet))
    assert hears_started(Observers(quiet, print))
    assert hears_started(print)
    caplog.set_level(logging.DEBUG)
    assert hears_started(quiet)
    quiet(TaskStarted(task_id="i", queue="default", callable="m:f", kid="k", attempt=2))
    assert caplog.messages == ["task i starts: m:f, attempt 2"]


# --- Processes ---

STARTED = ProcessStarted(
    command="run", pid=7, queue="/srv/tasks.db", environment="prod", policy=["shop.*"], keys=["k1 (active)"], concurrency=16, processes=2
)  # fmt: skip


def test_a_banner_says_what_a_process_is():
    assert banner(STARTED) == (
        "safedefer run: the queue is in /srv/tasks.db; environment prod; policy shop.*; keys k1 (active); 16 tasks at once "
        "in each of 2 processes"
    )


def test_start_and_stop_of_a_process_are_logged(caplog):
    caplog.set_level(logging.INFO)
    observer = LogObserver()
    observer(STARTED)
    observer(ProcessStopping(command="run", pid=7, running=2, seconds=30.0))
    assert caplog.messages == [
        f"process 7 started: {banner(STARTED)}", "process 7 stops: it waits for 2 tasks, 30 s at most",
    ]  # fmt: skip


def test_a_task_whose_stored_token_was_not_read_is_not_named_by_nothing(caplog):
    LogObserver()(
        TaskHandled(
            task_id="i", queue="mail", callable="", kid="k", outcome="rejected", status=500, reason="invalid-claims", attempt=1,
            seconds=0.1,
        )
    )  # fmt: skip
    assert "task i rejected: an oversize task whose token was not read, attempt 1" in caplog.text
