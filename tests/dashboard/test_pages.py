"""What the pages show, without JavaScript: faults in words, tasks found by anything, arguments as a tree, hostile text as text."""

import re
import secrets
import sys
import time
from dataclasses import replace
from urllib.parse import urljoin

import pytest

from safedefer.dashboard.lookup import LOOKED_AT, ROWS, TaskQuery, find_tasks, read_position, read_time
from safedefer.errors import QueueUnavailable
from safedefer.events import RequestRefused, TargetDown, TargetUp
from safedefer.keys import Key, Keyring
from safedefer.observe.notices import ProcessRole
from safedefer.queues.base import TaskState, Verdict
from safedefer.queues.rates import QueueLimits
from tests import sample_tasks
from tests.dashboard.served import ADMIN, bury, filled_app, record_failure, serving_dashboard, settle
from tests.unit.apps import make_app

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}\u202egpj.exe\x1b[31m\0"


@pytest.fixture
async def browser():
    app, failed, done = filled_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        browser.app, browser.failed, browser.done = app, failed, done
        yield browser


async def test_the_overview_says_what_is_wrong_first(browser):
    browser.app.queue.pause("default", paused=True, now=time.time())
    browser.app.observers(TargetDown(address="http://10.0.0.7:8080", reason="ConnectionRefusedError"))
    browser.site._numbers.forget()
    words = (await browser.get()).words
    assert "The handler http://10.0.0.7:8080 takes no connection, for" in words
    assert "The queue default is paused: 1 task waits" in words
    assert "1 died in the queue mail in the last 15 min" in words
    assert words.index("What is wrong") < words.index("Waiting") < words.index("Ended in the last 15 minutes")
    browser.app.observers(TargetUp(address="http://10.0.0.7:8080", seconds=3.0, waited=0))
    assert "10.0.0.7" not in (await browser.get("system")).words


async def test_nothing_wrong_is_said_too():
    async with serving_dashboard(make_app()) as browser:
        await browser.log_in()
        assert "Nothing is wrong" in (await browser.get()).words
        for path in ("tasks", "dead", "queues", "system", "live"):
            assert (await browser.get(path)).status == 200


async def test_a_queue_that_is_behind_is_shown():
    app = make_app()
    app.queue.enqueue_many([replaced_eta(app, time.time() - 3_961)])
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        words = (await browser.get()).words
        assert (
            "Nobody takes tasks. 1 task waits in the queue default, due for 1 h 6 min, and no process takes them"
            in words
        )
        app.notices.start(ProcessRole(command="run", beats=True, takes=True))
        browser.site._numbers.forget()
        words = (await browser.get()).words
        assert (
            "The queue default is 1 h 6 min behind: 1 task waits, 0 run. Processes are up, and nothing runs: look at their log"
            in words
        )
    app.close()


def replaced_eta(app, eta):
    """Return a task of the App's with another hint of its time."""
    task = app.defer(sample_tasks.add, 1)
    stored = app.queue._state.rows.pop(task.id).task
    return stored._replace(eta=eta, created=eta)


@pytest.mark.parametrize(("query", "state"), [
    ("q=4711", "waiting"), ("q=sample_tasks:KEYWORDS", "waiting"), ("q=BOLD", "waiting"), ("queue=mail", "waiting"),
    ("q=sample_tasks:fail", "dead"), ("q=printer", "dead"), ("q=retry-limit", "dead"), ("q=sample_tasks:add", "succeeded"),
])  # fmt: skip
async def test_tasks_are_found_by_callable_argument_reason_and_queue(browser, query, state):
    page = await browser.get(f"tasks?state={state}&{query}")
    assert len(re.findall(r"<tr><th scope=\"row\">", page.text)) == 1


async def test_a_task_is_found_by_its_id_in_whatever_state(browser):
    for task in (browser.failed, browser.done):
        page = await browser.get(f"tasks?q={task.id}")
        assert f'href="task?id={task.id}"' in page.text


async def test_tasks_are_found_by_name_and_time():
    app = make_app()
    named = app.options(name="nightly-2026").defer(sample_tasks.add, 1)
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        assert named.id in (await browser.get("tasks?q=NIGHTLY")).text
        assert "None found" in (await browser.get("tasks?before=2001-01-01T00:00")).words
        assert named.id in (await browser.get("tasks?since=2001-01-01T00:00")).text
        assert named.id in (await browser.get("tasks?since=nonsense&before=99999999999999999999")).text


def test_a_search_in_many_tasks_is_bounded_and_goes_on():
    app = make_app()
    template = app.queue._state.rows.pop(app.defer(sample_tasks.add, 1).id).task
    many = LOOKED_AT + 300
    app.queue.enqueue_many(
        template._replace(id=f"{n:032x}", created=1_000.0 + n, callable_name="x:old" if n < 10 else "x:y")
        for n in range(many)
    )
    query = TaskQuery(text="x:old")
    found = find_tasks(app, query, ADMIN, monotonic=lambda: 0.0)
    assert (found.tasks, found.looked_at) == ([], LOOKED_AT)
    rest = find_tasks(app, replace(query, after=found.after), ADMIN, monotonic=lambda: 0.0)
    assert (len(rest.tasks), rest.looked_at, rest.after) == (10, 300, None)
    seen, after = set(), None
    for _ in range(3):
        page = find_tasks(app, TaskQuery(text="x:y", after=after), ADMIN, monotonic=lambda: 0.0)
        assert len(page.tasks) == page.looked_at == ROWS
        seen |= {view.id for view in page.tasks}
        after = read_position(f"{page.after[0]!r}~{page.after[1]}")
        assert after == page.after
    assert len(seen) == 3 * ROWS
    # It ends by the clock too, and says where to go on.
    times = iter([0.0, *[900.0] * 10])
    assert find_tasks(app, query, ADMIN, monotonic=lambda: next(times)).looked_at == 1


async def test_the_url_of_a_page_of_tasks_can_be_shared_and_goes_on(browser):
    for number in range(ROWS + 5):
        browser.app.options(queue="bulk").defer(sample_tasks.add, number)
    first = await browser.get("tasks?queue=bulk&state=waiting")
    (onward,) = (each for each in first.links if "after=" in each)
    second = await browser.get(onward)
    ids = [set(re.findall(r"task\?id=(\w+)", page.text)) for page in (first, second)]
    assert [len(each) for each in ids] == [ROWS, 5]
    assert not ids[0] & ids[1]
    assert "There are no more." in second.words


async def test_arguments_are_a_tree_of_typed_values_and_no_code_of_the_task_is_imported(browser):
    task = browser.app.options(queue="mail").defer(
        sample_tasks.keywords, when=time_of(), lines=[{"n": 2**70}], ok=True, none=None
    )
    before = set(sys.modules)
    words = (await browser.get(f"task?id={task.id}")).words
    for row in (
        "when datetime 3 items 0 str 2026-01-02T03:04:05", "lines list 1 item", "0 dict 1 item", f"n int {2**70}", "ok bool True", "none None None",
    ):  # fmt: skip
        assert row in words, row
    assert {
        name for name in set(sys.modules) - before if not name.startswith(("jinja2", "aiohttp", "safedefer"))
    } == set()


def time_of():
    from datetime import datetime

    return datetime(2026, 1, 2, 3, 4, 5)


async def test_a_task_whose_module_is_not_here_is_shown():
    app = make_app(policy=__import__("safedefer").Policy("nowhere.tasks", "tests.sample_tasks"))
    task = app.defer(sample_tasks.keywords, secret_word="aardvark")
    claims = app.authenticate(app.queue.find(task.id).token)
    token = app.keyring.sign(
        write({**claims, "call": {"kind": "function", "module": "nowhere.tasks", "qualname": "f"}})
    )
    row = app.queue._state.rows[task.id]
    row.task = row.task._replace(token=token, callable_name="nowhere.tasks:f")
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        words = (await browser.get(f"task?id={task.id}")).words
        assert "nowhere.tasks:f" in words
        assert "secret_word str aardvark" in words
    assert "nowhere" not in sys.modules


def write(claims):
    from safedefer.claims import write_json

    return write_json(claims)


async def test_nothing_of_a_token_that_no_key_of_ours_signed_is_shown(browser):
    task = browser.app.defer(sample_tasks.keywords, word="aardvark")
    row = browser.app.queue._state.rows[task.id]
    other = Keyring(Key("k1", secrets.token_bytes(32)))
    payload = browser.app.keyring.verify(__import__("safedefer.token").token.Token.parse(row.task.token, 9_999))[1]
    row.task = row.task._replace(token=other.sign(payload))
    page = await browser.get(f"task?id={task.id}")
    assert "aardvark" not in page.words
    assert "Its token is refused: bad-signature" in page.words
    assert task.id not in (await browser.get("tasks?q=aardvark")).text


@pytest.mark.parametrize(("change", "says"), [
    ({"expires": 1_000}, "Its row was changed"),
    ({"url": "/other"}, "Its row was changed: the url"),
])  # fmt: skip
async def test_a_row_that_was_changed_is_said(browser, change, says):
    task = browser.app.defer(sample_tasks.add, 1)
    row = browser.app.queue._state.rows[task.id]
    row.task = row.task._replace(**change)
    words = (await browser.get(f"task?id={task.id}")).words
    # When it ends is what was signed, whatever the row says.
    assert (says in words) is ("url" in change)


async def test_why_a_task_does_not_run_is_said(browser):
    app, now = browser.app, time.time()

    async def says(task):
        return (await browser.get(f"task?id={task.id}")).words

    later = app.options(countdown=3_600).defer(sample_tasks.add, 1)
    assert "Not due yet." in await says(later)
    app.queue.pause("mail", paused=True, now=now)
    paused = app.options(queue="mail").defer(sample_tasks.add, 1)
    assert "Its queue mail is paused" in await says(paused)
    app.queue.configure([QueueLimits(queue="slow", rate=1.0, bucket_size=5, max_concurrent=2)], now=now)
    limited = app.options(queue="slow").defer(sample_tasks.add, 1)
    assert "1 a second, bucket 5, at most 2 at once" in await says(limited)
    app.queue.hold("held", until=now + 500.0, now=now)
    held = app.options(queue="held").defer(sample_tasks.add, 1)
    assert "Its queue held is held for" in await says(held)
    tried = app.options(queue="q2").defer(sample_tasks.add, 1)
    settle(app, {tried.id}, Verdict.RETRY, at=now + 300.0, reason="unreachable")
    assert "Its target does not answer" in await says(tried)
    assert "It failed as often as its retry limit allows." in await says(browser.failed)
    assert "ValueError: the printer is on fire" in await says(browser.failed)
    stale = app.options(queue="q3").defer(sample_tasks.add, 1)
    stored = app.queue._state.rows[stale.id]
    stored.task = stored.task._replace(eta=now - 100.0)
    assert "nobody has taken it" in await says(stale)


async def test_a_task_of_a_key_that_is_gone_says_so():
    gone = Key("gone", secrets.token_bytes(32))
    app = make_app(keyring=Keyring(gone))
    task = app.defer(sample_tasks.add, 1)
    after = make_app(keyring=Keyring(Key("new", secrets.token_bytes(32))), queue=app.queue)
    async with serving_dashboard(after) as browser:
        await browser.log_in()
        assert "unknown-key" in (await browser.get(f"task?id={task.id}")).words


async def test_hostile_text_is_text_on_every_page(browser):
    app = browser.app
    task = app.defer(
        sample_tasks.keywords, **{"evil": ATTACK.replace("\0", ""), "list": [{ATTACK.replace("\0", ""): 1}]}
    )
    record_failure(app, task, ValueError(ATTACK))
    bury(app, task, reason=ATTACK)
    hostile = replace(
        app.queue.find(task.id), callable_name=ATTACK, name=ATTACK, url=ATTACK, target=ATTACK, headers={ATTACK: ATTACK},
        retry_options={ATTACK: 1.0}, queue="a" + ATTACK, eta=float("nan"), expires=2**62, created=1e300, records=(),
    )  # fmt: skip
    app.queue._state.ended[task.id] = hostile
    app.queue.pause("p" + ATTACK, paused=True, now=time.time())
    app.observers(TargetDown(address=ATTACK, reason=ATTACK))
    app.observers(RequestRefused(status=403, reason=ATTACK))
    browser.site.audit.add(ATTACK, "pause", subject=ATTACK, queue=ATTACK, result=ATTACK)
    pages = [
        "",
        "live",
        "tasks?state=dead",
        f"task?id={task.id}",
        "dead",
        "queues",
        "system",
        f"confirm?do=discard&id={task.id}",
    ]
    browser.site._numbers.forget()
    for path in pages:
        page = await browser.get(path)
        assert page.status == 200, path
        assert "&lt;script&gt;" in page.text, path
        text = page.text
        for markup in ("<script>alert", "<img", "\u202e", "\x1b", "\0"):
            assert markup not in text, (path, markup)
        assert "49" not in re.sub(r"\d{3,}", "", page.words) or "{{7*7}}" in page.words
    evil = await browser.get(
        "tasks", params={"q": ATTACK, "queue": ATTACK, "state": ATTACK, "after": ATTACK, "since": ATTACK}
    )
    assert evil.status == 200
    assert "<script>alert" not in evil.text
    for path in ("dead", "task", "confirm", "queues", "login"):
        params = {name: ATTACK for name in ("id", "do", "queue", "reason", "callable", "after", "done", "n", "token")}
        page = await browser.get(path, params=params)
        assert page.status in {200, 403, 404}, path
        assert "<script>alert" not in page.text


@pytest.mark.parametrize("prefix", ["", "/tasks/", "/a/b/c"])
async def test_every_link_works_below_any_prefix_and_no_header_of_a_proxy_is_believed(prefix):
    app, failed, _ = filled_app()
    proxied = {"X-Forwarded-Prefix": "//evil.example", "X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    async with serving_dashboard(app, prefix=prefix.rstrip("/") + "/" if prefix else "") as browser:
        await browser.log_in()
        seen = {}
        pending = [""]
        while pending:
            path = pending.pop()
            page = await browser.get(path, headers=proxied)
            assert page.status == 200, path
            assert "evil" not in page.text
            seen[path] = page
            for href in page.links:
                assert not re.match(r"[/\\]|[a-z]+:", href), href
                url = urljoin(str(page.url), href)
                assert url.startswith(browser.base), (path, href)
                relative = url.removeprefix(browser.base).partition("#")[0]
                is_page = not relative.startswith(("retry", "discard", "pause", "resume", "purge", "cancel", "logout"))
                if is_page and relative not in {*seen, *pending}:
                    pending.append(relative)
        assert len(seen) > 15
        assert f"task?id={failed.id}" in seen


async def test_a_store_that_does_not_answer_is_said(browser, monkeypatch):
    def fail(*_, **__):
        raise QueueUnavailable("postgresql://secret@host is down; start it")

    for name in ("stats", "page", "find", "dead_letters", "controls"):
        monkeypatch.setattr(browser.app.queue, name, fail)
    browser.site._numbers.forget()
    for path in ("", "tasks", "dead", "queues", f"task?id={browser.failed.id}"):
        page = await browser.get(path)
        assert page.status == 503, path
        assert "store does not answer" in page.words
        assert "It says: postgresql://host is down; start it" in page.words
        assert "secret" not in page.text


async def test_what_is_polled_says_so_in_its_place_and_goes_on_polling(browser, monkeypatch):
    def fail(**_):
        raise QueueUnavailable("down; start it")

    with monkeypatch.context() as patched:
        patched.setattr(browser.app.queue, "stats", fail)
        browser.site._numbers.forget()
        page = await browser.get("live", headers={"HX-Request": "true"})
        assert page.status == 503
        assert "store does not answer" in page.words
    browser.client.cookie_jar.clear()
    gone = await browser.get("live", headers={"HX-Request": "true"})
    assert gone.status == 401
    for part in (page, gone):
        assert part.text.startswith('<div id="live" hx-get="live" hx-trigger="every 2s"')
        assert "<html" not in part.text


async def test_the_pages_are_the_same_of_a_queue_in_a_file(tmp_path):
    app, failed, done = filled_app(queue=f"sqlite:///{tmp_path}/tasks.db")
    large = app.defer(sample_tasks.keywords, large="x" * 20_000, needle="aardvark")
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        assert "1 died in the queue mail" in (await browser.get()).words
        assert "ValueError: the printer is on fire" in (await browser.get("dead")).words
        assert done.id in (await browser.get("tasks?state=succeeded")).text
        assert large.id in (await browser.get("tasks?q=aardvark")).text
        assert "needle str aardvark" in (await browser.get(f"task?id={large.id}")).words
        assert "Runs again: 1." in (await browser.submit(await browser.get(f"task?id={failed.id}"), "retry")).words
        assert "Nobody" not in (await browser.get("system")).words
    app.close()


async def test_pickles_are_not_read():
    from safedefer import Key, Keyring, Policy

    app = make_app(
        keyring=Keyring(Key("k", secrets.token_bytes(32), pickle=True)),
        allow_pickle=True,
        policy=Policy("tests.sample_tasks"),
    )
    task = app.options(pickle=True).defer(sample_tasks.keywords, needle="aardvark")
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        page = await browser.get(f"task?id={task.id}")
        assert "pickles are not read here" in page.words
        assert "aardvark" not in page.text


async def test_the_system_page_shows_keys_without_secrets(browser):
    page = await browser.get("system")
    assert "k1" in page.words
    assert "active" in page.words


async def test_the_system_page_shows_the_absolute_path_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    app = make_app(queue="sqlite:///tasks.db")
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        assert f"Store {tmp_path}/tasks.db" in (await browser.get("system")).words
    app.close()


@pytest.mark.parametrize(("text", "seconds"), [
    ("2026-11-29T08:30", 1_795_941_000.0), ("2026-11-29T08:30:00+01:00", 1_795_937_400.0), ("12.5", 12.5), ("", None),
    ("x", None), ("-5", None), ("9" * 12, None), ("2026-99-99", None), ("1e5", None),
])  # fmt: skip
def test_times_of_fields(text, seconds):
    assert read_time(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1", "nan~x", "--1~x", "inf~x", "1e999~x", "٣~x", "~"])
def test_a_position_that_cannot_be_read_is_none(text):
    assert read_position(text) is None


@pytest.mark.parametrize("state", list(TaskState))
async def test_every_state_has_a_page(browser, state):
    browser.app.queue.lease(owner="x", limit=1, seconds=100.0, now=time.time())
    assert (await browser.get(f"tasks?state={state}")).status == 200


async def test_a_running_an_expired_and_an_unreadable_task_say_so(browser):
    app = browser.app
    running = app.options(queue="run").defer(sample_tasks.add, 1)
    app.queue.lease(owner="w", limit=100, seconds=600.0, now=time.time(), queues=["run"])
    assert "it runs, or is on its way" in (await browser.get(f"task?id={running.id}")).words
    unreadable = app.options(queue="u").defer(sample_tasks.add, 1)
    row = app.queue._state.rows[unreadable.id]
    row.task = row.task._replace(token=b"", expires=5)
    words = (await browser.get(f"task?id={unreadable.id}")).words
    assert "its token is no longer stored" in words
    assert "Expired: its time is over" in words
    other = app.options(queue="u").defer(sample_tasks.add, 2)
    row.task = row.task._replace(token=app.queue._state.rows[other.id].task.token)
    assert "the token is that of another task" in (await browser.get(f"task?id={unreadable.id}")).words
    foreign = make_app(keyring=app.keyring, environment="staging")
    sent = foreign.defer(sample_tasks.add, 1)
    app.queue.enqueue_many([foreign.queue._state.rows[sent.id].task])
    assert "wrong-audience" in (await browser.get(f"task?id={sent.id}")).words
