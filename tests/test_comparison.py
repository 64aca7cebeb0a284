"""What ``docs/explanation/comparison.md`` says of other libraries, tried with the libraries themselves."""

import inspect
import json
import os
import re
from pathlib import Path

import celery
import dramatiq
import dramatiq.encoder
import huey
import huey.serializer
import kombu.serialization
import procrastinate
import procrastinate.manager
import procrastinate.worker
import pytest
import rq
import rq.registry
import rq.serializers

PAGE = (Path(__file__).parents[1] / "docs" / "explanation" / "comparison.md").read_text()


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_the_page_speaks_of_these_versions():
    named = dict(
        re.findall(r"(RQ|Celery|Dramatiq|Huey|procrastinate) (\d+)(?:\.\d+)?[,.]", PAGE.partition("| by default")[0])
    )
    here = {
        "RQ": rq.VERSION, "Celery": celery.__version__, "Dramatiq": dramatiq.__version__, "Huey": huey.__version__,
        "procrastinate": procrastinate.__version__,
    }  # fmt: skip
    assert named == {name: version.partition(".")[0] for name, version in here.items()}


@pytest.mark.parametrize(
    ("dumps", "loads"),
    [
        (rq.serializers.resolve_serializer().dumps, rq.serializers.resolve_serializer().loads),
        (huey.serializer.Serializer().serialize, huey.serializer.Serializer().deserialize),
    ],
    ids=["rq", "huey"],
)
def test_whoever_writes_the_storage_of_these_runs_code(dumps, loads, tmp_path):
    assert loads(dumps((1, 2))) == (1, 2)
    loads(dumps(Attack(tmp_path / "attacked")))
    assert (tmp_path / "attacked").exists()


def celery_round_trip(value):
    app = celery.Celery()
    assert (app.conf.task_serializer, app.conf.accept_content) == ("json", ("json",))
    kind, encoding, data = kombu.serialization.dumps(value, serializer=app.conf.task_serializer)
    return kombu.serialization.loads(
        data, kind, encoding, accept=kombu.serialization.prepare_accept_content(app.conf.accept_content)
    )


def dramatiq_round_trip(value):
    encoder = dramatiq.get_encoder()
    assert isinstance(encoder, dramatiq.encoder.JSONEncoder)
    return encoder.decode(encoder.encode(value))


def test_a_tuple_is_a_list_after_json():
    assert celery_round_trip({"args": (1, 2)}) == {"args": [1, 2]}
    assert dramatiq_round_trip({"args": (1, 2)}) == {"args": [1, 2]}
    assert json.loads(json.dumps({"args": (1, 2)})) == {"args": [1, 2]}  # procrastinate writes jsonb


def test_celery_acknowledges_before_the_task_runs():
    conf = celery.Celery().conf
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost) == (False, None)


def test_rq_fails_an_abandoned_job():
    assert "FailedJobRegistry" in inspect.getsource(rq.registry.StartedJobRegistry.cleanup)


def test_huey_takes_a_task_off_the_queue_before_it_runs(tmp_path):
    queue = huey.SqliteHuey(filename=str(tmp_path / "huey.db"))

    @queue.task()
    def work():
        raise SystemExit  # as good as killed: nothing after it runs

    work()
    taken = queue.dequeue()
    assert taken is not None
    assert queue.pending_count() == 0
    queue.storage.close()


def test_procrastinate_leaves_stalled_jobs_to_the_application():
    assert hasattr(procrastinate.manager.JobManager, "get_stalled_jobs")
    assert "get_stalled_jobs" not in inspect.getsource(procrastinate.worker)
