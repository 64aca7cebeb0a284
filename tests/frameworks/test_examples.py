"""The examples behind the servers of their frameworks: a request defers a task, which comes back by HTTP and runs there."""

import re
import shutil
import sys
import types
from pathlib import Path

import pytest

from safedefer.testing import TestApp
from tests import sample_tasks
from tests.frameworks.servers import ROOT, Process, copied, get, post, until
from tests.snippets import FENCE
from tests.unit.apps import make_app

#: The server of each example, and the line that says where it listens.
SERVERS = {
    "aiohttp": (("aiohttp.web", "-H", "127.0.0.1", "-P", "0", "shop:make_app"), r"Running on (http://[\d.:]+)"),
    "fastapi": (("uvicorn", "shop:api", "--port", "0"), r"running on (http://[\d.:]+)"),
    "flask": (
        ("gunicorn", "--bind", "127.0.0.1:0", "--threads", "4", "shop:web"),
        r"Listening at: (http://[\d.:]+)",
    ),
}


@pytest.mark.parametrize("example", SERVERS)
def test_a_request_defers_a_task_that_is_delivered_to_the_server(tmp_path, example):
    folder = copied(example, tmp_path)
    command, listening = SERVERS[example]
    with Process(folder, *command) as server:
        url = server.until(listening)[1]
        assert post(f"{url}/pay/42")[0] == 202
        receipt = folder / "receipt-42.txt"
        assert not receipt.exists()
        with Process(folder, "safedefer", "dispatch", "shop:app", "--to", url) as dispatcher:
            until(receipt.exists, dispatcher)
            until(lambda: receipt.read_text().startswith("Thank you for order 42"), server)


@pytest.mark.parametrize("example", SERVERS)
def test_the_how_to_shows_the_example(example):
    page = (ROOT / f"docs/how-to/{example}.md").read_text()
    assert (ROOT / f"examples/{example}/shop.py").read_text() in page
    for command in SERVERS[example][0][:1]:
        assert command in page
        assert command in (ROOT / f"examples/{example}/README.md").read_text()


def test_the_how_to_for_django_shows_the_example():
    page = (ROOT / "docs/how-to/django.md").read_text()
    shown = [re.match(r"# (shop/\w+\.py)\n(.*)", found["text"], re.DOTALL) for found in FENCE.finditer(page)]
    assert [found[1] for found in shown if found] == ["shop/settings.py", "shop/tasks.py", "shop/urls.py"]
    for name, text in (found.groups() for found in shown if found):
        lines = iter((ROOT / "examples/django" / name).read_text().splitlines())
        assert [line for line in text.splitlines() if line not in lines] == [], "all its lines, in this order"


def test_the_factory_of_the_how_to_for_flask(monkeypatch):
    page = (ROOT / "docs/how-to/flask.md").read_text()
    (factory,) = [found["text"] for found in FENCE.finditer(page) if "def create_app" in found["text"]]
    shop = types.ModuleType("shop")
    shop.app, shop.send_receipt = make_app(), sample_tasks.add
    monkeypatch.setitem(sys.modules, "shop", shop)
    names = {}
    exec(compile(factory, "flask.md", "exec"), names)
    with TestApp(shop.app) as kit:
        assert names["create_app"]().test_client().post("/pay/42").status_code == 202
        kit.assert_deferred(shop.send_receipt, 42)


@pytest.fixture(scope="module")
def migrated(tmp_path_factory):
    folder = copied("django", tmp_path_factory.mktemp("migrated"))
    with Process(folder, "manage", "migrate") as migrate:
        migrate.until("Applying shop.0001_initial... OK")
        migrate.ends()
    return folder


@pytest.mark.parametrize(
    ("command", "listening"),
    [
        (("manage", "runserver", "127.0.0.1:0", "--noreload"), r"server at (http://[\d.:]+)"),
        (("gunicorn", "--bind", "127.0.0.1:0", "--threads", "4", "shop.wsgi"), r"Listening at: (http://[\d.:]+)"),
        (("uvicorn", "shop.asgi:application", "--port", "0", "--lifespan", "off"), r"running on (http://[\d.:]+)"),
    ],
    ids=["runserver", "gunicorn", "uvicorn"],
)
def test_django_enqueues_with_a_transaction_and_receives_the_task(tmp_path, migrated, command, listening):
    folder = Path(shutil.copytree(migrated, tmp_path / "django"))
    with Process(folder, *command) as server:
        url = server.until(listening)[1]
        status, order = post(f"{url}/pay")
        assert status == 202
        assert get(f"{url}/receipt/{order.strip()}") == ""
        with Process(folder, "manage", "safedefer", "dispatch", "--to", url) as dispatcher:
            until(lambda: get(f"{url}/receipt/{order.strip()}").startswith("Thank you"), dispatcher)
