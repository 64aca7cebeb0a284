"""A dashboard that is served, a browser without JavaScript, and an application with something of each kind in it."""

import contextlib
import re
import time
from html import unescape
from urllib.parse import urlencode

from aiohttp import ClientSession, CookieJar, web

from safedefer.dashboard.access import Access
from safedefer.dashboard.site import Site
from safedefer.delivery.redaction import exception_type, redacted_traceback
from safedefer.ledger import AttemptRecord
from safedefer.queues.base import Settlement, Verdict
from safedefer.web.server import serving_application
from tests import sample_tasks
from tests.unit.apps import make_app

SAME = {"Sec-Fetch-Site": "same-origin"}
ADMIN = Access(user="ann", read=True, act=True)


def settle(app, task_ids, verdict, *, seconds=600.0, **more):
    """Lease what is due and settle those of some ids; the others fall due again."""
    now = time.time()
    leases = app.queue.lease(owner="w", limit=1_000, seconds=seconds, now=now)
    wanted = [lease for lease in leases if lease.task.id in task_ids]
    other = [lease for lease in leases if lease.task.id not in task_ids]
    app.queue.settle_many([(lease, Settlement(verdict=verdict, **more)) for lease in wanted], now=now)
    again = Settlement(verdict=Verdict.RETRY, at=now, charged=False, reason="busy")
    app.queue.settle_many([(lease, again) for lease in other], now=now)


def bury(app, *tasks, reason="retry-limit"):
    settle(app, {task.id for task in tasks}, Verdict.DEAD, reason=reason)


def record_failure(app, task, error=None):
    """Record an attempt that raised, as the handler does."""
    try:
        raise error or ValueError("the printer is on fire")
    except ValueError as raised:
        now, view = time.time(), app.queue.find(task.id)
        app.queue.ledger.record_many([
            AttemptRecord(
                task.id, view.audience, now - 2.5, now - 1.0, "retry", 500, "exception",
                exception_type(raised), redacted_traceback(raised),
            )
        ])  # fmt: skip


class Page:
    """An answer."""

    def __init__(self, response, text):
        self.status, self.headers, self.url, self.text = response.status, response.headers, response.url, text
        self.cookies = response.headers.getall("Set-Cookie", [])

    @property
    def words(self):
        """The text that a person reads."""
        text = re.sub(r"<(script|style).*?</\1>", "", self.text, flags=re.DOTALL)
        return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", text)))

    @property
    def links(self):
        return [unescape(each) for each in re.findall(r'(?:href|src|action)="([^"]*)"', self.text)]

    def form(self, action):
        """Return the fields of the first form of an action."""
        (form, *_) = re.findall(rf'<form method="post" action="{action}">(.*?)</form>', self.text, re.DOTALL)
        return {
            unescape(name): unescape(value)
            for name, value in re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', form)
        }


class Browser:
    """What a browser without JavaScript does: keeps cookies, follows links, posts forms."""

    def __init__(self, base, site):
        self.base, self.site = base, site
        self.client = ClientSession(cookie_jar=CookieJar(unsafe=True))

    async def get(self, path="", **options):
        async with self.client.get(f"{self.base}{path}", **options) as response:
            return Page(response, await response.text())

    async def post(self, path, fields, *, headers=SAME, **options):
        body = urlencode(fields)
        headers = {"Content-Type": "application/x-www-form-urlencoded", **headers}
        async with self.client.post(f"{self.base}{path}", data=body, headers=headers, **options) as response:
            return Page(response, await response.text())

    async def log_in(self, access=ADMIN):
        page = await self.post("login", {"token": self.site.sessions.new_login(access)})
        assert page.status == 200, page.words
        return page

    async def submit(self, page, action):
        """Send the first form of a page that has an action."""
        return await self.post(action, page.form(action))


@contextlib.asynccontextmanager
async def serving_dashboard(app, authorize=None, *, prefix="", clock=time.time, **options):
    """Serve the dashboard of an App below a prefix; yields a browser that has not logged in."""
    site = Site(app, authorize, clock, **options)
    web_app = site.application()
    if prefix:
        outer = web.Application()
        outer.add_subapp(prefix, web_app)
        web_app = outer
    async with serving_application(web_app, "127.0.0.1", 0) as url:
        browser = Browser(f"{url}{prefix or '/'}", site)
        async with browser.client:
            yield browser


def filled_app(**changes):
    """Return an App with waiting, running, dead and ended tasks in two queues."""
    app = make_app(**changes)
    failed = app.options(queue="mail").defer(sample_tasks.fail, "the printer is on fire")
    record_failure(app, failed)
    bury(app, failed)
    done = app.defer(sample_tasks.add, 1, 2)
    settle(app, {done.id}, Verdict.DONE)
    app.defer(sample_tasks.keywords, order=4711, lines=[{"sku": "a-1", "price": 3.5}], note="<b>bold</b>")
    app.options(queue="mail", countdown=3_600).defer(sample_tasks.add, 7)
    return app, failed, done
