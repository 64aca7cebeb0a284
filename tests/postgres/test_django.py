"""Tasks that use Django's ORM: a disconnect by the server costs one task at most, and the command line sets Django up.

Each test has processes of its own, since Django's settings are those of a process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.postgres.server import fresh_database, shared_server

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
import os

SECRET_KEY = "django-secret"
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {
    "ENGINE": "django.db.backends.postgresql", "CONN_MAX_AGE": None,
    "CONN_HEALTH_CHECKS": bool(os.environ.get("SHOP_CHECKS")), "NAME": os.environ["SHOP_NAME"],
    "HOST": os.environ["SHOP_HOST"], "USER": "postgres",
}}
"""
MODELS = """
from django.db import models

class Order(models.Model):
    paid = models.BooleanField(default=False)
"""
TASKS = """
import safedefer
from django.db import connection
from safedefer import Key, Keyring, KeyState, Policy
from shop.models import Order

SEEN = []

def pay():
    connection.ensure_connection()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        SEEN.append(cursor.fetchone()[0])

async def pay_later():
    from asgiref.sync import sync_to_async

    await sync_to_async(pay)()

def returns_awaitable():
    return pay_later()

app = safedefer.App(
    keyring=Keyring(Key("k1", bytes(range(32)), KeyState.ACTIVE)), policy=Policy("shop.tasks"), queue="memory://",
    environment="test", concurrency=1,
)
"""
WORK = """
import asyncio, json, sys, time

from safedefer.cli.common import load_app

app = load_app("shop.tasks:app")
import psycopg
from shop import tasks

async def main():
    outcomes = []
    for _ in range(4):
        _, headers, _ = await app.handle({"Content-Type": "application/jose"}, app.serialize(getattr(tasks, sys.argv[1])))
        outcomes.append(headers["Safedefer-Outcome"])
        with psycopg.connect(sys.argv[2], autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 30000)", (tasks.SEEN[-1],))
    return outcomes

print(json.dumps([asyncio.run(main()), len(set(tasks.SEEN))]))
app.close()
"""


@pytest.fixture(scope="module")
def database():
    with fresh_database(shared_server()) as name:
        yield name


@pytest.fixture
def run(tmp_path, database):
    shop = tmp_path / "shop"
    shop.mkdir()
    for name, text in {"__init__": "", "settings": SETTINGS, "models": MODELS, "tasks": TASKS}.items():
        (shop / f"{name}.py").write_text(text)
    server = shared_server()
    dsn = server.dsn(database)

    def run(*arguments, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SAFEDEFER_", "DJANGO_"))}
        host = dsn.partition("host=")[2].partition("&")[0]
        kept |= {"PYTHONPATH": str(ROOT), "SHOP_NAME": database, "SHOP_HOST": host.replace("%2F", "/")}
        command = [sys.executable, *(argument.replace("{dsn}", dsn) for argument in arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=kept | environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


# As in requests: without health checks, Django looks at a connection after a query has failed.
@pytest.mark.parametrize(("checks", "outcomes"), [("1", ["succeeded"] * 4), ("", ["succeeded", "retry"] * 2)])
@pytest.mark.parametrize("task", ["pay", "pay_later", "returns_awaitable"])
def test_after_the_server_disconnects_the_thread_connects_again(run, task, checks, outcomes):
    done = run("-c", WORK, task, "{dsn}", DJANGO_SETTINGS_MODULE="shop.settings", SHOP_CHECKS=checks)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [outcomes, outcomes.count("succeeded")]


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"DJANGO_SETTINGS_MODULE": "shop.settings"}, 0, ""),
        ({}, 1, "needs Django, which is not set up; set DJANGO_SETTINGS_MODULE"),
        (
            {"DJANGO_SETTINGS_MODULE": "shop.nothing"},
            1,
            "Django cannot be set up with DJANGO_SETTINGS_MODULE='shop.nothing'",
        ),
    ],
)
def test_the_command_line_sets_django_up(run, settings, status, said):
    done = run("-m", "safedefer", "tasks", "list", "--app", "shop.tasks:app", **settings)
    assert (done.returncode == 0) is (status == 0), done.stderr
    assert said in done.stderr


def test_nothing_of_django_is_loaded_where_nobody_uses_it(run):
    done = run(
        "-c",
        "import asyncio, sys\n"
        "from tests.unit.apps import make_app, JOSE\n"
        "from tests import sample_tasks\n"
        "app = make_app()\n"
        "asyncio.run(app.handle(JOSE, app.serialize(sample_tasks.add_later, 1)))\n"
        "assert sample_tasks.RAN and 'django' not in sys.modules and 'asgiref' not in sys.modules\n",
    )
    assert done.returncode == 0, done.stderr
