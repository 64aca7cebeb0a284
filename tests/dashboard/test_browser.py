"""The dashboard in a real Chromium: every button clicked, nothing in the console, no violation that axe-core finds.

One browser for all of it. It is Debian's: no browser is downloaded.
"""

import gzip
import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from safedefer.events import RequestRefused, TargetDown
from safedefer.queues.base import DeadFilter, TaskState
from tests import sample_tasks
from tests.dashboard.served import ADMIN, bury, filled_app, record_failure, serving_dashboard

STATIC = Path(__import__("safedefer.dashboard").dashboard.__file__).with_name("static")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(__file__).with_name("axe") / "axe.min.js.gz"
SECONDS = 60.0


def test_htmx_is_the_one_that_was_vendored_with_its_licence():
    digest, name, version, number = (STATIC / "htmx.sha256").read_text().split()
    assert hashlib.sha256((STATIC / name).read_bytes()).hexdigest() == digest
    assert (version, number) == ("htmx.org", "4.0.1")
    assert "Zero-Clause BSD" in (STATIC / "htmx.LICENSE.txt").read_text()


async def no_violation(page, path):
    """Run axe-core in a world of its own, which the page's content security policy does not rule."""
    session = await page.context.new_cdp_session(page)
    frame = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
    world = (await session.send("Page.createIsolatedWorld", {"frameId": frame}))["executionContextId"]
    await session.send(
        "Runtime.evaluate", {"expression": gzip.decompress(AXE.read_bytes()).decode(), "contextId": world}
    )
    answer = await session.send("Runtime.evaluate", {
        "expression": "axe.run().then(r => JSON.stringify(r.violations.map(v => [v.id, v.nodes.map(n => n.html)])))",
        "contextId": world, "awaitPromise": True, "returnByValue": True,
    })  # fmt: skip
    assert answer["result"].get("value") == "[]", (path, answer)


def everything():
    """Return an App with something on every page."""
    app, failed, done = filled_app()
    more = [
        app.options(queue="mail").defer(sample_tasks.keywords, n=number, evil="<script>alert(1)</script>")
        for number in range(4)
    ]
    for task in more:
        record_failure(app, task, ValueError("<img src=x onerror=alert(1)>"))
    bury(app, *more, reason="age-limit")
    app.observers(TargetDown(address="http://10.0.0.7", reason="ConnectionRefusedError"))
    app.observers(RequestRefused(status=403, reason="bad-signature"))
    return app, failed, done


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; on Debian: apt-get install chromium")
async def test_every_button_works_in_a_browser_and_no_page_breaks_a_rule():
    from playwright.async_api import async_playwright

    app, failed, done = everything()
    waiting = app.options(countdown=3_000).defer(sample_tasks.add, 5)
    said = []
    async with serving_dashboard(app, prefix="/tasks/") as served, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SECONDS * 1_000
        )
        context = await browser.new_context(color_scheme="dark", viewport={"width": 390, "height": 844})
        context.set_default_timeout(SECONDS * 1_000)
        page = await context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))

        await page.goto(f"{served.base}login?token={served.site.sessions.new_login(ADMIN)}")
        await page.get_by_role("button", name="Log in").click()
        await page.wait_for_url(served.base)

        # Every page, dark and light, on a phone and on a desk.
        app.queue.pause("default", paused=True, now=time.time())
        pages = [
            "", "tasks?state=dead&q=a", "tasks?state=succeeded", f"task?id={failed.id}", f"task?id={waiting.id}", "dead", "queues",
            "system", f"confirm?do=discard&id={failed.id}",
        ]  # fmt: skip
        for number, path in enumerate(pages):
            await page.emulate_media(color_scheme="light" if number % 2 else "dark")
            await page.set_viewport_size({"width": 1_280 if number % 3 else 390, "height": 844})
            await page.goto(f"{served.base}{path}")
            wide = await page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
            assert not wide, path
            await no_violation(page, path)
        await page.emulate_media(color_scheme="light")
        await page.goto(served.base)
        await no_violation(page, "light overview")

        # The overview is live: htmx fetches its part again.
        async with page.expect_response(
            lambda response: response.url.endswith("/tasks/live"), timeout=SECONDS * 1_000
        ) as live:
            pass
        assert (await live.value).status == 200

        async def click(name, path=None, role="button"):
            if path is not None:
                await page.goto(f"{served.base}{path}")
            await page.get_by_role(role, name=name, exact=True).first.click()
            await page.wait_for_load_state("load")
            return await page.inner_text("main")

        assert "The queue goes on." in await click("Resume default", "queues")
        assert "The queue is paused" in await click("Pause mail")
        assert "Runs again: 1." in await click("Retry with the same arguments", f"task?id={failed.id}")
        await click("Cancel…", f"task?id={waiting.id}", role="link")
        assert "Cancelled." in await click("Cancel it")
        assert app.queue.find(waiting.id).state is TaskState.CANCELLED
        dead = app.queue.dead_letters(DeadFilter())
        assert "Runs again: 1." in await click(f"Retry {dead[0].id}", "dead")
        await click("Discard…", f"task?id={dead[1].id}", role="link")
        assert "Discarded: 1." in await click("Discard it")
        await click("Discard all 2…", "dead?reason=age-limit", role="link")
        await click("No, go back", role="link")
        assert "Runs again: 2." in await click("Retry all 2", "dead?reason=age-limit")
        await click("Purge… mail", "queues", role="link")
        assert "Cancelled in the queue:" in await click("Purge mail")
        await page.goto(f"{served.base}tasks?state=succeeded")
        await page.get_by_role("searchbox").fill("sample_tasks:add")
        await click("Search")
        assert await page.get_by_role("link", name="sample_tasks:add").count() == 1
        assert (await page.inner_text("main")).count("succeeded") >= 1
        assert done.id in page.url or done.id in await page.inner_text("main")

        # By keyboard: the first stop leads past the navigation.
        await page.goto(served.base)
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.className") == "skip"
        assert "You are logged out." in await click("Log out")
        assert said == []
        await browser.close()
