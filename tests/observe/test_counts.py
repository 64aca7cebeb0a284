"""What events add up to, and what Prometheus is shown of it."""

import json
import math

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from safedefer.errors import QueueUnavailable
from safedefer.events import (
    QueueTrouble,
    RequestRefused,
    TargetDown,
    TargetUp,
    TaskDead,
    TaskEnqueued,
    TaskHandled,
    TaskRetried,
)
from safedefer.observe.counts import (
    BUCKETS,
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    OTHERS,
    Counts,
    Sums,
    dump_gauges,
    highest,
    load_gauges,
)
from safedefer.observe.metrics import Metrics, exposition, of_events, of_processes, of_store
from safedefer.observe.store import QueueReading, StoreReading, read_store
from safedefer.queues.base import QueueStats
from tests import sample_tasks
from tests.unit.apps import handle, make_app


def handled(outcome="succeeded", reason=None, seconds=0.2, callable="shop:send", queue="default"):
    return TaskHandled(
        task_id="i", queue=queue, callable=callable, kid="k", outcome=outcome, status=200, reason=reason, attempt=1, seconds=seconds
    )  # fmt: skip


def retried(queue="default"):
    return TaskRetried(
        task_id="i", queue=queue, callable="c", reason="unreachable", status=None, attempts=1, seconds=1.0
    )


def dead(queue="default"):
    return TaskDead(task_id="i", queue=queue, callable="c", reason="poison", attempts=5)


def trouble(count):
    return QueueTrouble(doing="leasing", reason="the disk is full", count=count, seconds=1.0)


def count(*events):
    counts = Counts()
    for event in events:
        counts(event)
    return counts


def samples(text):
    """Return every sample of an exposition by its name and its labels' values, in the order of their names."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def shown(counts, reading=None):
    return samples(exposition(lambda: (*of_events(counts.copy(), counts.gauges()), *of_store(reading))))


def test_each_event_adds_to_its_metric():
    found = shown(
        count(
            TaskEnqueued(task_id="i", queue="mail", callable="c", size=9),
            handled(), handled(), handled("retry", "exception"),
            RequestRefused(status=403, reason="bad-signature"),
            retried(), dead(),
            TargetDown(address="http://user:word@shop:8080/x", reason="refused"),
            trouble(1),
        )
    )  # fmt: skip
    assert found["safedefer_tasks_enqueued_total", "mail"] == 1
    assert found["safedefer_attempts_total", "succeeded", "default", ""] == 2
    assert found["safedefer_attempts_total", "retry", "default", "exception"] == 1
    assert found["safedefer_requests_refused_total", "bad-signature"] == 1
    assert found["safedefer_tasks_retried_total", "default", "unreachable"] == 1
    assert found["safedefer_tasks_dead_total", "default", "poison"] == 1
    assert found["safedefer_target_down", "http://shop:8080/x"] == 1
    assert found["safedefer_queue_trouble", "leasing"] == 1
    assert found["safedefer_attempt_seconds_count", "shop:send"] == 3
    assert found["safedefer_attempt_seconds_sum", "shop:send"] == pytest.approx(0.6)


def test_gauges_of_events_go_back_when_it_is_over():
    found = shown(
        count(
            TargetDown(address="", reason="refused"),
            TargetUp(address="", seconds=1.0, waited=3),
            trouble(1),
            trouble(0),
        )
    )
    assert (found["safedefer_target_down", ""], found["safedefer_queue_trouble", "leasing"]) == (0, 0)


@pytest.mark.parametrize("outcome", ["busy", "early", "running", "duplicate"])
def test_a_delivery_that_no_handler_took_is_no_attempt(outcome):
    counts = count(handled(outcome, "busy"))
    assert (counts.copy().totals, counts.copy().histograms) == ({}, {})


def test_a_value_is_in_the_first_bucket_whose_bound_it_does_not_exceed_and_in_all_after():
    found = shown(count(handled(seconds=0.005), handled(seconds=0.0051), handled(seconds=10_000.0)))
    buckets = {key[2]: value for key, value in found.items() if key[0] == "safedefer_attempt_seconds_bucket"}
    assert buckets["0.005"] == 1
    assert {value for bound, value in buckets.items() if 0.005 < float(bound) < math.inf} == {2}
    assert buckets["+Inf"] == 3
    assert len(buckets) == len(BUCKETS) + 1


def test_queues_and_callables_without_end_are_added_up_as_others():
    counts = count(*(handled(queue=f"q{n}", callable=f"m:f{n}") for n in range(1_500)), handled(queue="q3"))
    found = shown(counts)
    attempts = {key: value for key, value in found.items() if key[0] == "safedefer_attempts_total"}
    assert len(attempts) == 1_001
    assert attempts["safedefer_attempts_total", OTHERS, OTHERS, OTHERS] == 500
    assert attempts["safedefer_attempts_total", "succeeded", "q3", ""] == 2
    assert found["safedefer_attempt_seconds_count", OTHERS] == 501


@pytest.mark.parametrize("name", ["\ud800", "a\nsafedefer_dead_letters 0", "x" * 501, "\x1b[2J", "a{b}", ""])
def test_a_queue_that_somebody_wrote_into_the_storage_is_no_label(name):
    """The exposition could not be encoded, or would have a line of the writer's."""
    counts = count(retried(name), dead(name))
    reading = read_store(Stored([QueueStats(queue=name, waiting=1, running=2, dead=3, oldest=None)]), Rows(0), now=9.0)
    found = shown(counts, reading)
    assert found["safedefer_tasks_retried_total", OTHERS, "unreachable"] == 1
    assert found["safedefer_tasks_dead_total", OTHERS, "poison"] == 1
    assert found["safedefer_dead_letters", OTHERS] == 3


def test_a_callable_that_cannot_be_shown_is_among_the_others():
    assert shown(count(handled(callable="m:\ud800")))["safedefer_attempt_seconds_count", OTHERS] == 1


class Stored:
    def __init__(self, stats):
        self.found = stats

    def stats(self, *, now):
        return self.found


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def count(self):
        return self.rows


def test_lag_is_how_late_the_oldest_task_is_and_never_below_zero():
    stats = [
        QueueStats(queue="early", waiting=1, running=0, dead=0, oldest=110.0),
        QueueStats(queue="late", waiting=2, running=1, dead=4, oldest=70.0),
        QueueStats(queue="none", waiting=0, running=0, dead=0, oldest=None),
    ]
    found = shown(Counts(), read_store(Stored(stats), Rows(7), now=100.0))
    lags = {key[1]: value for key, value in found.items() if key[0] == "safedefer_queue_lag_seconds"}
    assert lags == {"early": 0, "late": 30, "none": 0}
    assert found["safedefer_queue_tasks", "late", "waiting"] == 2
    assert found["safedefer_queue_tasks", "late", "running"] == 1
    assert found["safedefer_dead_letters", "late"] == 4
    assert (found["safedefer_outbox_rows",], found["safedefer_store_up",]) == (7, 1)


def test_queues_beyond_a_thousand_are_added_up():
    stats = [QueueStats(queue=f"q{n}", waiting=1, running=0, dead=0, oldest=0.0) for n in range(1_200)]
    reading = read_store(Stored(stats), Rows(0), now=5.0)
    assert len(reading.queues) == 1_001
    assert reading.queues[OTHERS] == QueueReading(waiting=200, lag=5.0)


def test_a_store_that_does_not_answer_has_no_numbers():
    """A number of the past, or 0, would end an alert."""
    found = shown(Counts())
    assert found == {("safedefer_store_up",): 0}


def test_an_outbox_that_cannot_be_read_has_no_number():
    found = shown(Counts(), StoreReading({}, None))
    assert found == {("safedefer_store_up",): 1}


def test_worker_processes_are_counted():
    assert samples(exposition(lambda: of_processes(1, 4))) == {
        ("safedefer_worker_processes", "ready"): 1,
        ("safedefer_worker_processes", "wanted"): 4,
    }


# --- Between processes ---


def test_what_workers_send_adds_up_to_what_they_counted():
    one, other, sums = Counts(), Counts(), Sums()
    for turn in range(3):
        for counts in (one, other):
            for _ in range(turn + 1):
                counts(handled())
            sums.merge(Sums.load(json.loads(json.dumps(counts.take().dump()))))
    assert sums.dump() == count(*[handled()] * 12).copy().dump() | {
        "histograms": [
            [["safedefer_attempt_seconds", "shop:send"], sums.histograms["safedefer_attempt_seconds", "shop:send"]]
        ]
    }
    cells = sums.histograms["safedefer_attempt_seconds", "shop:send"]
    assert (sum(cells[:-1]), cells[-1]) == (12, pytest.approx(2.4))
    assert one.take().dump() == {"totals": [], "histograms": []}


def test_reading_and_gauges_survive_json():
    reading = StoreReading({"mail": QueueReading(1, 2, 3, 4.5)}, 6)
    assert StoreReading.load(json.loads(json.dumps(reading.dump()))) == reading
    gauges = count(TargetDown(address="http://a", reason="r"), trouble(1)).gauges()
    assert load_gauges(json.loads(json.dumps(dump_gauges(gauges)))) == gauges


def test_a_gauge_is_the_highest_of_all_processes():
    down, up = ("safedefer_target_down", "http://a"), ("safedefer_target_down", "http://b")
    assert highest({1: {down: 0.0, up: 0.0}, 2: {down: 1.0}, 3: {down: 0.0}}) == {down: 1.0, up: 0.0}


@pytest.mark.parametrize(
    "document",
    [
        {"totals": [["process_cpu_seconds_total", 1]], "histograms": []},
        {"totals": [["safedefer_attempts_total", "x", "no number"]], "histograms": []},
        {"totals": [], "histograms": [[["safedefer_attempt_seconds", "x"], [1.0]]]},
        {"totals": [], "histograms": [[["safedefer_tasks_enqueued_total", "x"], [0.0] * 17]]},
        {"totals": []},
        [],
        None,
    ],
)
def test_what_is_no_sum_of_ours_is_refused(document):
    with pytest.raises((ValueError, TypeError, KeyError)):
        Sums.load(document)


def test_what_is_no_gauge_of_ours_is_refused():
    with pytest.raises(ValueError, match="no gauge"):
        load_gauges([["safedefer_dead_letters", 1]])


# --- In a registry of the user's ---


def test_metrics_in_a_registry_of_ones_own_count_what_an_app_defers_and_handles():
    app = make_app()
    registry = CollectorRegistry()
    registry.register(Metrics(app))
    task = app.defer(sample_tasks.add, 1)
    handle(app, task.payload)
    handle(app, b"nonsense")
    found = samples(generate_latest(registry))
    assert found["safedefer_tasks_enqueued_total", "default"] == 1
    assert found["safedefer_attempts_total", "succeeded", "default", ""] == 1
    assert found["safedefer_attempt_seconds_count", "tests.sample_tasks:add"] == 1
    assert found["safedefer_requests_refused_total", "malformed-token"] == 1
    assert found["safedefer_queue_tasks", "default", "waiting"] == 1
    app.close()
    assert samples(generate_latest(registry))["safedefer_store_up",] == 0


def test_a_store_is_asked_at_a_scrape_only_and_by_one_process_only(monkeypatch):
    asked = []

    def stats(*, now):
        asked.append(now)
        raise QueueUnavailable("away")

    app = make_app()
    monkeypatch.setattr(app.queue, "stats", stats)
    registry = CollectorRegistry()
    registry.register(Metrics(app))
    assert asked == []
    assert b"safedefer_store_up 0.0" in generate_latest(registry)
    assert len(asked) == 1
    only = CollectorRegistry()
    only.register(Metrics(app, store=False))
    assert b"safedefer_store_up" not in generate_latest(only)
    assert len(asked) == 1
    app.close()


def test_the_names_are_those_that_are_promised():
    promised = {
        "safedefer_tasks_enqueued_total": ("queue",),
        "safedefer_attempts_total": ("queue", "outcome", "reason"),
        "safedefer_attempt_seconds": ("callable",),
        "safedefer_requests_refused_total": ("reason",),
        "safedefer_tasks_retried_total": ("queue", "reason"),
        "safedefer_tasks_dead_total": ("queue", "reason"),
        "safedefer_target_down": ("target",),
        "safedefer_queue_trouble": ("doing",),
    }
    assert {name: labels for name, (_, labels) in (COUNTERS | HISTOGRAMS | GAUGES).items()} == promised
