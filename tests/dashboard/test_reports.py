"""What the dashboard shows of other processes, by their notices in the store; and what an attacker in the store can make of it."""

import json
import time
from dataclasses import replace

import pytest

from safedefer.dashboard.access import Access
from safedefer.dashboard.overview import Numbers
from safedefer.errors import QueueUnavailable
from safedefer.observe.troubles import (
    DownTarget,
    LateQueue,
    ProcessReport,
    Refused,
    Rejected,
    StoreTrouble,
)
from safedefer.queues.base import NOTICES, Notice
from tests.dashboard.served import ADMIN, serving_dashboard
from tests.unit.apps import make_app

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}\u202egpj.exe\x1b[31m"


def full_report(now, text="x"):
    return ProcessReport(
        process=f"run 1 on {text}",
        since=now,
        command=text,
        takes=True,
        beats=True,
        queues=(text,),
        down=(DownTarget(text, text, now),),
        troubles=(StoreTrouble(text, text, now),),
        late=(LateQueue(text, now),),
        refused=(Refused(text, 3, now),),
        rejected=(Rejected(text, text, 2, now),),
    )


async def words_of(app, *reports, path=""):
    """Return what a page says when other processes have left these notices."""
    now = time.time()
    for report in reports:
        app.queue.put_notice(report.process, report.text(), now=report.at or now)
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        return await browser.get(path)


def test_a_report_is_read_as_it_was_written():
    now = time.time()
    report = replace(full_report(now), at=now)
    assert ProcessReport.read(Notice(report.process, report.text(), now), now=now) == report


def test_a_report_is_cut_to_the_size_of_a_notice():
    now = time.time()
    many = tuple(DownTarget("\U0001f600" * 1_000, "r", now) for _ in range(100))
    text = replace(full_report(now), down=many).text()
    assert len(text.encode()) <= 8_192
    read = ProcessReport.read(Notice("p", text, now), now=now)
    assert read is not None
    assert read.refused == (Refused("x", 3, now),)


@pytest.mark.parametrize(("report", "says"), [
    (ProcessReport(down=(DownTarget("http://10.0.0.7:8080", "refused", 1.0),)),
     "A handler is down. The handler http://10.0.0.7:8080 takes no connection"),
    (ProcessReport(troubles=(StoreTrouble("leasing", "permission denied for table tasks", 1.0),)),
     "The store refuses a process. Leasing fails in the process run 7 on web-1"),
    (ProcessReport(refused=(Refused("revoked-key", 12, 1.0),)),
     "Somebody uses a revoked key. 12 requests refused in the last 15 min (revoked-key)"),
    (ProcessReport(rejected=(Rejected("unresolvable-callable", "shop.tasks:gone", 1, 1.0),)),
     "Code is missing here. shop.tasks:gone was turned away 1 time in the last 15 min"),
])  # fmt: skip
async def test_what_another_process_says_is_on_the_overview(report, says):
    app = make_app()
    told = replace(report, process="run 7 on web-1", command="run", beats=True)
    assert says in (await words_of(app, told)).words
    assert "run 7 on web-1" in (await words_of(app, path="system")).words
    app.close()


async def test_a_process_that_fell_silent_is_named_unless_it_ended_or_was_replaced():
    app, now = make_app(), time.time()
    silent = ProcessReport(process="run 7 on web-1", command="run", beats=True, at=now - 60.0, since=now - 90.0)
    assert "The process run 7 on web-1 has said nothing for 1 min" in (await words_of(app, silent)).words
    other = replace(silent, process="run 8 on web-2", at=now, since=now - 50.0)
    assert "A process is silent" in (await words_of(app, other)).words
    successor = replace(silent, process="run 9 on web-1", at=now, since=now - 50.0)
    assert "A process is silent" not in (await words_of(app, successor)).words
    app.queue.put_notice(successor.process, "", now=now)
    assert "A process is silent" not in (await words_of(app, replace(silent, ended=True))).words
    app.close()


def test_no_process_is_silent_because_counting_the_tasks_takes_long(monkeypatch):
    """The counts of a large queue serve for seconds, and what processes say does not."""
    app, now = make_app(), time.time()
    said = ProcessReport(process="run 7 on web-1", command="run", beats=True, takes=True)
    fault = replace(said, down=(DownTarget("http://10.0.0.7:8080", "refused", now),))
    count = app.queue.stats

    def count_slowly(**given):
        time.sleep(0.5)
        return count(**given)

    monkeypatch.setattr(app.queue, "stats", count_slowly)
    numbers, name = Numbers(app), "run 7 on web-1"

    def is_silent(at):
        found = [each.process for each in numbers.reported(now=at).silent]
        said_so = any(f"The process {name}" in alarm.text for alarm in numbers.overview(ADMIN, now=at).alarms)
        assert said_so is (name in found)
        return name in found

    app.queue.put_notice(name, said.text(), now=now)
    assert not is_silent(now)
    assert not is_silent(now + 6.0), "what was read a moment ago says nothing of the time since"
    time.sleep(1.1)
    app.queue.put_notice(name, fault.text(), now=now + 6.0)
    assert not is_silent(now + 6.5)
    assert numbers.reported(now=now + 6.5).down, "the counts are those of before, and the notices are not"
    time.sleep(1.1)
    assert is_silent(now + 12.0)
    app.close()


async def test_a_store_that_takes_no_writes_is_said(monkeypatch):
    app = make_app()

    def fail(*_, **__):
        raise QueueUnavailable("the disk is full; free some space and try again")

    monkeypatch.setattr(app.queue, "put_notice", fail)
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        deadline = time.monotonic() + 60.0
        words = ""
        while "A disk is full." not in words:
            assert time.monotonic() < deadline
            browser.site._numbers.forget()
            words = (await browser.get()).words
        assert "the disk is full; free some space" in words
    app.close()


async def test_who_sees_one_queue_sees_nothing_of_processes():
    app, now = make_app(), time.time()
    app.queue.put_notice("run 7 on web-1", full_report(now, "seen").text(), now=now)
    async with serving_dashboard(app, lambda _: Access(user="bob", read=["mail"])) as browser:
        for path in ("", "system"):
            page = await browser.get(path)
            assert page.status == 200
            assert "seen" not in page.text
    app.close()


async def test_hostile_notices_are_text_and_few():
    app, now = make_app(), time.time()
    for number in range(3 * NOTICES):
        report = replace(
            full_report(now, ATTACK), down=tuple(DownTarget(f"{ATTACK}{n}", ATTACK, now) for n in range(99))
        )
        app.queue.put_notice(f"{ATTACK}{number}", report.text(), now=now)
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        for path in ("", "system", "live"):
            page = await browser.get(path)
            assert page.status == 200
            assert "{{7*7}}" in page.text
            assert len(page.text) < 200_000, path
            for code in ("<script>alert", "<img", "\u202e", "\x1b"):
                assert code not in page.text, (path, code)
        assert page.text.count("<li>") < 50
    app.close()


@pytest.mark.parametrize("change", [
    {"queues": 5}, {"queues": [1]}, {"since": "x"}, {"since": -1}, {"since": 1e300}, {"down": 7}, {"down": [[1]]},
    {"down": [["a", "b", float("nan")]]}, {"down": [["a", "b", True]]}, {"refused": [["a", float("inf"), 1.0]]},
    {"refused": [["a", "b", 1.0]]}, {"rejected": None}, {"command": None}, {"late": {"a": 1}},
])  # fmt: skip
async def test_a_notice_that_is_none_of_ours_is_counted_and_not_shown(change):
    app, now = make_app(), time.time()
    document = json.loads(full_report(now, "shown").text()) | change
    app.queue.put_notice("run 7 on web-1", json.dumps(document), now=now)
    page = await words_of(app, path="system")
    assert page.status == 200
    assert "shown" not in page.text
    assert "1 notices are none of safedefer's" in page.words
    app.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}', "[" * 8_000, "7" * 8_000])
async def test_what_is_no_document_is_counted_and_not_shown(text):
    assert ProcessReport.read(Notice("p", text, 1.0), now=2.0) is None


async def test_a_notice_of_the_future_keeps_no_process_alive():
    app, now = make_app(), time.time()
    text = ProcessReport(command="run", beats=True, takes=True).text()
    app.queue.put_notice("run 7 on web-1", text, now=now + 1e6)
    page = await words_of(app, path="system")
    assert "run 7 on web-1" not in page.words
    app.close()
