"""Call sites of RQ, with the real ``rq``: the codemod rewrites them to the same call, or reports what a person has to do."""

# ruff: noqa: E402 - what is skipped without ndb

import inspect
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import FunctionType

import pytest

pytest.importorskip("google.cloud.ndb")
rq = pytest.importorskip("rq")
pytest.importorskip("libcst")

from safedefer.migrate.code import migrate_code
from safedefer.testing import TestApp
from tests.ported.compare import state
from tests.ported.shop import jobs, models, tasks

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "leave-rq.md"
#: Left as they are, by the code of what is reported.
REPORTED = {
    "dependency": "option", "metadata": "option", "callbacks": "option", "repeated": "option", "unique_job": "option", "rate_limited": "option",
    "webhooks": "option", "many": "enqueue-many", "dotted_method": "dotted-method", "name_of_the_moment": "dynamic-callable",
    "lambda_": "lambda", "result": "result-used",
}  # fmt: skip
#: What RQ and ``defer`` both do with the call, other than callable and arguments; where a note is said of it, its code.
SAID = {"lifetimes": "option-left-out", "job_id": "job-id", "wrapped_arguments": "double-star"}
#: Seconds.
WHEN = {"in_ten_minutes": 600, "at_a_time": 7_200}
SITES = {
    name: each
    for name, each in vars(jobs).items()
    if type(each) is FunctionType and not inspect.signature(each).parameters and name != "order_number"
}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Return the rewritten module, and the codes of what is said of each function."""
    folder = tmp_path_factory.mktemp("moved")
    path = folder / "moved_jobs.py"
    shutil.copy(jobs.__file__, path)
    lines = path.read_text().splitlines()
    (report,) = migrate_code([str(folder)], write_files=True)
    said = {}
    for note in report.notes:
        above = [line for line in lines[: note.line] if line.startswith("def ")]
        if above:
            said.setdefault(re.match(r"def (\w+)", above[-1])[1], []).append(note.code)
    sys.path.insert(0, str(folder))
    try:
        yield import_module("moved_jobs"), said
    finally:
        sys.path.remove(str(folder))
        del sys.modules["moved_jobs"]


class Made(Exception):
    """RQ has made the job; to store it takes a server."""


def job_of(name, monkeypatch):
    """Return the job that RQ makes of a site."""
    jobs_made = []
    make = rq.Queue.create_job

    def create_job(self, *args, **kwargs):
        jobs_made.append((self.name, make(self, *args, **kwargs)))
        raise Made

    monkeypatch.setattr(rq.Queue, "create_job", create_job)
    with pytest.raises(Made):
        SITES[name]()
    return jobs_made[0]


@pytest.mark.parametrize("name", sorted(SITES.keys() - REPORTED.keys()))
def test_a_site_is_rewritten_to_the_call_that_rq_makes(moved, monkeypatch, name):
    module, said = moved
    queue, job = job_of(name, monkeypatch)
    with TestApp(models.__name__, tasks.__name__, module.__name__) as app:
        getattr(module, name)()
        (task,) = app.deferred_tasks
        assert task.countdown == pytest.approx(WHEN.get(name, 0), abs=120)
        app.clock.advance(7_500)
        assert [each.outcome for each in app.run_due()] == ["succeeded"]
        claims = app.verify(app.queue.recorded[0].token, expired=True).claims
    target = (
        job.func_name
        if job.instance is None
        else f"{type(job.instance).__module__}.{type(job.instance).__name__}.{job.func_name}"
    )
    assert task.callable.replace(":", ".").replace(module.__name__, jobs.__name__) == target
    assert state([task.args, task.kwargs]) == state([tuple(job.args), job.kwargs])
    if job.instance is not None:
        assert state(task.function.__self__) == state(job.instance)
    assert task.queue == queue
    # RQ has 180 s where nothing is given.
    assert claims.get("deadline", 180) == job.timeout
    assert said.get(name, []) == [SAID[name]] * (5 if name == "lifetimes" else 1) if name in SAID else name not in said


@pytest.mark.parametrize("name", REPORTED)
def test_a_site_without_counterpart_is_reported(moved, name):
    _, said = moved
    assert set(said[name]) - {"job-id"} == {REPORTED[name]}


def test_the_counts_of_the_guide_are_those_of_the_table():
    kept = len(SITES) - len(REPORTED)
    assert (
        f"Of {len(SITES)} shapes of call sites, {kept} are rewritten to the same call and {len(REPORTED)} are reported"
        in GUIDE.read_text()
    )
