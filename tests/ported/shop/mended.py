"""The call sites of ``handlers`` that were refused, after doing what the message of each says."""

import json
import logging
import sqlite3
from datetime import UTC, datetime

import numpy
from flask import Flask, request
from google.cloud import ndb
from google.protobuf.timestamp_pb2 import Timestamp

from safedefer import deferred
from tests.ported.shop import models, tasks

# --- The callable ---


def _reindex(key, full):
    models.note((key, full))


def super_method(order):
    deferred.defer(_reindex, order.key, False)


def lambda_(order):
    deferred.defer(models.note, order.number)


def lambda_with_a_name(order):
    deferred.defer(_shout, "x")


def _shout(text):
    models.note(text.upper())


def nested_function(order):
    deferred.defer(models.note, order.number)


def partial(order):
    deferred.defer(tasks.charge, order.key, 5)


def partial_of_a_module(order):
    deferred.defer(tasks.charge, order.key, 5, currency="EUR")


def static_method(order):
    deferred.defer(_purge, 7)


def _purge(number):
    models.note(number)


static_method_through_self = static_method


def generator_function(order):
    deferred.defer(_all_rows, 3)


def _all_rows(count):
    models.note(list(tasks.rows(count)))


def tasklet(order):
    deferred.defer(_fetch, order.key)


def _fetch(key):
    models.note(tasks.fetch(key).get_result())


def unbound_method(order):
    deferred.defer(order.archive)


def decorated_without_wraps(order):
    deferred.defer(tasks.audit, 1)


def called_at_once(order):
    deferred.defer(tasks.charge, order.key, 5)


def method_of_a_handler(order):
    deferred.defer(models.note, order.number)


# --- Keys and entities ---


def attribute_beside_properties(order):
    deferred.defer(tasks.work, order, changed_by="ann")


def future(order):
    deferred.defer(tasks.work, order.put_async().get_result())


def ndb_client(order):
    deferred.defer(tasks.work, ndb.get_context().client.project)


# --- Values ---


def too_large_bytes(order):
    content = models.Order(number=8, label=b"\x89" * 600_000)
    deferred.defer(tasks.work, content.put())


def caught_exception(order):
    try:
        raise models.ShopError(5, "no stock")
    except models.ShopError as error:
        deferred.defer(tasks.work, error.with_traceback(None))


def lambda_as_argument(order):
    deferred.defer(tasks.apply, tasks.double, [1])


def partial_as_argument(order):
    deferred.defer(_apply, tasks.double, [1], limit=3)


def _apply(function, items, limit):
    models.note([min(function(item), limit) for item in items])


def generator(order):
    deferred.defer(tasks.work, list(range(3)))


def views_and_iterators(order):
    deferred.defer(tasks.work, ["a"], ["1"])


def request_object(order):
    with Flask(__name__).test_request_context("/?a=1"):
        deferred.defer(tasks.work, request.method, request.args.to_dict())


request_proxy = request_object


def form_of_a_request(order):
    with Flask(__name__).test_request_context("/", method="POST", data={"a": "1"}):
        deferred.defer(tasks.work, request.form.to_dict(flat=False))


def headers_of_a_request(order):
    with Flask(__name__).test_request_context("/"):
        deferred.defer(tasks.work, dict(request.headers))


def file_handle(order):
    deferred.defer(tasks.work, __file__)


def file_in_memory(order):
    deferred.defer(tasks.work, b"a,b")


def cache_client(order):
    deferred.defer(tasks.work, "redis://cache.shop.example/0")


def session(order):
    deferred.defer(tasks.work, "https://shop.example/stock")


def lock_and_logger(order):
    deferred.defer(tasks.work, "stock", logging.getLogger(__name__).name)


def module(order):
    deferred.defer(tasks.work, json.__name__)


def numpy_values(order):
    deferred.defer(tasks.work, numpy.float64(0.5).item(), numpy.arange(3).tolist())


def protobuf(order):
    deferred.defer(tasks.work, Timestamp(seconds=5).SerializeToString())


# --- Options ---


def naive_eta(order):
    deferred.defer(tasks.work, order.number, _eta=datetime.now(UTC))


def eta_and_countdown(order):
    deferred.defer(tasks.work, _countdown=5)


def transactional_outside(order):
    connection = sqlite3.connect(":memory:")
    with deferred.current_app().transaction(connection):
        deferred.defer(tasks.work, order.number, _transactional=True)
    connection.close()


def queue_with_an_underscore(order):
    deferred.defer(tasks.work, _queue="slow-jobs")


def name_with_a_space(order):
    deferred.defer(tasks.work, _name="order-7")


def misspelt_option(order):
    deferred.defer(tasks.work, _queue="mail")


def djangaes_options(order):
    deferred.defer(tasks.work, _target="worker")


def own_keyword_with_an_underscore(order):
    deferred.current_app().options().defer(tasks.work, order.number, _limit=5)
