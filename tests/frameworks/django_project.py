"""A Django project for ``test_django.py``: its files, by name. Its own tests are run by Django."""

FILES = {
    "settings.py": """
import os
SECRET_KEY = "of a test"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "shop", "safedefer.frameworks.django"]
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware", "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware", "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "shop.reads.Reads",
]
ROOT_URLCONF = "shop.urls"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db", "ATOMIC_REQUESTS": True,
    },
}
_BACKEND = "safedefer.frameworks.django.backend.SafedeferBackend"
TASKS = {
    "default": {"BACKEND": _BACKEND, "QUEUES": ["default", "mail"]},
    "at-once": {"BACKEND": _BACKEND, "OPTIONS": {"TRANSACTIONAL": False}},
}
CONTEXT = "django.tasks.base:TaskContext" if __import__("django").VERSION >= (6,) else "django_tasks.base:TaskContext"
SAFEDEFER = {
    "KEYS": os.environ["TEST_KEY"], "POLICY": ["shop.tasks", CONTEXT], "QUEUE": "sqlite:///tasks.db", "QUEUES": ["default", "mail"],
    "ENVIRONMENT": "test",
}
""",
    "shop/__init__.py": "",
    "shop/models.py": """
from django.db import models

class Order(models.Model):
    shipped = models.BooleanField(default=False)
""",
    "shop/reads.py": """
class Reads:
    "A middleware that reads the body as a header says."
    sync_capable = async_capable = True

    def __init__(self, get_response):
        from asgiref.sync import iscoroutinefunction, markcoroutinefunction
        self.get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request):
        how = request.headers.get("X-Reads")
        if how in {"body", "body and rest"}:
            request.body
        if how in {"all", "body and rest"}:
            request.read()
        elif how == "first":
            request.read(5)
        return self.get_response(request)
""",
    "shop/urls.py": """
from django.urls import include, path
from safedefer.frameworks.django.dashboard import dashboard_urls
urlpatterns = [path("accounts/tasks/", include(dashboard_urls())), path("", include("safedefer.frameworks.django.urls")), path("in/", include("safedefer.frameworks.django.urls"))]
""",
    "shop/tasks.py": """
try:
    from django.tasks import task
except ModuleNotFoundError:
    from django_tasks import task
from safedefer import TaskRetryOptions

SEEN = []

@task
def ship(pk):
    from shop.models import Order
    Order.objects.filter(pk=pk).update(shipped=True)

@task(queue_name="mail", deadline=30, retry_options=TaskRetryOptions(task_retry_limit=2), unique=True)
async def ship_later(pk):
    from shop.models import Order
    await Order.objects.filter(pk=pk).aupdate(shipped=True)

@task(takes_context=True)
def with_context(context, number):
    SEEN.append((context.attempt, context.task_result.id, context.task_result.args, context.task_result.task is with_context, number))
    if context.attempt == 1:
        raise ValueError("again")

@task
def keeps(value):
    SEEN.append(value)

@task(backend="at-once")
def at_once(): ...

def undecorated(): ...
""",
    "shop/tests.py": """
import contextlib, datetime, io, re
from unittest.mock import ANY, patch

import django
from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.db import connection, transaction
from django.test import AsyncClient, SimpleTestCase, TestCase, TransactionTestCase, override_settings
from django.utils import timezone

import safedefer
from safedefer import ConfigurationError, deferred
from safedefer.cli.common import is_of_settings
from safedefer.codecs.registry import REGISTRY
from safedefer.frameworks.django import app, backend
from safedefer.frameworks.django.apps import check_configuration
from safedefer.frameworks.django import conf
from safedefer.testing import DeferTestMixin
from shop import tasks
from shop.models import Order

library = __import__("django.tasks" if django.VERSION >= (6,) else "django_tasks", fromlist=["x"])
Invalid, enqueued = backend._InvalidTask, backend._signals.task_enqueued
JOSE = {"Content-Type": "application/jose"}
URL = "/_ah/queue/deferred"
FORM = "application/x-www-form-urlencoded"

class Both(DeferTestMixin):
    safedefer_app = "safedefer.frameworks.django:app"

    def setUp(self):
        super().setUp()
        tasks.SEEN.clear()

    def check(self, *orders):
        self.assertEqual({one.outcome for one in self.tasks.run_due()}, {"succeeded"})
        for order in orders:
            order.refresh_from_db()
            self.assertTrue(order.shipped)

    def test_a_task_outside_a_transaction(self):
        order = Order.objects.create()
        told = []
        enqueued.connect(receiver := lambda task_result, **_: told.append(task_result))
        result = tasks.ship.enqueue(order.pk)
        enqueued.disconnect(receiver)
        self.assertEqual((result.status, result.args, told), ("READY", [order.pk], [result]))
        self.assertEqual(self.tasks.assert_deferred(tasks.ship, order.pk).id, result.id)
        self.assertIsNotNone(result.enqueued_at)
        self.check(order)

    def test_a_task_goes_with_the_transaction(self):
        with transaction.atomic():
            order = Order.objects.create()
            result = tasks.ship.enqueue(order.pk)
            self.tasks.refute_deferred(tasks.ship)
            with self.assertRaises(ZeroDivisionError), transaction.atomic():
                tasks.ship.enqueue(Order.objects.create().pk)
                1 / 0
        self.assertEqual(self.tasks.assert_deferred(tasks.ship).id, result.id)
        self.check(order)
        self.assertEqual(len(self.tasks.deferred_tasks), 1)

    def test_a_transaction_that_is_undone_takes_its_task_along(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            tasks.ship.enqueue(Order.objects.create().pk)
            1 / 0
        self.tasks.refute_deferred(tasks.ship)

    def test_a_backend_that_enqueues_at_once(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            tasks.at_once.enqueue()
            1 / 0
        self.tasks.assert_deferred(tasks.at_once)

    def test_options(self):
        later = timezone.now() + datetime.timedelta(hours=1)
        tasks.ship.using(run_after=later, queue_name="mail", headers={"X-Shop": "1"}).enqueue(1)
        task = self.tasks.assert_deferred(tasks.ship, 1, queue="mail", eta=later)
        self.assertEqual(task.headers["X-Shop"], "1")
        first, again = tasks.ship_later.enqueue(1), tasks.ship_later.enqueue(1)
        self.assertEqual(first.id, again.id)
        self.assertEqual(self.tasks.assert_deferred(tasks.ship_later, queue="mail").retry_options.task_retry_limit, 2)

    def test_what_is_refused(self):
        with self.assertRaises(Invalid):
            tasks.ship.using(queue_name="other")
        with self.assertRaises(Invalid):
            tasks.ship.using(priority=3)
        with self.assertRaisesRegex(Invalid, "deadline"):
            tasks.ship.using(deadline=-1)
        with self.assertRaises(Invalid):
            library.task(lambda: None)
        with self.assertRaises(TypeError):
            tasks.ship.enqueue(object())
        with self.assertRaises(TypeError):
            tasks.ship.enqueue(1, 2)
        with self.assertRaises(NotImplementedError):
            tasks.ship.get_result("1")
        self.assertEqual(self.tasks.deferred_tasks, [])

    def test_arguments_are_json(self):
        tasks.keeps.enqueue((1, {"x": (2,)}))
        self.tasks.run_due()
        self.assertEqual(tasks.SEEN, [[1, {"x": [2]}]])

    def test_a_task_gets_its_context(self):
        result = tasks.with_context.enqueue(7)
        self.tasks.assert_deferred(tasks.with_context, ANY, 7)
        self.tasks.run_due(raises=False)
        self.tasks.clock.advance(3600)
        self.tasks.run_due()
        self.assertEqual(tasks.SEEN, [(1, result.id, [7], True, 7), (2, result.id, [7], True, 7)])

    def test_a_context_that_a_holder_of_a_key_forges(self):
        (entry,) = [entry for entry in REGISTRY._tags.values() if entry.cls is backend._base.TaskContext]
        good = {"task": "shop.tasks:with_context", "args": [], "kwargs": {}, "backend": "default"}
        self.assertIs(entry.decode(good).task_result.task, tasks.with_context)
        for name in ("shop.tasks:undecorated", "shop.tasks:none", "os:path", "no.module:x", "shop.tasks"):
            with self.assertRaisesRegex(ValueError, "no task"):
                entry.decode({**good, "task": name})
        for parts in ([], {}, {**good, "more": 1}, {**good, "args": ()}):
            with self.assertRaisesRegex(ValueError, "a context has"):
                entry.decode(parts)

    async def test_async(self):
        order = await Order.objects.acreate()
        await tasks.ship_later.aenqueue(order.pk)
        await self.tasks.run_due_async()
        self.assertTrue((await Order.objects.aget()).shipped)

    def test_the_view_under_wsgi(self):
        task = app.defer(tasks.keeps, 1)
        self.client.handler.enforce_csrf_checks = True
        for mount in ("", "/in"):
            answer = self.client.post(mount + task.url, task.payload, content_type=JOSE["Content-Type"])
            self.assertEqual((answer.status_code, answer["Safedefer-Outcome"]), (200, "duplicate" if mount else "succeeded"))
        self.assertEqual(self.client.get(URL).status_code, 405)
        self.assertEqual(self.client.post(URL, b"x" * 2_000_000, content_type=JOSE["Content-Type"]).status_code, 413)

    async def test_the_view_under_asgi(self):
        task = await app.defer_async(tasks.keeps, 1)
        client = AsyncClient(enforce_csrf_checks=True)
        for mount in ("", "/in"):
            answer = await client.post(mount + task.url, task.payload, content_type=JOSE["Content-Type"])
            self.assertEqual((answer.status_code, answer["Safedefer-Outcome"]), (200, "duplicate" if mount else "succeeded"))
        self.assertEqual((await client.get(URL)).status_code, 405)
        self.assertEqual((await client.post(URL, b"x" * 2_000_000, content_type=JOSE["Content-Type"])).status_code, 413)

    READ = [("body", "succeeded"), ("body and rest", "succeeded"), ("all", "busy"), ("first", "busy")]

    def test_a_middleware_that_reads_the_body_under_wsgi(self):
        for how, outcome in self.READ:
            task = app.defer(tasks.keeps, how)
            answer = self.client.post(task.url, task.payload, content_type=JOSE["Content-Type"], headers={"X-Reads": how})
            self.assertEqual((how, answer["Safedefer-Outcome"]), (how, outcome))
        self.assertEqual(tasks.SEEN, ["body", "body and rest"])

    async def test_a_middleware_that_reads_the_body_under_asgi(self):
        for how, outcome in self.READ:
            task = await app.defer_async(tasks.keeps, how)
            answer = await AsyncClient().post(task.url, task.payload, content_type=JOSE["Content-Type"], headers={"X-Reads": how})
            self.assertEqual((how, answer["Safedefer-Outcome"]), (how, outcome))
        self.assertEqual(tasks.SEEN, ["body", "body and rest"])

class InTestCase(Both, TestCase):
    pass

class InTransactionTestCase(Both, TransactionTestCase):
    pass

@override_settings(PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"])
class Dashboard(DeferTestMixin, TransactionTestCase):
    safedefer_app = "safedefer.frameworks.django:app"
    SAME = {"Sec-Fetch-Site": "same-origin"}

    def log_in(self, **what):
        user = get_user_model().objects.create_user("ann", password="x", **what)
        self.client.force_login(user)

    def field(self, page):
        return re.search(r'name="csrf" value="([^"]+)"', page.content.decode())[1]

    def test_a_superuser_sees_and_acts(self):
        self.log_in(is_superuser=True)
        tasks.ship.enqueue(1)
        overview = self.client.get("/accounts/tasks/")
        self.assertEqual(overview.status_code, 200)
        self.assertIn("default-src 'none'", overview["Content-Security-Policy"])
        self.assertIn("shop.tasks:ship", self.client.get("/accounts/tasks/tasks?state=waiting").content.decode())
        self.assertEqual(self.client.get("/accounts/tasks/style.css")["Content-Type"], "text/css; charset=utf-8")
        queues = self.client.get("/accounts/tasks/queues")
        urlencoded = f"csrf={self.field(queues)}&queue=default"
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}, {}):
            self.assertEqual(self.client.post("/accounts/tasks/pause", urlencoded, FORM, headers=headers).status_code, 403)
        self.assertEqual(self.client.post("/accounts/tasks/pause", "queue=default", FORM, headers=self.SAME).status_code, 403)
        self.assertFalse(any(each.paused for each in app.queue.controls(now=self.tasks.clock())))
        self.assertIn(self.client.post("/accounts/tasks/pause", urlencoded, FORM, headers=self.SAME).status_code, (200, 303))
        self.assertEqual([each.queue for each in app.queue.controls(now=self.tasks.clock()) if each.paused], ["default"])

    def test_in_django_who_asks_is_who_django_says(self):
        self.assertRedirects(self.client.get("/accounts/tasks/"), "/accounts/login/?next=/accounts/tasks/", fetch_redirect_response=False)
        self.log_in(is_staff=True)
        for headers in ({}, {"Safedefer-Asked-By": ""}, {"Safedefer-Asked-By": "x"}):
            self.assertEqual(self.client.get("/accounts/tasks/", headers=headers).status_code, 403)
        self.assertEqual(self.client.get("/accounts/tasks/login?token=x").status_code, 403)
        self.assertEqual(self.client.get("/accounts/tasks/", QUERY_STRING="a b\\x0b%41").status_code, 403)

class WithoutOutbox(TransactionTestCase):
    '''A database whose tables nobody else can read: tasks are enqueued after the commit.'''

    def setUp(self):
        given = {**conf.settings.SAFEDEFER, "QUEUE": "memory://"}
        self.app = safedefer.App.from_settings(conf._settings(given))
        self.enterContext(patch.dict(conf._made, {"APP": self.app}))
        self.addCleanup(self.app.close)

    def test_of_another_kind(self):
        with patch.object(backend, "source_of", side_effect=safedefer.BadTransactionStateError("no outbox")):
            self.test_after_the_commit()

    def test_after_the_commit(self):
        with transaction.atomic():
            result = tasks.ship.enqueue(1)
            self.assertIsNone(self.app.queue.find(result.id))
            self.assertIsNone(result.enqueued_at)
        self.assertEqual(self.app.queue.find(result.id).callable_name, "shop.tasks:ship")
        self.assertIsNotNone(result.enqueued_at)

    def test_not_at_all(self):
        with self.assertRaises(ZeroDivisionError), transaction.atomic():
            result = tasks.ship.enqueue(1)
            1 / 0
        self.assertIsNone(self.app.queue.find(result.id))

class Settings(SimpleTestCase):
    def made(self, given):
        with override_settings(SAFEDEFER=given), patch.object(conf, "_made", {}):
            return conf.project_app()

    def test_the_app(self):
        self.assertIs(app, conf.project_app())
        self.assertIs(deferred.current_app(), app)
        self.assertEqual(app.environment, "test")
        self.assertIs(self.made({"APP": app}), app)
        from safedefer.frameworks import django as module
        with self.assertRaises(AttributeError):
            module.nothing

    def test_mistakes(self):
        for given, text in (
            ({"QUEU": "x"}, "did you mean QUEUE"), ([], "is a dict"), ({"APP": app, "QUEUE": "memory://"}, "stands alone"),
            ({"APP": "shop.tasks:none"}, "there is no"), ({"APP": "shop.tasks:ship"}, "no safedefer.App"), ({}, "SAFEDEFER_KEYS"),
        ):
            with self.subTest(text), self.assertRaisesRegex(ConfigurationError, text):
                self.made(given)

    def test_the_check(self):
        self.assertEqual(check_configuration(), [])
        with override_settings(SAFEDEFER={}), patch.object(conf, "_made", {}):
            (message,) = check_configuration()
        self.assertEqual((message.id, message.is_serious()), ("safedefer.W001", False))

    def test_unknown_options_of_the_backend(self):
        with self.assertRaisesRegex(safedefer.InvalidTaskError, "DATABASES"):
            backend.SafedeferBackend("default", {"OPTIONS": {"DATABASES": "x"}})

    def test_the_command(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            call_command("safedefer", "explain", "shop.tasks:ship")
        self.assertIn("shop.tasks:ship", out.getvalue())
        self.assertFalse(is_of_settings(), "doctor does not look for SAFEDEFER_POLICY in the environment")
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit):
            call_command("safedefer", "explain", "shop.models:Order")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            call_command("safedefer")
        self.assertIn("manage.py safedefer", out.getvalue())
""",
}
