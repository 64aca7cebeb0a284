"""The options of ``defer()``: each is checked where it is given."""

import math
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer import Options, TaskRetryOptions
from safedefer import claims as claims_module
from safedefer import options as options_module
from safedefer.errors import (
    InvalidEtaError,
    InvalidTaskError,
    InvalidTaskNameError,
    InvalidTaskRetryOptionsError,
    InvalidUrlError,
)
from safedefer.options import MAX_ETA

NOW = 1_800_000_000.0
WRONG = [
    ("countdown", "60", InvalidEtaError, "countdown is a"),
    ("countdown", True, InvalidEtaError, "countdown is a"),
    ("countdown", math.nan, InvalidEtaError, "countdown is a"),
    ("countdown", math.inf, InvalidEtaError, "countdown is a"),
    ("countdown", timedelta(seconds=1), InvalidEtaError, "countdown is a"),
    ("eta", datetime(2030, 1, 1), InvalidEtaError, r"no time zone.*datetime\.now\(timezone\.utc\)"),
    ("eta", 1_900_000_000, InvalidEtaError, "is a datetime; use countdown"),
    ("eta", "2030-01-01", InvalidEtaError, "is a datetime"),
    ("name", "", InvalidTaskNameError, "1 to 500"),
    ("name", "a b", InvalidTaskNameError, "1 to 500"),
    ("name", "a\n", InvalidTaskNameError, "1 to 500"),
    ("name", "n" * 501, InvalidTaskNameError, "1 to 500"),
    ("name", "é", InvalidTaskNameError, "1 to 500"),
    ("name", b"name", InvalidTaskNameError, "1 to 500"),
    ("queue", "", InvalidTaskError, "the queue"),
    ("queue", "a:b", InvalidTaskError, "the queue"),
    ("queue", "a/b", InvalidTaskError, "not 'a/b'"),
    ("queue", "a\n", InvalidTaskError, "the queue"),
    ("queue", "q" * 101, InvalidTaskError, "the queue"),
    ("target", "", InvalidTaskError, "the target"),
    ("target", "http://evil", InvalidTaskError, "the target"),
    ("url", "", InvalidUrlError, "path of this application"),
    ("url", "tasks", InvalidUrlError, "path of this application"),
    ("url", "http://evil/tasks", InvalidUrlError, "path of this application"),
    ("url", "//evil/tasks", InvalidUrlError, "path of this application"),
    ("url", "/tasks?x=1", InvalidUrlError, "without query"),
    ("url", "/tasks#x", InvalidUrlError, "without query"),
    ("url", "/ta sks", InvalidUrlError, "printable ASCII"),
    ("url", "/tasks\r\nX: y", InvalidUrlError, "printable ASCII"),
    ("url", "/é", InvalidUrlError, "printable ASCII"),
    ("url", "/" + "u" * 2048, InvalidUrlError, "printable ASCII"),
    ("headers", [("a", "b")], InvalidTaskError, "dict of str"),
    ("headers", {"a b": "c"}, InvalidTaskError, "RFC 9110"),
    ("headers", {"a\r\nb": "c"}, InvalidTaskError, "RFC 9110"),
    ("headers", {1: "c"}, InvalidTaskError, "RFC 9110"),
    ("headers", {"a": 1}, InvalidTaskError, "printable ASCII"),
    ("headers", {"a": "b\r\nX-Evil: 1"}, InvalidTaskError, "printable ASCII"),
    ("headers", {"a": "é"}, InvalidTaskError, "printable ASCII"),
    ("headers", {"a": "b", "A": "c"}, InvalidTaskError, "case only"),
    ("retry_options", {"task_retry_limit": 3}, InvalidTaskRetryOptionsError, "TaskRetryOptions"),
    ("transactional", 1, InvalidTaskError, "True or False"),
    ("pickle", "yes", InvalidTaskError, "True or False"),
]
RESERVED = [
    "Host", "content-type", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "traceparent",
    "X-AppEngine-QueueName", "x-appengine-taskretrycount", "X-CloudTasks-QueueName", "Safedefer-Outcome",
]  # fmt: skip
WRONG_RETRY = [
    ({"min_backoff_seconds": -1}, "min_backoff_seconds must be"),
    ({"max_backoff_seconds": math.inf}, "max_backoff_seconds must be"),
    ({"task_age_limit": math.nan}, "task_age_limit must be"),
    ({"task_age_limit": "1"}, "task_age_limit must be"),
    ({"task_retry_limit": 1.5}, "task_retry_limit must be"),
    ({"task_retry_limit": True}, "task_retry_limit must be"),
    ({"max_doublings": -1}, "max_doublings must be"),
    ({"min_backoff_seconds": 10, "max_backoff_seconds": 5}, "swap"),
]


@pytest.mark.parametrize(("option", "value", "error", "text"), WRONG)
def test_a_wrong_option_is_refused_with_its_reason(option, value, error, text):
    with pytest.raises(error, match=f"(?s){text}") as caught:
        Options(**{option: value})
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", RESERVED)
def test_a_header_that_the_delivery_writes_is_refused(name):
    with pytest.raises(InvalidTaskError, match="written by the delivery"):
        Options(headers={name: "x"})


@pytest.mark.parametrize(("values", "text"), WRONG_RETRY)
def test_a_wrong_retry_option_is_refused(values, text):
    with pytest.raises(InvalidTaskRetryOptionsError, match=text):
        TaskRetryOptions(**values)


def test_countdown_and_eta_are_alternatives():
    with pytest.raises(InvalidEtaError, match="not both"):
        Options(countdown=0, eta=datetime.now(UTC))


def test_a_task_is_due_now_unless_told_otherwise():
    assert Options().due(NOW) == NOW


@pytest.mark.parametrize("seconds", [0, 0.25, 60, MAX_ETA])
def test_a_countdown_is_seconds_from_now(seconds):
    assert Options(countdown=seconds).due(NOW) == NOW + seconds


def test_a_time_in_the_past_is_now():
    assert Options(countdown=-5).due(NOW) == NOW
    assert Options(eta=datetime(1999, 1, 1, tzinfo=UTC)).due(NOW) == NOW


@pytest.mark.parametrize("ahead", [MAX_ETA + 0.001, MAX_ETA * 2, 1e300])
def test_more_than_thirty_days_ahead_is_refused(ahead):
    with pytest.raises(InvalidEtaError, match="30 days"):
        Options(countdown=ahead).due(NOW)


def test_an_eta_far_ahead_is_refused():
    with pytest.raises(InvalidEtaError, match="30 days"):
        Options(eta=datetime(9999, 1, 1, tzinfo=UTC)).due(NOW)


@given(st.integers(0, MAX_ETA), st.integers(-23, 23))
def test_an_eta_means_the_same_moment_in_every_zone(seconds, hours):
    zone = timezone(timedelta(hours=hours))
    eta = datetime.fromtimestamp(NOW + seconds, zone)
    assert Options(eta=eta).due(NOW) == NOW + seconds


def test_no_url_is_the_url_of_the_queue():
    assert Options(url=None, queue="mail").path == "/_ah/queue/mail"
    assert Options(queue="mail").path == "/_ah/queue/deferred"


def test_headers_are_copied():
    headers = {"X-Shop": "1"}
    options = Options(headers=headers)
    headers["X-Shop"] = "2"
    assert options.headers == {"X-Shop": "1"}


def test_retry_options_keep_what_was_given_and_nothing_else():
    given_options = TaskRetryOptions(task_retry_limit=0, min_backoff_seconds=0.5)
    assert given_options.given() == {"task_retry_limit": 0, "min_backoff_seconds": 0.5}
    assert TaskRetryOptions.from_given(given_options.given()) == given_options


def test_a_retry_option_of_another_name_is_refused():
    with pytest.raises(InvalidTaskRetryOptionsError, match="unknown name"):
        TaskRetryOptions.from_given({"limit": 1})


@pytest.mark.parametrize("seconds", [1, 1.5, 600, 86_400, 86_400.0])
def test_a_deadline_is_from_a_second_to_a_day(seconds):
    assert Options(deadline=seconds).deadline == seconds


@pytest.mark.parametrize("seconds", [0, 0.999, 86_400.001])
def test_a_deadline_that_no_attempt_could_keep_is_refused_with_its_bounds(seconds):
    with pytest.raises(InvalidTaskError, match="from 1 to 86400"):
        Options(deadline=seconds)


def test_what_may_be_given_may_be_signed():
    assert options_module.MAX_DEADLINE == claims_module.MAX_DEADLINE
    assert options_module._MAX_NUMBER == claims_module.MAX_NUMBER
    assert {item.name for item in fields(TaskRetryOptions)} == set(claims_module.Retry.__annotations__)


def test_a_unique_task_has_no_name():
    with pytest.raises(InvalidTaskError, match="leave one of the two out"):
        Options(unique=True, name="n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [(True, True), (False, False), (("b", "a"), ("a", "b")), (["a", "a"], ("a",))],
)
def test_unique_is_a_flag_or_names_of_parameters(given, expected):
    assert Options(unique=given).unique == expected


@pytest.mark.parametrize(
    "given",
    [
        *[{"unique": wrong} for wrong in ("order_id", (), [], ("a b",), ("",), (1,), ("a", 1), ([],), {"a"}, 1, None)],
        *[{"unique": True, "unique_until": wrong} for wrong in ("never", None, True, [])],
        {"unique_until": "start"},
        {"unique": ("a",), "name": "n"},
    ],
)
def test_what_makes_a_task_unique_is_checked(given):
    with pytest.raises(InvalidTaskError):
        Options(**given)
