"""Links from a task's page to its trace."""

import pytest
from opentelemetry.sdk.trace import TracerProvider

from safedefer import App
from safedefer.errors import ConfigurationError
from safedefer.observe.trace_links import check_trace_url, trace_link
from safedefer.observe.tracing import Tracing
from safedefer.settings import Settings
from safedefer.token import encode_segment
from tests import sample_tasks
from tests.dashboard.served import serving_dashboard
from tests.unit.apps import SECRET, make_app

URL = "https://traces.example/trace/{trace_id}?tab=spans"


@pytest.mark.parametrize(
    "url", [URL, "http://localhost:16686/trace/{trace_id}", "https://t.example/#/traces/{trace_id}"]
)
def test_a_url_of_traces(url):
    assert check_trace_url(url) == url


@pytest.mark.parametrize("url", [
    "javascript:alert('{trace_id}')", "data:text/html,{trace_id}", "ftp://t.example/{trace_id}", "//t.example/{trace_id}", "/{trace_id}",
    "https://{trace_id}/", "https://{trace_id}.example/", "https://t.example/", "https://t.example/{trace_id}/{trace_id}",
    "https:///{trace_id}", "https://user:pw@t.example/{trace_id}", "https://t.example/{trace_id} x", "https://t.example/{trace_id}\n",
    'https://t.example/"{trace_id}', "https://t.example/{other}{trace_id}", "", "https://[::1/{trace_id}",
])  # fmt: skip
def test_what_is_no_url_of_traces_is_refused(url, monkeypatch):
    with pytest.raises(ConfigurationError, match="the URL of traces"):
        check_trace_url(url)
    with pytest.raises(ConfigurationError, match="the URL of traces"):
        make_app().dashboard(trace_url=url or "x")
    if url and "\n" not in url:
        monkeypatch.setenv("SAFEDEFER_TRACE_URL", url)
        with pytest.raises(ConfigurationError, match="SAFEDEFER_TRACE_URL"):
            Settings.load()


@pytest.mark.parametrize(
    "traceparent",
    [None, "", "x", "00-" + "g" * 32 + "-" + "1" * 16 + "-01", "\n00-" + "1" * 32 + "-" + "1" * 16 + "-01"],
)
def test_what_is_no_traceparent_has_no_link(traceparent):
    assert trace_link(URL, traceparent) == ""


async def page_of_a_traced_task(trace_url):
    app = make_app(tracing=Tracing(tracer_provider=TracerProvider()))
    task = app.defer(sample_tasks.add, 1)
    async with serving_dashboard(app, trace_url=trace_url) as browser:
        await browser.log_in()
        return await browser.get(f"task?id={task.id}"), app.authenticate(task.payload)["trace"]


async def test_the_page_of_a_task_links_to_its_trace():
    page, trace = await page_of_a_traced_task(URL)
    link = f"https://traces.example/trace/{trace.split('-')[1]}?tab=spans"
    assert f'<a href="{link}" rel="noreferrer noopener">{trace}</a>' in page.text
    page, trace = await page_of_a_traced_task(None)
    assert trace in page.text
    assert "traces.example" not in page.text


@pytest.mark.parametrize(
    ("text", "found"),
    [("1", "link"), ("TRUE", "link"), ("link", "link"), ("parent", "parent"), ("0", None), ("off", None)],
)
def test_settings_trace(monkeypatch, text, found):
    for name, value in {
        "KEYS": f"k1:{encode_segment(SECRET).decode()}", "POLICY": "tests.sample_tasks", "QUEUE": "memory://", "ENVIRONMENT": "test",
        "TRACING": text, "TRACE_URL": URL,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    app = App.from_settings()
    tracing = app.delivery_options.tracing
    assert (tracing and ("parent" if tracing._is_parent else "link")) == found
    assert app.trace_url == URL


def test_another_word_for_tracing_is_refused(monkeypatch):
    monkeypatch.setenv("SAFEDEFER_TRACING", "2")
    with pytest.raises(ConfigurationError, match="SAFEDEFER_TRACING"):
        Settings.load()
