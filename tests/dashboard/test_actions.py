"""Every action by its own form: what it does, what it says, what it writes down, and when it does nothing."""

import logging
import re
import time
from html import unescape

import pytest

from safedefer.dashboard import lookup
from safedefer.dashboard.access import Access
from safedefer.queues.base import DeadFilter, TaskState
from tests import sample_tasks
from tests.dashboard.served import ADMIN, bury, filled_app, serving_dashboard
from tests.unit.apps import make_app


@pytest.fixture
async def browser(caplog):
    caplog.set_level(logging.INFO, logger="safedefer.audit")
    app, failed, done = filled_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        browser.app, browser.failed, browser.done = app, failed, done
        yield browser


def audited(browser):
    return [(entry.user, entry.action, entry.queue, entry.result) for entry in browser.site.audit.entries][1:]


async def test_a_dead_letter_runs_again_with_the_same_arguments(browser, caplog):
    page = await browser.submit(await browser.get(f"task?id={browser.failed.id}"), "retry")
    assert "Runs again: 1." in page.words
    new_id = re.search(r"id=(\w+)", str(page.url))[1]
    assert "the printer is on fire" in page.words
    assert f"Runs again {browser.failed.id}" in page.words
    assert browser.app.queue.find(browser.failed.id) is None
    assert browser.app.queue.find(new_id).state is TaskState.WAITING
    assert audited(browser) == [("ann", "retry", "mail", f"runs again as {new_id}")]
    assert f"ann: retry {browser.failed.id} in mail: runs again as {new_id}" in caplog.messages


async def test_a_second_retry_says_that_it_is_gone(browser):
    form = (await browser.get(f"task?id={browser.failed.id}")).form("retry")
    assert (await browser.post("retry", form)).status == 200
    assert (await browser.post("retry", form)).status == 404


async def test_a_dead_letter_that_does_not_verify_stays_and_the_page_says_why(browser):
    from dataclasses import replace

    view = browser.app.queue.find(browser.failed.id)
    browser.app.queue._state.ended[view.id] = replace(view, token=view.token[:-3] + b"AAA", records=())
    page = await browser.get(f"task?id={view.id}")
    assert "Its token is refused" in page.words
    page = await browser.submit(page, "retry")
    assert page.status == 409
    assert "bad-signature" in page.words
    assert browser.app.queue.find(view.id) is not None
    assert audited(browser) == [("ann", "retry", "mail", "refused: bad-signature")]


@pytest.mark.parametrize("action", ["retry", "discard"])
async def test_what_is_no_dead_letter_is_neither_run_again_nor_discarded(browser, action):
    csrf = (await browser.get()).form("logout")["csrf"]
    assert (await browser.post(action, {"csrf": csrf, "id": browser.done.id})).status == 409
    assert (await browser.post(action, {"csrf": csrf, "id": "0" * 32})).status == 404
    assert (await browser.post(action, {"csrf": csrf, "id": "\0"})).status == 404
    assert (await browser.post(action, {"csrf": csrf})).status == 404


async def test_a_dead_letter_is_discarded_after_a_question(browser):
    question = await browser.get(f"confirm?do=discard&id={browser.failed.id}")
    assert "Discard this dead letter for good?" in question.words
    assert browser.app.queue.find(browser.failed.id) is not None
    page = await browser.submit(question, "discard")
    assert "Discarded: 1." in page.words
    assert browser.app.queue.find(browser.failed.id) is None
    assert audited(browser) == [("ann", "discard", "mail", "done")]


async def test_a_task_is_cancelled_after_a_question(browser):
    task = browser.app.options(countdown=600).defer(sample_tasks.add, 1)
    page = await browser.submit(await browser.get(f"confirm?do=cancel&id={task.id}"), "cancel")
    assert "Cancelled." in page.words
    assert browser.app.queue.find(task.id).state is TaskState.CANCELLED
    csrf = (await browser.get()).form("logout")["csrf"]
    assert (await browser.post("cancel", {"csrf": csrf, "id": task.id})).status == 409


async def test_a_queue_is_paused_and_resumed(browser):
    page = await browser.submit(await browser.get("queues"), "pause")
    assert "The queue is paused" in page.words
    (control,) = browser.app.queue.controls(now=time.time())
    assert (control.queue, control.paused) == ("default", True)
    page = await browser.submit(page, "resume")
    assert "The queue goes on." in page.words
    assert not browser.app.queue.controls(now=time.time())
    assert [entry[:3] for entry in audited(browser)] == [("ann", "pause", "default"), ("ann", "resume", "default")]


async def test_a_queue_is_purged_after_a_question_that_says_how_many_wait(browser):
    for number in range(3):
        browser.app.options(queue="bulk").defer(sample_tasks.add, number)
    browser.site._numbers.forget()
    question = await browser.get("confirm?do=purge&queue=bulk")
    assert "3 wait now" in question.words
    page = await browser.submit(question, "purge")
    assert "Cancelled in the queue: 3." in page.words
    assert browser.app.queue.tasks(queue="bulk") == []
    assert audited(browser) == [("ann", "purge", "bulk", "3 cancelled")]


@pytest.mark.parametrize(
    "path", ["confirm", "confirm?do=purge&queue=none", "confirm?do=x&id=1", "confirm?do=discard&id=none"]
)
async def test_there_is_no_question_about_nothing(browser, path):
    assert (await browser.get(path)).status == 404


@pytest.mark.parametrize("queue", ["bad name", "", "\0", "x" * 300, "<b>"])
async def test_a_queue_of_an_impossible_name_is_neither_paused_nor_purged(browser, queue):
    csrf = (await browser.get()).form("logout")["csrf"]
    for action in ("pause", "resume", "purge"):
        assert (await browser.post(action, {"csrf": csrf, "queue": queue})).status == 409
    assert not browser.app.queue.controls(now=time.time())


def dead_app():
    app = make_app()
    tasks = [app.options(queue="mail" if n % 2 else "default").defer(sample_tasks.add, n) for n in range(9)]
    bury(app, *tasks[:7])
    bury(app, *tasks[7:], reason="age-limit")
    return app


def button(page, action):
    (text,) = re.findall(rf'action="{action}">.*?<button[^>]*>(.*?)</button>', page.text, re.DOTALL)
    return unescape(text)


@pytest.mark.parametrize(
    ("query", "count"), [("", 9), ("queue=mail", 4), ("reason=age-limit", 2), ("queue=mail&reason=age-limit", 1)]
)
async def test_the_button_says_how_many_it_runs_again_and_it_runs_these(query, count):
    app = dead_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        page = await browser.get(f"dead?{query}")
        assert button(page, "retry-all") == f"Retry all {count}"
        assert f"Discard all {count}…" in page.words
        assert len(re.findall(r"<tr><th scope=\"row\">", page.text)) == count
        done = await browser.submit(page, "retry-all")
        assert f"Runs again: {count}." in done.words
        assert "before" not in str(done.url)
        assert len(app.queue.dead_letters(DeadFilter())) == 9 - count
        assert len(app.queue.tasks(states=[TaskState.WAITING])) == count


async def test_what_died_after_the_page_was_made_is_not_meant_by_its_button():
    app = dead_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        page = await browser.get("dead")
        late = app.defer(sample_tasks.add, 99)
        bury(app, late)
        assert "Runs again: 9." in (await browser.submit(page, "retry-all")).words
        assert [view.id for view in app.queue.dead_letters(DeadFilter())] == [late.id]


@pytest.mark.parametrize("action", ["retry-all", "discard-all"])
async def test_nothing_is_done_where_the_filter_means_another_number_than_the_button_said(action):
    app = dead_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        page = await browser.get("dead" if action == "retry-all" else "confirm?do=discard-all")
        app.queue.drop_dead([app.queue.dead_letters(DeadFilter())[0].id])
        answer = await browser.submit(page, action)
        assert answer.status == 409
        assert "The filter means 8 now" in answer.words
        assert len(app.queue.dead_letters(DeadFilter())) == 8
        csrf = page.form(action)["csrf"]
        assert (await browser.post(action, {"csrf": csrf, "count": "8"})).status == 400  # no time
        assert len(app.queue.dead_letters(DeadFilter())) == 8


async def test_all_that_a_filter_means_are_discarded_after_a_question():
    app = dead_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        question = await browser.get("confirm?do=discard-all&queue=mail")
        assert "Discard 4 dead letters for good?" in question.words
        assert button(question, "discard-all") == "Discard 4"
        assert "Discarded: 4." in (await browser.submit(question, "discard-all")).words
        assert {view.queue for view in app.queue.dead_letters(DeadFilter())} == {"default"}


async def test_a_button_acts_on_what_the_person_may_act_on_and_says_their_number():
    app = dead_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in(Access(user="ann", read=True, act=["mail"]))
        page = await browser.get("dead")
        assert button(page, "retry-all") == "Retry all 4"
        assert "Runs again: 4." in (await browser.submit(page, "retry-all")).words
        assert {view.queue for view in app.queue.dead_letters(DeadFilter())} == {"default"}


async def test_a_button_acts_on_a_bounded_number_and_says_so(monkeypatch):
    monkeypatch.setattr(lookup, "BULK", 5)
    monkeypatch.setattr("safedefer.dashboard.pages.BULK", 5)
    app = dead_app()
    oldest = [view.id for view in app.queue.dead_letters(DeadFilter())][:5]
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        page = await browser.get("dead")
        assert button(page, "retry-all") == "Retry the oldest 5"
        assert (await browser.submit(page, "retry-all")).status == 200
    assert not {view.id for view in app.queue.dead_letters(DeadFilter())} & set(oldest)


async def test_those_that_may_not_run_again_stay_and_the_page_says_so():
    from dataclasses import replace

    app = dead_app()
    view = app.queue.dead_letters(DeadFilter())[0]
    app.queue._state.ended[view.id] = replace(view, token=b"x.y." + b"A" * 43, records=())
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        page = await browser.submit(await browser.get("dead"), "retry-all")
        assert "Run again: 8. Some stay" in page.words
        assert [each.id for each in app.queue.dead_letters(DeadFilter())] == [view.id]


async def test_dead_letters_go_on_page_by_page():
    app = make_app()
    bury(app, *[app.defer(sample_tasks.add, number) for number in range(lookup.ROWS + 3)])
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        first = await browser.get("dead")
        (onward,) = (each for each in first.links if "after=" in each)
        second = await browser.get(onward)
        ids = [set(re.findall(r'href="task\?id=(\w+)', page.text)) for page in (first, second)]
        assert [len(each) for each in ids] == [lookup.ROWS, 3]
        assert not ids[0] & ids[1]
        for after in ("x", "nan~x", "~", "1~\0"):
            assert (await browser.get("dead", params={"after": after})).status == 200


async def test_the_audit_log_is_bounded_and_shows_the_newest(browser):
    for number in range(300):
        browser.site.audit.add("ann\n", "pause", subject=f"q{number}", queue=f"q{number}")
    page = await browser.get("system")
    assert "q299" in page.words
    assert "q99 " not in page.words
    assert len(browser.site.audit.entries) == 200
    assert browser.site.audit.entries[-1].user == "ann\ufffd"


async def test_no_argument_key_or_token_is_in_the_audit_log(browser, caplog):
    page = await browser.get(f"task?id={browser.failed.id}")
    token = browser.app.queue.find(browser.failed.id).token.decode()
    await browser.submit(page, "retry")
    await browser.log_in(ADMIN)
    assert "printer" not in caplog.text
    assert token not in caplog.text
    assert page.form("retry")["csrf"] not in caplog.text
