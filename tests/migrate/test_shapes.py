"""Shapes of code that people write for App Engine's deferred, RQ and Celery: what becomes of each, and what is said of it."""

# ruff: noqa: ISC004  # a shape is lines
import ast

import pytest

from safedefer.migrate.code import migrate_code

#: Name, the code, what it becomes (None: it stays), and the codes of what is said, in their order, but for ``retries``.
SHAPES = [
    # --- App Engine: imports ---
    ("import", "from google.appengine.ext import deferred\ndeferred.defer(f, 1)", "from safedefer import deferred\ndeferred.defer(f, 1)", ""),
    ("alias", "from google.appengine.ext import deferred as d\nd.defer(f)", "from safedefer import deferred as d\nd.defer(f)", ""),
    ("with ndb", "from google.appengine.ext import deferred, ndb\ndeferred.defer(f)",
     "from safedefer import deferred\nfrom google.appengine.ext import ndb\ndeferred.defer(f)", ""),
    ("after ndb", "from google.appengine.ext import ndb, deferred  # two\n",
     "from safedefer import deferred  # two\nfrom google.appengine.ext import ndb\n", ""),
    ("in parentheses", "from google.appengine.ext import (\n    db,\n    deferred,\n    ndb,\n)\n",
     "from safedefer import deferred\nfrom google.appengine.ext import (\n    db,\n    ndb,\n)\n", ""),
    ("last in parentheses, with a comment", "from google.appengine.ext import (\n    db,\n    deferred,  # later\n)\n",
     "from safedefer import (\n    deferred,  # later\n)\nfrom google.appengine.ext import (\n    db,\n)\n", ""),
    ("names", "from google.appengine.ext.deferred import defer, PermanentTaskFailure\ndefer(f, _queue='q')",
     "from safedefer.deferred import defer, PermanentTaskFailure\ndefer(f, _queue='q')", ""),
    ("inner module", "from google.appengine.ext.deferred import deferred\ndeferred.defer(f)", "from safedefer import deferred\ndeferred.defer(f)", ""),
    ("innermost", "from google.appengine.ext.deferred.deferred import SingularTaskFailure\n",
     "from safedefer.deferred import SingularTaskFailure\n", ""),
    ("star", "from google.appengine.ext.deferred import *\n", "from safedefer.deferred import *\n", ""),
    ("spelt out", "import google.appengine.ext.deferred\ngoogle.appengine.ext.deferred.defer(f, 1)",
     "import safedefer.deferred\nsafedefer.deferred.defer(f, 1)", ""),
    ("import as", "import google.appengine.ext.deferred as later\nlater.defer(f)", "import safedefer.deferred as later\nlater.defer(f)", ""),
    ("in a function", "def go():\n    from google.appengine.ext import deferred\n    deferred.defer(f)\n",
     "def go():\n    from safedefer import deferred\n    deferred.defer(f)\n", ""),
    ("tried", "try:\n    from google.appengine.ext import deferred\nexcept ImportError:\n    deferred = None\n",
     "try:\n    from safedefer import deferred\nexcept ImportError:\n    deferred = None\n", ""),
    ("one line", "if X: from google.appengine.ext import deferred, db\n", "if X: from safedefer import deferred; from google.appengine.ext import db\n", ""),
    ("djangae", "from djangae.deferred import defer\ndefer(f, _small_task=True)", "from safedefer.deferred import defer\ndefer(f, _small_task=True)",
     "unknown-option"),
    ("private", "from google.appengine.ext.deferred import defer, _curry_callable\n",
     "from safedefer.deferred import defer\nfrom google.appengine.ext.deferred import _curry_callable\n", "private-name"),
    ("sqlalchemy's deferred is another", "from sqlalchemy.orm import deferred\nx = deferred(Column())", None, ""),
    # --- App Engine: options ---
    ("retry options", "from google.appengine.api import taskqueue\nfrom google.appengine.ext import deferred\n"
     "deferred.defer(f, _retry_options=taskqueue.TaskRetryOptions(task_retry_limit=2))",
     "from safedefer import deferred\ndeferred.defer(f, _retry_options=deferred.TaskRetryOptions(task_retry_limit=2))", ""),
    ("retry options in a constant", "from google.appengine.api import taskqueue\nfrom google.appengine.ext import deferred\n"
     "ONCE = taskqueue.TaskRetryOptions(task_retry_limit=0)\ndeferred.defer(f, _retry_options=ONCE)",
     "from safedefer import deferred\nONCE = deferred.TaskRetryOptions(task_retry_limit=0)\ndeferred.defer(f, _retry_options=ONCE)", ""),
    ("retry options imported", "from google.appengine.api.taskqueue import TaskRetryOptions\nfrom google.appengine.ext.deferred import defer\n"
     "defer(f, _retry_options=TaskRetryOptions(max_doublings=1))",
     "from safedefer.deferred import defer\nfrom safedefer import deferred\ndefer(f, _retry_options=deferred.TaskRetryOptions(max_doublings=1))", ""),
    ("exists", "from google.appengine.api import taskqueue\nfrom google.appengine.ext import deferred\n"
     "try:\n    deferred.defer(f, _name='x')\nexcept taskqueue.TaskAlreadyExistsError:\n    pass\n",
     "from safedefer import deferred\ntry:\n    deferred.defer(f, _name='x')\nexcept deferred.TaskAlreadyExistsError:\n    pass\n", ""),
    ("several errors", "from google.appengine.api import taskqueue\nfrom google.appengine.ext import deferred\n"
     "try:\n    deferred.defer(f, _name='x')\nexcept (taskqueue.TombstonedTaskError, taskqueue.TransientError) as e:\n    log(e)\n",
     "from safedefer import deferred\ntry:\n    deferred.defer(f, _name='x')\nexcept (deferred.TombstonedTaskError, deferred.QueueUnavailable) as e:\n    log(e)\n", ""),
    ("taskqueue stays where it adds", "from google.appengine.api import taskqueue\nfrom google.appengine.ext import deferred\n"
     "try:\n    taskqueue.add(url='/x')\nexcept taskqueue.TaskAlreadyExistsError:\n    pass\ndeferred.defer(f)",
     "from google.appengine.api import taskqueue\nfrom safedefer import deferred\n"
     "try:\n    taskqueue.add(url='/x')\nexcept taskqueue.TaskAlreadyExistsError:\n    pass\ndeferred.defer(f)", "taskqueue-add"),
    ("tasks and queues beside", "from google.appengine.api import taskqueue\nfrom safedefer import deferred\n"
     "def go():\n    taskqueue.Task(url='/x').add('q')\n    taskqueue.Queue('q').lease_tasks(3, 4)\n    deferred.defer(f)\n", None, "taskqueue-add taskqueue-add"),
    ("keys of db", "from google.appengine.ext import db\nfrom safedefer import deferred\n"
     "def go():\n    key = db.Key.from_path('A', 1)\n    deferred.defer(f, key, db.Key('x'), str(key))\n", None, "db-key db-key"),
    ("both in one try", "from google.appengine.api import taskqueue\nfrom google.appengine.ext import deferred\n"
     "try:\n    deferred.defer(f)\n    taskqueue.add(url='/x')\nexcept taskqueue.TaskAlreadyExistsError:\n    pass\n",
     "from google.appengine.api import taskqueue\nfrom safedefer import deferred\n"
     "try:\n    deferred.defer(f)\n    taskqueue.add(url='/x')\nexcept taskqueue.TaskAlreadyExistsError:\n    pass\n", "taskqueue-add taskqueue-error"),
    ("transactional", "from safedefer import deferred\ndeferred.defer(f, _transactional=ndb.in_transaction())", None, "transactional"),
    ("target and url", "from safedefer import deferred\ndeferred.defer(f, _target='worker', _url='/tasks/f')", None, "target url"),
    ("host", "from safedefer import deferred\ndeferred.defer(f, _headers={'Host': 'x', 'X-Trace': '1'})", None, "headers"),
    ("queue with an underscore", "from safedefer import deferred\ndeferred.defer(f, _queue='slow_jobs')", None, "queue-name"),
    ("name with a space", "from safedefer import deferred\ndeferred.defer(f, _name='a b')", None, "task-name"),
    ("method, service", "from safedefer import deferred\ndeferred.defer(f, _method='GET', _service='x')", None, "unknown-option unknown-option"),
    ("own parameter", "from safedefer import deferred\ndef f(a, _token=None): ...\ndeferred.defer(f, 1, _token=2)", None, ""),
    ("countdown and eta", "from safedefer import deferred\ndeferred.defer(f, _countdown=1, _eta=when)", None, "eta"),
    # --- Times ---
    ("now", "import datetime\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime.datetime.now() + datetime.timedelta(1))", None, "naive-eta"),
    ("utcnow in a name", "from datetime import datetime\nfrom safedefer import deferred\nwhen = datetime.utcnow()\ndeferred.defer(f, _eta=when)", None, "naive-eta"),
    ("a date", "from datetime import datetime\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime(2030, 1, 1))", None, "naive-eta"),
    ("replaced", "import datetime as dt\nfrom safedefer import deferred\ndeferred.defer(f, _eta=dt.datetime.now().replace(hour=3))", None, "naive-eta"),
    ("aware", "from datetime import datetime, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime.now(timezone.utc))", None, ""),
    ("made aware", "from datetime import datetime, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime(2030, 1, 1).replace(tzinfo=timezone.utc))", None, ""),
    ("stored", "from google.appengine.ext import ndb\nfrom safedefer import deferred\nclass Loan(ndb.Model):\n    due = ndb.DateTimeProperty()\n"
     "def later(loan):\n    deferred.defer(f, _eta=loan.due - DAY)\n", None, "naive-eta"),
    ("stored, in a name", "from google.cloud.ndb import DateTimeProperty, Model\nfrom safedefer import deferred\nclass Loan(Model):\n    due = DateTimeProperty(indexed=True)\n"
     "    def later(self):\n        when = self.due\n        deferred.defer(f, _eta=when)\n", None, "naive-eta"),
    ("stored, made aware", "from google.appengine.ext import ndb\nfrom safedefer import deferred\nclass Loan(ndb.Model):\n    due = ndb.DateTimeProperty()\n"
     "def later(loan):\n    deferred.defer(f, _eta=loan.due.replace(tzinfo=timezone.utc))\n", None, ""),
    ("stored with a zone", "from google.cloud import ndb\nfrom safedefer import deferred\nclass Loan(ndb.Model):\n    due = ndb.DateTimeProperty(tzinfo=timezone.utc)\n"
     "def later(loan):\n    deferred.defer(f, _eta=loan.due)\n", None, ""),
    ("zone taken away", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime.now(timezone.utc).replace(tzinfo=None))", None, "naive-eta"),
    ("one of two times", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=max(when, datetime.utcnow()))\ndeferred.defer(f, _eta=when or datetime.utcnow())", None, "naive-eta naive-eta"),
    ("aware ones of two", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=max(when, datetime.now(timezone.utc)))\ndeferred.defer(f, _eta=when or other)", None, ""),
    ("time in a text", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime.fromisoformat('2030-01-01'))\ndeferred.defer(f, _eta=datetime.fromisoformat('2030-01-01T00:00+00:00'))\ndeferred.defer(f, _eta=datetime.fromisoformat('x'))\ndeferred.defer(f, _eta=datetime.fromisoformat(text))", None, "naive-eta"),
    ("first of all times", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=datetime.min)", None, "naive-eta"),
    ("time that is added to", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\nwhen = datetime.utcnow()\nwhen += timedelta(1)\nwhen = when + timedelta(1)\ndeferred.defer(f, _eta=when)", None, "naive-eta"),
    ("time or None in a name", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\nwhen = None\nif f:\n    when = datetime.utcnow()\ndeferred.defer(f, _eta=when)", None, "naive-eta"),
    ("made aware in the same name", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\nwhen = datetime.utcnow()\nwhen = when.replace(tzinfo=timezone.utc)\ndeferred.defer(f, _eta=when)", None, ""),
    ("time of a loop", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\nwhen = datetime.utcnow()\nfor when in [datetime.now(timezone.utc)]:\n    deferred.defer(f, _eta=when)\n", None, ""),
    ("returned", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndef later():\n    if f:\n        return datetime.utcnow()\n    return datetime.now() + timedelta(1)\ndeferred.defer(f, _eta=later())", None, "naive-eta"),
    ("returned aware, or by itself", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndef later():\n    return datetime.now(timezone.utc)\ndef ever(n=3):\n    return ever(n - 1) if n else None\ndef nothing(): ...\ndeferred.defer(f, _eta=later())\ndeferred.defer(f, _eta=ever())\ndeferred.defer(f, _eta=nothing())", None, ""),
    ("named on the way", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, _eta=(when := datetime.utcnow()))", None, "naive-eta"),
    ("options in a dict", "from datetime import datetime, timedelta, timezone\nfrom safedefer import deferred\ndeferred.defer(f, **{'_eta': datetime.utcnow(), '_quue': 1, 'a': 1})\nmore = dict(_eta=datetime.utcnow(), **x)\ndeferred.defer(f, _countdown=1, **more)\ndeferred.defer(f, **x, **{**y, 3: 4})", None, "naive-eta unknown-option eta naive-eta"),
    ("stored, repeated", "from google.cloud import ndb\nfrom safedefer import deferred\nclass Loan(ndb.Model):\n    dues = ndb.DateTimeProperty(repeated=True)\n"
     "def later(loan):\n    deferred.defer(f, _eta=loan.dues[0])\n    deferred.defer(f, _eta=loan.names[0])\n", None, "naive-eta"),
    ("retry options in a dict", "from google.appengine.api import taskqueue\nfrom safedefer import deferred\nmore = {'_retry_options': taskqueue.TaskRetryOptions(task_retry_limit=1)}\n"
     "deferred.defer(f, **more)\n",
     "from safedefer import deferred\nmore = {'_retry_options': deferred.TaskRetryOptions(task_retry_limit=1)}\ndeferred.defer(f, **more)\n", ""),
    # --- Callables ---
    ("lambda", "from safedefer import deferred\ndeferred.defer(lambda: f(1))", None, "lambda"),
    ("lambda with a name", "from safedefer import deferred\ng = lambda x: x\ndeferred.defer(g, 1)", None, "lambda"),
    ("nested", "from safedefer import deferred\ndef go():\n    def inner(): ...\n    deferred.defer(inner)\n", None, "nested-function"),
    ("partial", "from functools import partial\nfrom safedefer import deferred\ndeferred.defer(partial(f, 1))", None, "partial"),
    ("partial with a name", "import functools\nfrom safedefer import deferred\ng = functools.partial(f, 1)\ndeferred.defer(g)", None, "partial"),
    ("static", "from safedefer import deferred\nclass A:\n    @staticmethod\n    def s(): ...\n    def go(self):\n        deferred.defer(self.s)\ndeferred.defer(A.s)", None,
     "static-method static-method"),
    ("class method", "from safedefer import deferred\nclass A:\n    @classmethod\n    def c(cls): ...\ndeferred.defer(A.c)", None, ""),
    ("unbound", "from safedefer import deferred\nclass A:\n    def m(self): ...\ndeferred.defer(A.m, a)", None, "unbound-method"),
    ("method of an object", "from safedefer import deferred\nclass A:\n    def m(self): ...\na = A()\ndeferred.defer(a.m)", None, ""),
    ("nested class", "from safedefer import deferred\nclass A:\n    class B: ...\ndeferred.defer(A.B)", None, "nested-class"),
    ("generator", "from safedefer import deferred\ndef g():\n    yield 1\ndeferred.defer(g)", None, "generator"),
    ("generator inside", "from safedefer import deferred\ndef g():\n    def h():\n        yield 1\n    return list(h())\ndeferred.defer(g)", None, ""),
    ("main", "from safedefer import deferred\ndef f(): ...\nif __name__ == '__main__':\n    deferred.defer(f)\n", None, "main-module"),
    ("main, through a function", "from safedefer import deferred\ndef f(): ...\ndef main():\n    deferred.defer(f)\nif __name__ == '__main__':\n    main()\n", None, "main-module"),
    ("metaclass", "from safedefer import deferred\nclass A(metaclass=Registry): ...\ndeferred.defer(A)", None, "metaclass"),
    ("decorated without wraps", "from safedefer import deferred\ndef timed(g):\n    def inner(*a):\n        return g(*a)\n    return inner\n@timed\ndef f(): ...\ndeferred.defer(f)", None,
     "not-found"),
    ("called at once", "from safedefer import deferred\ndef f(): ...\ndeferred.defer(f())", None, "called-at-once"),
    ("handler's method", "from safedefer import deferred\nclass H(webapp2.RequestHandler):\n    def post(self):\n        deferred.defer(self.work)\n    def work(self): ...", None, "request"),
    ("super", "from safedefer import deferred\nclass A(B):\n    def m(self):\n        deferred.defer(super().m)", None, "overridden"),
    ("a text", "from safedefer import deferred\ndeferred.defer('shop.tasks.f')", None, "not-callable"),
    # --- Arguments ---
    ("request", "from safedefer import deferred\ndef view(request):\n    deferred.defer(f, request)", None, "request"),
    ("flask's request", "from flask import request\nfrom safedefer import deferred\ndeferred.defer(f, request, [request.args])", None, "request"),
    ("own request", "from safedefer import deferred\nrequest = {}\ndeferred.defer(f, request)", None, ""),
    ("open file", "from safedefer import deferred\nwith open('x') as file:\n    deferred.defer(f, file)", None, "open-file"),
    ("connection", "import sqlite3\nfrom safedefer import deferred\ndb = sqlite3.connect('x')\ndeferred.defer(f, conn=db)", None, "db-handle"),
    ("generator as argument", "from safedefer import deferred\ndeferred.defer(f, (x for x in y), map(str, y))", None, "iterator iterator"),
    ("callback", "from safedefer import deferred\ndeferred.defer(f, key=lambda x: x)", None, "lambda"),
    ("view", "from safedefer import deferred\ndeferred.defer(f, d.keys())", None, "view"),
    ("query", "from safedefer import deferred\ndeferred.defer(f, User.objects.filter(x=1))", None, "query"),
    ("lock and logger", "import logging, threading\nfrom safedefer import deferred\ndeferred.defer(f, threading.Lock(), logging.getLogger('x'))", None, "lock logger"),
    ("user", "from google.appengine.api import users\nfrom safedefer import deferred\ndeferred.defer(f, users.get_current_user())", None, "user"),
    # --- Around ---
    ("swallowed", "from safedefer import deferred\ntry:\n    deferred.defer(f)\nexcept Exception:\n    pass\n", None, "swallowed"),
    ("bare except", "from safedefer import deferred\ntry:\n    deferred.defer(f)\nexcept:\n    log()\n", None, "swallowed"),
    ("raised again", "from safedefer import deferred\ntry:\n    deferred.defer(f)\nexcept Exception:\n    log()\n    raise\n", None, ""),
    ("handler", "from google.appengine.ext import deferred\napp = WSGI([('/_ah/queue/deferred', deferred.TaskHandler)])",
     "from safedefer import deferred\napp = WSGI([('/_ah/queue/deferred', deferred.TaskHandler)])", "task-handler"),
    ("handler of Python 3", "from google.appengine.api import wrap_wsgi_app\nfrom safedefer import deferred\napp.wsgi_app = wrap_wsgi_app(app.wsgi_app, use_deferred=True)", None, "task-handler"),
    ("wrapped without deferred", "from google.appengine.api import wrap_wsgi_app\napp.wsgi_app = wrap_wsgi_app(app.wsgi_app)", None, ""),
    ("the original's application", "from google.appengine.ext import deferred\nmount('/_ah/queue/deferred', deferred.application)",
     "from safedefer import deferred\nmount('/_ah/queue/deferred', deferred.application)", "task-handler"),
    ("a deadline that is caught", "from google.appengine.runtime import DeadlineExceededError\nfrom safedefer import deferred\ntry:\n    work()\nexcept DeadlineExceededError:\n    deferred.defer(f)\n",
     None, "deadline"),
    ("several deadlines", "from google.appengine import runtime\nfrom google.appengine.runtime import apiproxy_errors\nfrom safedefer import deferred\ntry:\n    work()\nexcept (runtime.DeadlineExceededError, apiproxy_errors.Error):\n    deferred.defer(f)\n",
     None, "deadline"),
    ("a test's queue", "from google.appengine.ext import deferred, testbed\nbed.init_taskqueue_stub()\nstub = bed.get_stub(testbed.TASKQUEUE_SERVICE_NAME)\nfor task in stub.get_filtered_tasks():\n    deferred.run(task.payload)\n",
     "from safedefer import deferred\nfrom google.appengine.ext import testbed\nbed.init_taskqueue_stub()\nstub = bed.get_stub(testbed.TASKQUEUE_SERVICE_NAME)\nfor task in stub.get_filtered_tasks():\n    deferred.run(task.payload)\n",
     "test-queue"),
    ("RQ's option", "from safedefer import deferred\ndef f(**k): ...\ndeferred.defer(f, job_timeout=3)", None, "foreign-option"),
    # --- RQ ---
    ("enqueue", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, 1, b=2)", "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, 1, b=2)", ""),
    ("named queue, timeout", "from rq import Queue\nq = Queue('mail', connection=c)\nq.enqueue(f, job_timeout='10m')",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue('mail', connection=c)\ndeferred.defer(f, _deadline=600, _queue='mail')", ""),
    ("timeout by name", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, job_timeout=LIMIT)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, _deadline=LIMIT)", ""),
    ("no timeout", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, job_timeout=-1)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f)", "timeout"),
    ("dotted name", "import rq\nrq.Queue('low', connection=c).enqueue('shop.tasks.f', 1)", "import shop.tasks\nfrom safedefer import deferred\ndeferred.defer(shop.tasks.f, 1, _queue='low')", ""),
    ("dotted method", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue('shop.Cart.pay')", None, "dotted-method"),
    ("name at run time", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue('shop.' + name)", None, "dynamic-callable"),
    ("enqueue_in", "from datetime import timedelta\nfrom rq import Queue\nq = Queue(connection=c)\nq.enqueue_in(timedelta(minutes=5), f, 1)",
     "from datetime import timedelta\nfrom rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, 1, _countdown=timedelta(minutes=5).total_seconds())", ""),
    ("enqueue_in seconds", "from datetime import timedelta\nfrom rq import Queue\nq = Queue(connection=c)\nq.enqueue_in(timedelta(seconds=n), f)",
     "from datetime import timedelta\nfrom rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, _countdown=n)", ""),
    ("enqueue_at", "from datetime import datetime\nfrom rq import Queue\nq = Queue(connection=c)\nq.enqueue_at(datetime(2030, 1, 1), f)",
     "from datetime import datetime\nfrom rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, _eta=datetime(2030, 1, 1))", "naive-eta"),
    ("enqueue_call", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue_call(func=f, args=(1, 2), kwargs={'a': 3}, timeout=30)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, 1, 2, a=3, _deadline=30)", ""),
    ("left out", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, result_ttl=0, ttl=5, failure_ttl=6, description='x', at_front=True)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f)", "option-left-out " * 5),
    ("depends_on", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, depends_on=job, meta={'a': 1}, on_success=g)", None, "option option option"),
    ("options of RQ 3", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, unique=True, webhooks=[w], rate_limit=r)", None, "option option option"),
    ("retry", "from rq import Queue, Retry\nq = Queue(connection=c)\nq.enqueue(f, retry=Retry(max=3, interval=[10, 60]))",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, _retry_options=deferred.TaskRetryOptions(task_retry_limit=3))", "retry"),
    ("job id and result", "from rq import Queue\nq = Queue(connection=c)\njob = q.enqueue(f, job_id='x')",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\njob = deferred.defer(f, _name='x')", "result-used job-id"),
    ("keywords of the function", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, 1, connection='x', group_id=2, func=3, is_async=False)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\ndeferred.defer(f, 1, connection='x', group_id=2, func=3, is_async=False)", ""),
    ("underscores in dicts", "from rq import Queue\nq = Queue(connection=c)\nmore = dict(_a=1, b=2)\nq.enqueue(f, kwargs={'_queue': 'x', 'b': 1})\nq.enqueue(f, 1, **more)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c)\nmore = dict(_a=1, b=2)\ndeferred.defer(f, **{'_queue': 'x', 'b': 1})\ndeferred.defer(f, 1, **more)", "unknown-option unknown-option double-star"),
    ("apply_async with underscores", "from celery import shared_task\n@shared_task\ndef f(**k): ...\nf.apply_async(kwargs={'_eta': 1})",
     "from safedefer import deferred\ndef f(**k): ...\ndeferred.defer(f, **{'_eta': 1})", "unknown-option"),
    ("timeout of the function", "from rq import Queue\nq = Queue(connection=c)\nq.enqueue(f, timeout=30, job_timeout=5)", None, "option"),
    ("queue of tests", "from rq import Queue\nq = Queue(connection=c, is_async=False)\nq.enqueue(f)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c, is_async=False)\ndeferred.defer(f)", "not-async"),
    ("queue of no tests", "from rq import Queue\nq = Queue(connection=c, is_async=True)\nq.enqueue(f)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue(connection=c, is_async=True)\ndeferred.defer(f)", ""),
    ("job decorator", "from rq.decorators import job\n@job('low', connection=c, timeout=60)\ndef f(a): ...\nf.delay(1)",
     "from safedefer import deferred\ndef f(a): ...\ndeferred.defer(f, 1, _queue='low', _deadline=60)", "option-left-out"),
    ("django_rq", "import django_rq\ndjango_rq.enqueue(f, 1)\ndjango_rq.get_queue('high').enqueue(f)",
     "from safedefer import deferred\ndeferred.defer(f, 1)\ndeferred.defer(f, _queue='high')", ""),
    ("a queue of a class", "from rq import Queue\nclass S:\n    def __init__(self):\n        self.q = Queue('s', connection=c)\n    def go(self):\n        self.q.enqueue(f)",
     "from rq import Queue\nfrom safedefer import deferred\nclass S:\n    def __init__(self):\n        self.q = Queue('s', connection=c)\n    def go(self):\n        deferred.defer(f, _queue='s')", ""),
    ("an unknown queue", "from flask import current_app\ncurrent_app.task_queue.enqueue(f)", None, "unknown-queue"),
    ("the job itself", "from rq import get_current_job\ndef f():\n    get_current_job().meta['x'] = 1\n", None, "current-job"),
    ("not RQ's", "printer.enqueue(page)", None, ""),
    ("enqueue with **", "from rq import Queue\nq = Queue('x', connection=c)\nq.enqueue(f, *a, **k)",
     "from rq import Queue\nfrom safedefer import deferred\nq = Queue('x', connection=c)\ndeferred.defer(f, *a, _queue='x', **k)", "double-star"),
    # --- Celery ---
    ("delay", "from celery import shared_task\n@shared_task\ndef f(a): ...\nf.delay(1)", "from safedefer import deferred\ndef f(a): ...\ndeferred.defer(f, 1)", ""),
    ("app.task", "from celery import Celery\napp = Celery('x')\n@app.task(queue='mail', time_limit=30)\ndef f(a): ...\nf.delay(a=1)",
     "from celery import Celery\nfrom safedefer import deferred\napp = Celery('x')\ndef f(a): ...\ndeferred.defer(f, a=1, _queue='mail', _deadline=30)", ""),
    ("apply_async", "from celery import shared_task\n@shared_task()\ndef f(*a, **k): ...\nf.apply_async((1,), {'b': 2}, countdown=10, queue='q', expires=9)",
     "from safedefer import deferred\ndef f(*a, **k): ...\ndeferred.defer(f, 1, b=2, _countdown=10, _queue='q')", "option-left-out"),
    ("apply_async by names", "from celery import shared_task\n@shared_task\ndef f(*a, **k): ...\nf.apply_async(args=items, kwargs=options, task_id='x')",
     "from safedefer import deferred\ndef f(*a, **k): ...\ndeferred.defer(f, *items, _name='x', **options)", ""),
    ("apply_async over lines", "from celery import shared_task\n@shared_task\ndef f(a): ...\nf.apply_async(\n    args=[1],\n    countdown=5,  # soon\n)\n",
     "from safedefer import deferred\ndef f(a): ...\ndeferred.defer(\n    f,\n    1,\n    _countdown=5,  # soon\n)\n", ""),
    ("link", "from celery import shared_task\n@shared_task\ndef f(): ...\nf.apply_async(link=g)", None, "decorator-stays option"),
    ("eta", "from datetime import datetime\nfrom celery import shared_task\n@shared_task\ndef f(): ...\nf.apply_async(eta=datetime.utcnow())",
     "from datetime import datetime\nfrom safedefer import deferred\ndef f(): ...\ndeferred.defer(f, _eta=datetime.utcnow())", "naive-eta"),
    ("bind", "from celery import shared_task\n@shared_task(bind=True)\ndef f(self): ...\nf.delay()", None, "decorator"),
    ("autoretry", "from celery import shared_task\n@shared_task(autoretry_for=(IOError,), retry_backoff=True)\ndef f(): ...\nf.delay()",
     "from safedefer import deferred\ndef f(): ...\ndeferred.defer(f)", "task-option task-option"),
    ("canvas", "from celery import chain, shared_task\n@shared_task(bind=True)\ndef f(self): ...\nchain(f.s(1), f.s(2)).apply_async()", None, "decorator canvas canvas canvas"),
    ("send_task", "app.send_task('shop.f', args=[1])", None, "send-task"),
    ("result", "from celery import shared_task\n@shared_task\ndef f(): ...\nr = f.delay().get()", "from safedefer import deferred\ndef f(): ...\nr = deferred.defer(f).get()", "result-used"),
    ("on commit", "from celery import shared_task\n@shared_task\ndef f(a): ...\ntransaction.on_commit(lambda: f.delay(1))",
     "from safedefer import deferred\ndef f(a): ...\ntransaction.on_commit(lambda: deferred.defer(f, 1))", ""),
    ("handed on", "from celery import shared_task\n@shared_task(bind=True)\ndef f(self, a): ...\non_commit(partial(f.delay, 1))", None, "decorator handed-on"),
    ("comments of a decorator", "from celery import shared_task\n# above\n@shared_task  # here\n@traced\ndef f(): ...\n",
     "# above\n# here\n@traced\ndef f(): ...\n", ""),
    ("an own name deferred", "from celery import shared_task\n@shared_task\ndef f(): ...\ndeferred = f.delay()",
     "from safedefer import deferred as safedefer_deferred\ndef f(): ...\ndeferred = safedefer_deferred.defer(f)", "result-used"),
    ("unknown task", "from elsewhere import f\nf.delay(1)", None, "unknown-task"),
]  # fmt: skip


def run(tmp_path, **sources):
    """Write modules, rewrite them, and return text and notes of each."""
    for name, source in sources.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    reports = {report.path: report for report in migrate_code([str(tmp_path)], write_files=True)}
    found = {}
    for name in sources:
        path = tmp_path / f"{name}.py"
        report = reports.get(str(path))
        found[name] = path.read_text(), [] if report is None else report.notes
    return found


@pytest.mark.parametrize(
    ("before", "after", "codes"), [shape[1:] for shape in SHAPES], ids=[shape[0] for shape in SHAPES]
)
def test_a_shape_of_code(tmp_path, before, after, codes):
    text, notes = run(tmp_path, shape=before)["shape"]
    assert text == (before if after is None else after)
    assert [note.code for note in notes if note.code != "retries"] == codes.split()
    ast.parse(text)
    # A second run finds nothing to rewrite.
    assert run(tmp_path, shape=text)["shape"][0] == text


def test_a_naive_time_of_another_file_is_found(tmp_path):
    found = run(
        tmp_path,
        times="from datetime import datetime\nSOON = datetime.utcnow()\ndef later():\n    return datetime(2030, 1, 1)\n",
        site="from times import SOON, later\nfrom safedefer import deferred\ndeferred.defer(f, _eta=SOON)\ndeferred.defer(f, _eta=later())\n",
    )
    assert [note.code for note in found["site"][1]] == ["naive-eta", "naive-eta"]


def test_there_are_shapes_of_each_library():
    assert len(SHAPES) >= 110
    assert len({shape[0] for shape in SHAPES}) == len(SHAPES)


MODELS = """
class Book:
    @staticmethod
    def forget(key): ...
    def index(self): ...
    @classmethod
    def reindex(cls, keys): ...
def later(): ...
"""


@pytest.mark.parametrize(
    "given", ["from models import Book\n", "import models\n", "from models import *\nfrom models import Book\n"]
)
def test_a_method_of_a_class_in_another_file(tmp_path, given):
    book = "models.Book" if "import models" in given else "Book"
    calls = "".join(f"deferred.defer({book}.{name}, 1)\n" for name in ("forget", "reindex", "index"))
    found = run(tmp_path, models=MODELS, web=f"{given}from safedefer import deferred\n{calls}")
    assert [note.code for note in found["web"][1]] == ["static-method", "unbound-method"]


OWN = """
def index(key, _token=None): ...
class Book:
    @classmethod
    def forget(cls, key, *, _token=None): ...
"""


@pytest.mark.parametrize("given", ["from models import Book, index\n", "import models\n"])
def test_a_parameter_that_begins_with_an_underscore_is_found_in_another_file(tmp_path, given):
    home = "models." if "import models" in given else ""
    calls = "".join(f"deferred.defer({home}{name}, 1, _token=2, _tokne=3)\n" for name in ("index", "Book.forget"))
    found = run(tmp_path, models=OWN, web=f"{given}from safedefer import deferred\n{calls}")
    assert [note.text.partition(":")[0] for note in found["web"][1]] == ["defer() has no option _tokne"] * 2
