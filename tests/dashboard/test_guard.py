"""Attacks on the doors of the dashboard: nobody gets in, no other site acts, and no answer lacks its headers."""

import logging
from dataclasses import replace

import pytest

from safedefer.dashboard.access import Access
from safedefer.dashboard.guard import HEADERS
from safedefer.errors import ConfigurationError
from safedefer.keys import Key, Keyring
from tests import sample_tasks
from tests.dashboard.served import ADMIN, SAME, bury, filled_app, serving_dashboard
from tests.unit.apps import make_app

PAGES = [
    "",
    "live",
    "tasks",
    "task?id=x",
    "dead",
    "queues",
    "system",
    "confirm?do=purge&queue=default",
    "nothing",
    "../x",
]
ACTIONS = ["retry", "retry-all", "discard", "discard-all", "cancel", "pause", "resume", "purge", "logout"]


@pytest.mark.parametrize("path", PAGES)
async def test_nobody_sees_a_page_without_a_login(path):
    app, failed, _ = filled_app()
    async with serving_dashboard(app) as browser:
        page = await browser.get(path.replace("id=x", f"id={failed.id}"))
        assert page.status == 401
        assert failed.id not in page.text
        assert "sample_tasks" not in page.text


@pytest.mark.parametrize("path", ACTIONS)
async def test_nobody_acts_without_a_login(path):
    app, failed, _ = filled_app()
    async with serving_dashboard(app) as browser:
        page = await browser.post(path, {"id": failed.id, "queue": "default", "csrf": "x", "count": "1"})
        assert page.status == 401
    assert app.queue.find(failed.id) is not None
    assert not app.queue.controls(now=0.0)


@pytest.mark.parametrize("path", ["", "style.css", "htmx.min.js", "login", "login?token=x", "nothing", "tasks"])
async def test_every_answer_has_the_headers(path):
    async with serving_dashboard(make_app()) as browser:
        for page in (await browser.get(path), await browser.post(path, {}), await browser.post(path, {}, headers={})):
            for name, value in HEADERS.items():
                assert page.headers.get(name) == value or (name == "Cache-Control" and path.endswith((".css", ".js")))
            assert "Server" not in page.headers or "Python" in page.headers["Server"]


async def test_a_login_link_logs_in_once_and_the_get_of_it_changes_nothing():
    async with serving_dashboard(make_app()) as browser:
        token = browser.site.sessions.new_login(ADMIN)
        for _ in range(3):  # a program that looks where a link leads
            page = await browser.get(f"login?token={token}")
            assert (page.status, page.cookies) == (200, [])
        assert (await browser.submit(page, "login")).status == 200
        assert (await browser.get()).status == 200
        browser.client.cookie_jar.clear()
        assert (await browser.post("login", {"token": token})).status == 403
        assert (await browser.get(f"login?token={token}")).status == 403
        assert (await browser.get()).status == 401


@pytest.mark.parametrize("headers", [
    {}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "none"},
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://{host}"},
])  # fmt: skip
async def test_another_site_neither_logs_in_nor_acts(headers):
    app, failed, _ = filled_app()
    async with serving_dashboard(app) as browser:
        host = browser.base.split("/")[2]
        headers = {name: value.format(host=host) for name, value in headers.items()}
        token = browser.site.sessions.new_login(ADMIN)
        assert (await browser.post("login", {"token": token}, headers=headers)).status == 403
        await browser.log_in()
        form = (await browser.get(f"task?id={failed.id}")).form("retry")
        assert (await browser.post("retry", form, headers=headers)).status == 403
        assert app.queue.find(failed.id) is not None
        assert (await browser.post("retry", form, headers={"Origin": f"http://{host}"})).status == 200
        assert app.queue.find(failed.id) is None


async def test_a_form_needs_the_field_of_its_session():
    app, failed, _ = filled_app()
    async with serving_dashboard(app) as browser, serving_dashboard(app) as other:
        await other.log_in()
        foreign = (await other.get(f"task?id={failed.id}")).form("retry")
        await browser.log_in()
        mine = (await browser.get(f"task?id={failed.id}")).form("retry")
        for csrf in ("", "x", foreign["csrf"], mine["csrf"][:-1], "é"):
            assert (await browser.post("retry", {**mine, "csrf": csrf})).status == 403
        assert (await browser.post("retry", {"id": failed.id})).status == 403
        assert app.queue.find(failed.id) is not None


@pytest.mark.parametrize(("type_", "body", "status"), [
    ("text/plain", b"csrf={csrf}&id={id}", 415),
    ("multipart/form-data; boundary=x", b"--x--", 415),
    ("application/json", b"{}", 415),
    ("application/x-www-form-urlencoded", b"csrf={csrf}&id=" + b"x" * 20_000, 413),
    ("application/x-www-form-urlencoded", b"&".join(b"a=1" for _ in range(50)), 400),
    ("application/x-www-form-urlencoded", b"csrf={csrf}&id=%ff", 400),
    ("application/x-www-form-urlencoded", b"\xff\xfe", 400),
])  # fmt: skip
async def test_what_is_no_small_form_is_refused(type_, body, status):
    app, failed, _ = filled_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        form = (await browser.get(f"task?id={failed.id}")).form("retry")
        body = body.replace(b"{csrf}", form["csrf"].encode()).replace(b"{id}", failed.id.encode())
        async with browser.client.post(
            f"{browser.base}retry", data=body, headers={**SAME, "Content-Type": type_}
        ) as response:
            assert response.status == status
        assert app.queue.find(failed.id) is not None


@pytest.mark.parametrize("path", ACTIONS)
async def test_a_get_does_nothing(path):
    app, failed, _ = filled_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        form = (await browser.get(f"task?id={failed.id}")).form("retry")
        query = f"csrf={form['csrf']}&id={failed.id}&queue=default&count=1&before=9999999999"
        assert (await browser.get(f"{path}?{query}")).status == 404
        assert (await browser.get()).status == 200
    assert app.queue.find(failed.id) is not None
    assert not app.queue.controls(now=0.0)


async def test_the_cookie_is_for_this_site_alone_and_no_script_reads_it():
    async with serving_dashboard(make_app()) as browser:
        async with browser.client.post(
            f"{browser.base}login",
            data={"token": browser.site.sessions.new_login(ADMIN)},
            headers=SAME,
            allow_redirects=False,
        ) as response:
            (cookie,) = response.headers.getall("Set-Cookie")
            assert response.headers["Location"] == "./"
        attributes = {part.strip().partition("=")[0].lower() for part in cookie.split(";")[1:]}
        assert attributes == {"httponly", "samesite", "max-age"}  # no path: the folder of the page, whatever its prefix
        assert "SameSite=Strict" in cookie


@pytest.mark.parametrize(("host", "headers", "secure"), [
    ("shop.example", SAME, True),
    ("shop.example", {"Origin": "http://shop.example"}, False),  # a browser sends no Sec-Fetch-Site by http
    ("localhost:8765", SAME, False),
    ("127.0.0.1:8765", SAME, False),
    ("[::1]:8765", SAME, False),
    ("localhost:8765", {**SAME, "X-Forwarded-Proto": "https", "Forwarded": "proto=https"}, False),
])  # fmt: skip
async def test_the_cookie_is_secure_where_the_browser_came_by_https(host, headers, secure):
    async with serving_dashboard(make_app()) as browser:
        async with browser.client.post(
            f"{browser.base}login", data={"token": browser.site.sessions.new_login(ADMIN)},
            headers={"Host": host, **headers}, allow_redirects=False,
        ) as response:  # fmt: skip
            assert response.status == 303
            assert ("Secure" in response.headers["Set-Cookie"]) is secure


async def test_a_session_that_logged_out_is_over_also_for_who_has_copied_it():
    async with serving_dashboard(make_app()) as browser:
        await browser.log_in()
        (cookie,) = (each.value for each in browser.client.cookie_jar)
        page = await browser.get()
        assert (await browser.submit(page, "logout")).status == 200
        browser.client.cookie_jar.clear()
        assert (await browser.get(cookies={"safedefer_dashboard": cookie})).status == 401


@pytest.mark.parametrize(
    "answer", [None, False, True, "ann", Access(user="ann", read=False, act=True), Access(user="a", read=[])]
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_what_authorize_does_not_allow_is_forbidden(answer, is_async):
    def authorize(_):
        return answer

    async def authorize_later(_):
        return answer

    async with serving_dashboard(make_app(), authorize_later if is_async else authorize) as browser:
        assert (await browser.get()).status == 403
        # No login link opens what authorize has closed.
        assert (await browser.post("login", {"token": browser.site.sessions.new_login(ADMIN)})).status == 403
        assert (await browser.get()).status == 403


async def test_an_authorize_that_raises_lets_nobody_in_and_shows_nothing(caplog):
    def authorize(_):
        raise KeyError("the secret session store")

    async with serving_dashboard(make_app(), authorize) as browser:
        page = await browser.get()
        assert page.status == 500
        assert "secret" not in page.text
    assert "secret" not in caplog.text


async def test_authorize_says_who_acts_in_every_request_and_a_form_is_of_one_person():
    app, failed, _ = filled_app()
    now = {"access": Access(user="ann", act=True)}
    async with serving_dashboard(app, lambda _: now["access"]) as browser:
        page = await browser.get(f"task?id={failed.id}")
        form = page.form("retry")
        assert "Log out" not in page.words
        now["access"] = Access(user="bob", act=True)
        assert (await browser.post("retry", form)).status == 403
        now["access"] = Access(user="ann", act=False)
        assert (await browser.post("retry", form)).status == 403
        now["access"] = Access(user="ann", act=["mail"])
        assert (await browser.post("retry", form)).status == 200
    assert app.queue.find(failed.id) is None


async def test_who_may_see_one_queue_sees_nothing_of_others():
    app, failed, done = filled_app()
    async with serving_dashboard(app) as browser:
        await browser.log_in(Access(user="ann", read=["default"], act=["default"]))
        for path in ("", "live", "tasks?state=dead", "dead", "queues", "system", f"tasks?q={failed.id}"):
            page = await browser.get(path)
            assert page.status == 200
            for secret in ("mail", failed.id, "sample_tasks:fail", "k1", "memory"):
                assert secret not in page.words.replace(f'value="{failed.id}"', ""), (path, secret)
        assert (await browser.get(f"task?id={failed.id}")).status == 404
        assert (await browser.get(f"task?id={done.id}")).status == 200
        csrf = (await browser.get()).form("logout")["csrf"]
        for path, fields, status in (
            ("retry", {"id": failed.id}, 404), ("discard", {"id": failed.id}, 404), ("cancel", {"id": failed.id}, 404),
            ("pause", {"queue": "mail"}, 403), ("purge", {"queue": "mail"}, 403), ("resume", {"queue": "mail"}, 403),
            ("retry-all", {"count": "0", "before": "9999999999"}, 200),
            ("discard-all", {"count": "1", "before": "9999999999"}, 409),
        ):  # fmt: skip
            assert (await browser.post(path, {**fields, "csrf": csrf})).status == status, path
    assert app.queue.find(failed.id) is not None
    assert not app.queue.controls(now=0.0)


async def test_what_may_be_looked_at_may_not_be_acted_on(caplog):
    app, failed, _ = filled_app()
    with caplog.at_level(logging.INFO, logger="safedefer.audit"):
        async with serving_dashboard(app) as browser:
            await browser.log_in(Access(user="ann"))
            for path in ("", "tasks", "dead", "queues", f"task?id={failed.id}"):
                page = await browser.get(path)
                assert 'method="post"' not in page.text.replace('method="post" action="logout"', ""), path
            csrf = page.form("logout")["csrf"]
            for path in ("retry", "discard", "cancel", "pause", "resume", "purge"):
                assert (await browser.post(path, {"id": failed.id, "queue": "mail", "csrf": csrf})).status == 403
            assert (await browser.get("system")).words.count("not allowed") == 6
    assert app.queue.find(failed.id) is not None
    assert [record.levelno for record in caplog.records if "not allowed" in record.getMessage()] == [
        logging.WARNING
    ] * 6


async def test_a_row_that_says_another_queue_than_its_token_opens_neither():
    """Whoever writes the storage may change the queue's name in a row; only the token is believed."""
    app = make_app()
    task = app.options(queue="secret").defer(sample_tasks.keywords, password="hunter2")
    bury(app, task)
    app.queue._state.ended[task.id] = replace(app.queue.find(task.id), queue="mail", records=())
    async with serving_dashboard(app) as browser:
        await browser.log_in(Access(user="ann", read=["mail"], act=["mail"]))
        page = await browser.get(f"task?id={task.id}")
        assert page.status == 200
        assert "hunter2" not in page.text
        assert (await browser.submit(page, "retry")).status == 403
        found = await browser.get("tasks?state=dead&q=hunter2")
        assert task.id not in found.text.replace("q=hunter2", "")
    assert app.queue.find(task.id) is not None


def test_an_application_whose_key_has_limits_has_no_dashboard():
    app = make_app(keyring=Keyring(Key("k1", bytes(range(60, 92)), queues=["mail"])))
    with pytest.raises(ConfigurationError, match="limited"):
        app.dashboard()


async def test_a_key_with_limits_opens_nothing():
    """Whoever may sign for one queue must not make a login link for the dashboard, where our own key signs."""
    from safedefer.dashboard.access import Sessions
    from tests.unit.apps import SECRET

    ours, limited = Key("k1", bytes(range(60, 92))), Key("img", SECRET, "verify_only", queues=["img"])
    app = make_app(keyring=Keyring(ours, limited))
    forged = Sessions(Keyring(Key("img", SECRET)), environment="test", clock=app._clock)
    async with serving_dashboard(app) as browser:
        assert (await browser.post("login", {"token": forged.new_login(ADMIN)})).status == 403
        cookie = forged.write(forged.new(ADMIN))
        assert (await browser.get(cookies={"safedefer_dashboard": cookie})).status == 401
