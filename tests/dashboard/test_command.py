"""``safedefer dashboard``: a link that logs in once, here or at a dashboard that is mounted elsewhere."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import pytest
from click.testing import CliRunner

from safedefer.cli.dashboard import _Looked
from safedefer.cli.root import main
from safedefer.token import encode_segment
from tests import sample_tasks
from tests.dashboard.served import ADMIN, serving_dashboard
from tests.snippets import ROOT
from tests.unit.apps import SECRET, make_app


@pytest.fixture
def app(monkeypatch):
    app = make_app()
    monkeypatch.setattr("safedefer.cli.dashboard.load_app", lambda _: app)
    return app


@pytest.mark.parametrize(("words", "user", "acts"), [
    (["--user", "ann"], "ann", True), (["--user", "ann", "--read-only"], "ann", False),
])  # fmt: skip
async def test_a_link_logs_in_at_a_mounted_dashboard(app, words, user, acts):
    async with serving_dashboard(app, prefix="/tasks/") as browser:
        done = CliRunner().invoke(main, ["dashboard", "--link", browser.base, *words])
        assert done.exit_code == 0, done.output
        page = await browser.get(done.stdout.strip().removeprefix(browser.base))
        page = await browser.submit(page, "login")
        assert page.status == 200
        assert user in page.words
        assert ("(looks only)" not in page.words) is acts


@pytest.mark.parametrize("url", ["", "shop.example/tasks", "javascript:alert(1)", "ftp://shop.example/"])
def test_a_link_is_for_the_url_of_a_dashboard(app, url):
    done = CliRunner().invoke(main, ["dashboard", "--link", url])
    assert done.exit_code == 2
    assert "--link is the URL of the dashboard" in done.output


def test_the_command_serves_the_dashboard_until_it_is_stopped():
    key = f"k1:{encode_segment(SECRET).decode()}"
    settings = {
        "SAFEDEFER_KEYS": key, "SAFEDEFER_POLICY": "tests.sample_tasks", "SAFEDEFER_QUEUE": "memory://", "SAFEDEFER_ENVIRONMENT": "test",
    }  # fmt: skip
    command = [sys.executable, "-m", "safedefer", "dashboard", "--port", "0", "--user", "ann"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout])
    reader.start()
    try:
        assert "log in within 5 minutes, once, by" in lines.get(timeout=60)
        link = lines.get(timeout=60).strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/login\?token=[\w.~-]+", link)
        with urllib.request.urlopen(link, timeout=60) as answer:
            assert b'action="login"' in answer.read()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        reader.join(60)
        process.stdout.close()
        process.stderr.close()


async def test_looking_makes_no_file_and_one_that_comes_later_is_shown(tmp_path):
    app = make_app(queue=f"sqlite:///{tmp_path}/tasks.db")
    async with serving_dashboard(_Looked(app)) as browser:
        page = await browser.post("login", {"token": browser.site.sessions.new_login(ADMIN)})
        assert page.status == 503
        assert "tasks.db does not exist: no task was deferred into it yet" in page.words
        assert not list(tmp_path.iterdir())
        app.defer(sample_tasks.add, 1)
        page = await browser.get()
        assert page.status == 200
        assert "Waiting 1" in page.words
    app.close()
