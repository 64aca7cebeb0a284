"""A Django project whose tests use the kit: ``TestCase`` holds a transaction on its connection all the while."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FILES = {
    "settings.py": """
import os
SECRET_KEY = "of a test"
INSTALLED_APPS = ["shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db", "TEST": {"NAME": os.environ["TEST_DB"] or None}}}
""",
    "shop/__init__.py": "",
    "shop/models.py": """
from django.db import models

class Order(models.Model):
    shipped = models.BooleanField(default=False)
""",
    "shop/tasks.py": """
import secrets
import safedefer
from safedefer import Key, Keyring, Policy

app = safedefer.App(
    keyring=Keyring(Key("k1", secrets.token_bytes(32))), policy=Policy("shop.tasks"), queue="sqlite:///tasks.db"
)

def ship(pk):
    from shop.models import Order
    Order.objects.filter(pk=pk).update(shipped=True)
    assert Order.objects.get(pk=pk).shipped

async def ship_async(pk):
    from shop.models import Order
    order = await Order.objects.aget(pk=pk)
    order.shipped = True
    await order.asave()

def ship_with_transaction(pk):
    from django.db import connection, transaction
    with transaction.atomic(), app.transaction(connection):
        app.options(transactional=True).defer(ship, pk)
""",
    "shop/tests.py": """
from django.db import connection, transaction
from django.test import TestCase, TransactionTestCase
from safedefer import BadTransactionStateError
from safedefer.testing import DeferTestMixin
from shop.models import Order
from shop.tasks import app, ship, ship_async, ship_with_transaction

later = app.options(transactional=True)

class Both(DeferTestMixin):
    safedefer_app = app

    def check(self, *orders):
        self.assertEqual({one.outcome for one in self.tasks.run_due()}, {"succeeded"})
        for order in orders:
            order.refresh_from_db()
            self.assertTrue(order.shipped)

    def test_a_task_sees_the_rows_of_the_test(self):
        one, two = Order.objects.create(), Order.objects.create()
        app.defer(ship, one.pk)
        app.defer(ship_async, two.pk)
        self.check(one, two)

    def test_with_the_transaction(self):
        with transaction.atomic(), app.transaction(connection):
            one = Order.objects.create()
            later.defer(ship, one.pk)
            self.tasks.refute_deferred(ship)
        self.tasks.assert_deferred(ship, one.pk)
        with app.transaction(connection):
            two = Order.objects.create()
            later.defer(ship, two.pk)
        self.check(one, two)

    def test_a_transaction_that_is_undone(self):
        for block in (lambda: transaction.atomic(), lambda: app.transaction(connection)):
            with self.assertRaises(ZeroDivisionError), block(), app.transaction(connection):
                later.defer(ship, Order.objects.create().pk)
                1 / 0
        self.assertEqual(Order.objects.count(), 0)
        self.tasks.refute_deferred(ship)
        self.assertEqual(self.tasks.run_due(), [])
        with self.assertRaises(BadTransactionStateError):
            later.defer(ship, 1)

    def test_a_task_defers_with_its_own_transaction(self):
        one = Order.objects.create()
        app.defer(ship_with_transaction, one.pk)
        self.check(one)

    def test_once(self):
        for first in (True, False):
            with app.once(connection, "effect") as had:
                self.assertEqual(had, first)

    async def test_async(self):
        one, two = await Order.objects.acreate(), await Order.objects.acreate()
        await app.defer_async(ship, one.pk)
        await app.defer_async(ship_async, two.pk)
        self.assertEqual(len(await self.tasks.run_due_async()), 2)
        self.assertEqual(await Order.objects.filter(shipped=True).acount(), 2)

class InTestCase(Both, TestCase):
    pass

class InTransactionTestCase(Both, TransactionTestCase):
    pass

class Inline(DeferTestMixin, TestCase):
    safedefer_app = "shop.tasks:app"
    safedefer_inline = True

    def test_it_runs_at_once_in_the_transaction_of_the_test(self):
        order = Order.objects.create()
        app.defer(ship, order.pk)
        order.refresh_from_db()
        self.assertTrue(order.shipped)
""",
}


@pytest.mark.parametrize("database", ["", "test.db"], ids=["memory", "file"])
def test_tests_of_django_run_tasks_in_their_transaction(tmp_path, database):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SAFEDEFER_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django", "test", "--settings", "settings"],
        cwd=tmp_path, env={**kept, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT))), "TEST_DB": database},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Ran 13 tests" in done.stderr
    assert not list(tmp_path.glob("tasks.db*"))
