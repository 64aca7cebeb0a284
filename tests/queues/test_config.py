from __future__ import annotations

import pytest

from safedefer.errors import ConfigurationError
from safedefer.queues.config import QueueFile
from safedefer.queues.rates import QueueLimits

WHOLE = """\
queue:
- name: mail            # a comment
  rate: 10/m
  bucket_size: 20
  max_concurrent_requests: 3
  target: v2.backend
  mode: push
  retry_parameters:
    task_retry_limit: 7
    task_age_limit: 2d
    min_backoff_seconds: 10
    max_backoff_seconds: 200.5
    max_doublings: 0
- name: stopped
  rate: 0
"""


def test_every_member_is_read():
    mail, stopped = QueueFile.parse(WHOLE).queue
    assert mail.limits == QueueLimits(queue="mail", rate=10 / 60, bucket_size=20, max_concurrent=3)
    assert mail.target == "v2.backend"
    assert mail.retry_parameters.given() == {
        "task_retry_limit": 7,
        "task_age_limit": 172_800.0,
        "min_backoff_seconds": 10.0,
        "max_backoff_seconds": 200.5,
        "max_doublings": 0,
    }
    assert stopped.limits == QueueLimits(queue="stopped", rate=0.0, bucket_size=5)
    assert (stopped.target, stopped.retry_parameters.given()) == (None, {})


@pytest.mark.parametrize(
    ("text", "rate"),
    [("5/s", 5.0), ("10/m", 1 / 6), ("2/h", 2 / 3600), ("1/d", 1 / 86400), ("0.5/s", 0.5), ("0", 0.0), ("0/s", 0.0)],
)
def test_rates(text, rate):
    assert QueueFile.parse(f"queue: [{{name: q, rate: {text}}}]").queue[0].rate == rate


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30.0), ("5m", 300.0), ("6h", 21600.0), ("2.5d", 216000.0)])
def test_ages(text, seconds):
    text = f"queue: [{{name: q, rate: 1/s, retry_parameters: {{task_age_limit: {text}}}}}]"
    assert QueueFile.parse(text).queue[0].retry_parameters.task_age_limit == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("120M", 120 * 2**20), ("1.5G", 3 * 2**29), ("500K", 512_000), ("7", 7), ("7B", 7)]
)
def test_sizes(text, size):
    assert QueueFile.parse(f"total_storage_limit: {text}").total_storage_limit == size


def test_the_default_queue_has_five_a_second_when_a_file_says_nothing_else():
    default = QueueLimits(queue="default", rate=5.0, bucket_size=5)
    assert QueueFile.parse("").limits == [default]
    assert QueueFile.parse("queue:\n- name: default").limits == [default]
    assert QueueFile.parse("queue:\n- name: default\n  rate: 1/s").limits == [QueueLimits(queue="default", rate=1.0)]
    assert QueueFile.parse(WHOLE).limits[-1] == default


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("queue:\n- name: a\n  rate: 5/s\n  rate: 6/s\n", 4, "duplicate key"),
        ("queue:\n- name: a\n  rate: 5/s\n  buckets: 5\n", 4, "buckets: Extra inputs"),
        ("queue:\n- name: a\n  rate: 5\n", 3, "5/s, 10/m"),
        ("queue:\n- name: a\n  rate: 5/w\n", 3, "5/s, 10/m"),
        ("queue:\n- name: a\n  rate: -5/s\n", 3, "5/s, 10/m"),
        ("queue:\n- name: a\n  rate: \u0665/s\n", 3, "5/s, 10/m"),
        ("queue:\n- name: a\n  rate: true\n", 3, "5/s, 10/m"),
        ("queue:\n- rate: 5/s\n", 2, "name: Field required"),
        ("queue:\n- name: a b\n  rate: 5/s\n", 2, "pattern"),
        ("queue:\n- name: 5\n  rate: 5/s\n", 2, "valid string"),
        ("queue:\n- name: a\n  rate: 5/s\n  bucket_size: 0\n", 4, "greater than or equal to 1"),
        ("queue:\n- name: a\n  rate: 5/s\n  bucket_size: '5'\n", 4, "valid integer"),
        ("queue:\n- name: a\n  rate: 5/s\n  bucket_size: true\n", 4, "valid integer"),
        ("queue:\n- name: a\n  rate: 5/s\n  max_concurrent_requests: 0\n", 4, "greater than or equal to 1"),
        ("queue:\n- name: a\n  rate: 5/s\n  mode: pull\n", 2, "mode: pull is of App Engine's pull queues"),
        ("queue:\n- name: a\n  mode: pull\n  acl:\n  - user_email: a@b.c\n", 2, "mode: pull is of"),
        ("queue:\n- name: a\n  mode: poll\n", 3, "push"),
        ("queue:\n- name: a\n  rate: 5/s\n  target: a/b\n", 4, "pattern"),
        ("queue:\n- name: a\n  rate: 5/s\n  retry_parameters:\n    task_age_limit: 2\n", 5, "2d"),
        ("queue:\n- name: a\n  rate: 5/s\n  retry_parameters:\n    task_retry_limit: -1\n", 5, "greater than"),
        ("queue:\n- name: a\n  rate: 5/s\n  retry_parameters:\n    min_backoff_seconds: .nan\n", 5, "min_backoff"),
        ("queue:\n- name: a\n  rate: 5/s\n  retry_parameters:\n    min_backoff_seconds: .inf\n", 5, "min_backoff"),
        (
            "queue:\n- {name: a, rate: 5/s,\n   bucket_size: 1,\n   retry_parameters: {min_backoff_seconds: 5, max_backoff_seconds: 4}}\n",
            4,
            "above",
        ),
        ("queue:\n- name: a\n  rate: 5/s\n- name: a\n  rate: 6/s\n", 1, "declared twice"),
        ("queue:\n  name: a\n", 1, "valid list"),
        ("queues: []\n", 1, "queues"),
        ("queue: []\ntotal_storage_limit: 12X\n", 2, "120M"),
        ("queue: []\ntotal_storage_limit: true\n", 2, "120M"),
        ("- a\n", 1, "QueueFile"),
        ("queue: [\n", 2, "expected"),
        ("a: 1\n---\nb: 2\n", 2, "document"),
        ("queue: &a\n- *a\n", 1, "valid dictionary"),
        ("queue: [[[[[[[[[1]]]]]]]]]\n", 1, "nested too deep"),
        ("queue: !!python/object/apply:os.system [id]\n", 1, "a tag has"),
        ("5: a\n", 1, "not the name"),
        ("queue: 2020-01-01\n", 1, "no place here"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text, line, says):
    with pytest.raises(ConfigurationError) as caught:
        QueueFile.parse(text)
    assert f"queue.yaml, line {line}" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", "queue: \x07\n", "a" * 1_048_577, "[" * 700])
def test_what_is_not_yaml_is_refused(text):
    with pytest.raises(ConfigurationError, match=r"queue\.yaml"):
        QueueFile.parse(text)


def test_a_file_is_read_and_named_in_messages(tmp_path):
    path = tmp_path / "queues.yaml"
    path.write_text(WHOLE)
    assert QueueFile.load(path).section("mail").bucket_size == 20
    assert QueueFile.load(str(path)).section("nothing") is None
    path.write_text("queue: 5")
    with pytest.raises(ConfigurationError, match=r"queues\.yaml, line 1"):
        QueueFile.load(path)
    with pytest.raises(ConfigurationError, match="SAFEDEFER_QUEUE_YAML"):
        QueueFile.load(tmp_path / "nothing.yaml")


OF_APP_ENGINE = {  # a section of a real file, and its rate
    "without anything": ("- name: fanout", 5.0),
    "without a rate": ("- name: fanout\n  max_concurrent_requests: 10\n  bucket_size: 40", 5.0),
    "with retries": ("- name: fanout\n  retry_parameters:\n    task_retry_limit: 0", 5.0),
    "the default queue": ("- name: default", 5.0),
    "a mode that is said": ("- name: fanout\n  mode: push", 5.0),
    "a point and no digits": ("- name: fanout\n  rate: 20./s", 20.0),
    "a version as its target": ("- name: fanout\n  target: v2.worker\n  rate: 500/s", 500.0),
}


@pytest.mark.parametrize("label", OF_APP_ENGINE)
def test_queues_of_real_applications_have_app_engines_rate(label):
    text, rate = OF_APP_ENGINE[label]
    (section,) = QueueFile.parse(f"queue:\n{text}\n").queue
    assert section.limits.rate == rate
