"""What goes wrong can be seen in the log, in the metrics and on the dashboard, which is another process than the one at fault."""

import asyncio
import re
import secrets
import threading
import urllib.error
import urllib.request

import psycopg
import pytest

from safedefer import App, Key, Keyring, KeyState, Policy
from safedefer.queues.postgres.migrations import migrate
from tests import sample_tasks
from tests.acceptance.test_health import get
from tests.dashboard.served import ADMIN, serving_dashboard
from tests.postgres.server import fresh_database, shared_server
from tests.snippets import ROOT
from tests.unit.apps import JOSE, make_app, until

#: The fault, a line of the log, a sample of the metrics, words of the overview; and how the documentation names it.
FAULTS = [
    ("dispatch", "takes no connection", 'safedefer_target_down{target="http://127.0.0.1:1"} 1', "A handler is down.",
     "a handler is down"),
    ("run", "is dead", 'safedefer_dead_letters{queue="default"} 1', "Tasks died.", "a task is given up"),
    ("run", "rejected: shop_tasks:brand_new", 'safedefer_attempts_total{outcome="rejected"', "Code is missing here.",
     "version skew"),
    ("run", "request refused: unknown-key", 'safedefer_requests_refused_total{reason="unknown-key"} 1',
     "Somebody uses an unknown key.", "a stolen key"),
    ("run", "tasks are late", 'safedefer_queue_lag_seconds{queue="default"} ', "A queue falls behind.", "a lag grows"),
]  # fmt: skip
#: A task for a handler that is down, one that dies, one that only this version of the code has, and more than can run at once.
CALLS = """
import shop_tasks
from safedefer.deferred import defer
def brand_new(): pass
brand_new.__module__, shop_tasks.brand_new = "shop_tasks", brand_new
defer(shop_tasks.work, 1, _queue="other")
defer(shop_tasks.permanent)
defer(brand_new)
for number in range(9):
    defer(shop_tasks.held, number)
"""


class Watched:
    """A process with ``--health 0``: what it logs, and its metrics."""

    def __init__(self, process):
        self.said = ""
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stderr:
            self.said += line

    async def metrics(self):
        match = re.search(r"health: (http://127\.0\.0\.1:[0-9]+)/healthz", self.said)
        return "" if match is None else (await asyncio.to_thread(get, f"{match[1]}/metrics"))[1]


def key_of(project):
    return Keyring.from_text(project.environment["SAFEDEFER_KEYS"])


def post_with_a_foreign_key(url):
    foreign = make_app(keyring=Keyring(Key("k9", secrets.token_bytes(32), KeyState.ACTIVE)))
    token = foreign.defer(sample_tasks.add, 1).payload
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(urllib.request.Request(url, data=token, headers=JOSE), timeout=60)
    caught.value.close()


async def test_each_fault_is_in_the_log_in_the_metrics_and_on_the_dashboard(project):
    run, url = project.start("run", "--queue", "default", "--port", "0", "--health", "0", "--concurrency", "1")
    dispatch, _ = project.start(
        "dispatch", "--queue", "other", "--to", "http://127.0.0.1:1", "--health", "0", wait_for_line=False
    )
    watched = {"run": Watched(run), "dispatch": Watched(dispatch)}
    post_with_a_foreign_key(f"{url}/_ah/queue/deferred")
    project.python(CALLS)
    app = App(
        keyring=key_of(project),
        policy=Policy("shop_tasks"),
        queue=f"sqlite:///{project.folder}/tasks.db",
        environment="test",
    )
    async with serving_dashboard(app) as browser:
        await browser.log_in()
        for name, line, sample, words, _ in FAULTS:
            await until(lambda name=name, line=line: line in watched[name].said)
            async with asyncio.timeout(120.0):
                while sample not in await watched[name].metrics():  # noqa: ASYNC110  # it is asked by HTTP
                    await asyncio.sleep(0.1)
                while words not in (await browser.get()).words:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
    app.close()


async def test_a_role_without_rights_is_in_the_log_in_the_metrics_and_on_the_dashboard(project):
    server, role = shared_server(), f"safedefer_weak_{secrets.token_hex(4)}"
    with fresh_database(server) as name:
        dsn = server.dsn(name)
        await asyncio.to_thread(migrate, dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {role} LOGIN")
        try:
            weak = re.sub(r"//[^@/]*@", f"//{role}@", dsn)
            project.environment["SAFEDEFER_QUEUE"] = weak
            process, _ = project.start("dispatch", "--to", "http://127.0.0.1:1", "--health", "0", wait_for_line=False)
            watched = Watched(process)
            await until(lambda: "leasing failed" in watched.said and "give this role its rights" in watched.said)
            async with asyncio.timeout(120.0):
                while 'safedefer_queue_trouble{doing="leasing"} 1' not in await watched.metrics():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            app = App(keyring=key_of(project), policy=Policy("shop_tasks"), queue=weak, environment="test")
            async with serving_dashboard(app) as browser:
                await browser.post("login", {"token": browser.site.sessions.new_login(ADMIN)})
                page = await browser.get()
                assert page.status == 503
                assert "permission denied for schema safedefer" in page.words
            app.close()
            project.kill_all()
        finally:
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(f"DROP ROLE {role}")


def test_the_documentation_says_where_to_look_for_each_fault():
    text = (ROOT / "docs/how-to/observe.md").read_text()
    rows = {row.split("|")[1].strip(): row for row in text.splitlines() if row.startswith("| ")}
    for _, line, sample, words, named in FAULTS:
        (row,) = [row for name, row in rows.items() if name.startswith(named)]
        assert line.partition(" shop_tasks")[0].partition(": unknown")[0] in row, named
        assert sample.partition("{")[0] in row, named
        assert words.removesuffix(".") in row, named
