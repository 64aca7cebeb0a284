"""What the shop does later."""

import functools

from google.cloud import ndb

from safedefer import deferred
from tests.ported.shop.models import note


def work(*args, **kwargs):
    note((args, kwargs))


def refresh():
    note("refreshed")


def get_batch(number, _token=None, _num=0):
    note((number, _token, _num))


def run_later(task, *args, **kwargs):
    deferred.defer(task, *args, **kwargs, _retry_options=deferred.TaskRetryOptions(task_retry_limit=5))


def charge(order_key, amount, currency="EUR", dry_run=False):
    note((order_key, amount, currency, dry_run))


def page_through(kind, cursor=None, count=0):
    """Defer itself until the last page."""
    page, cursor, more = kind.query().fetch_page(2, start_cursor=cursor)
    count += len(page)
    if more:
        deferred.defer(page_through, kind, cursor, count, _countdown=1)
    else:
        note(count)


def send(to, text):
    """What handlers call: the work is done later."""
    deferred.defer(_send, to, text, _queue="mail")


def _send(to, text):
    note((to, text))


def apply(function, items):
    note([function(item) for item in items])


def double(number):
    return number * 2


def rows(count):
    yield from range(count)


def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        note("called")
        return function(*args, **kwargs)

    return inner


def timed(function):
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@logged
def audit(what):
    note(what)


@timed
def measure(what):
    note(what)


@ndb.toplevel
def recount(what):
    note(what)


@ndb.tasklet
def fetch(key):
    entity = yield key.get_async()
    raise ndb.Return(entity)


async def notify(to):
    note(to)


shout = lambda text: note(text.upper())  # noqa: E731
charge_euros = functools.partial(charge, currency="EUR")
