"""Where the shop defers: each function is one call site, and is given an order."""

import collections
import functools
import io
import json
import logging
import pickle
import re
import threading
import uuid
import zlib
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from urllib.parse import urlparse, urlsplit
from zoneinfo import ZoneInfo

import numpy
import requests
from flask import Flask, request
from google.cloud import ndb
from google.protobuf.timestamp_pb2 import Timestamp
from redis import Redis

from safedefer import deferred
from tests.ported.shop import legacy, models, tasks
from tests.ported.shop.models import Customer, Order

logger = logging.getLogger(__name__)

# --- The callable ---


def function(order):
    deferred.defer(tasks.work, order.number, "text", 1.5, None, True)


def function_without_arguments(order):
    deferred.defer(tasks.refresh)


def function_in_a_loop(order):
    for start in range(0, 30, 10):
        deferred.defer(tasks.work, start, start + 10, _countdown=start)


def function_passed_through(order):
    tasks.run_later(tasks.charge, order.key, amount=5)


def function_of_a_module_alias(order):
    deferred.defer(models.note, order.number)


def function_that_defers_another(order):
    tasks.send("ann@shop.example", f"order {order.number}")


def function_that_defers_itself(order):
    ndb.put_multi([models.Dog(id=number) for number in range(1, 6)])
    deferred.defer(tasks.page_through, models.Animal)


def decorated_function(order):
    deferred.defer(tasks.audit, order.number)


def toplevel_function(order):
    deferred.defer(tasks.recount, order.key)


def coroutine_function(order):
    deferred.defer(tasks.notify, "ann")


def method_of_an_entity(order):
    deferred.defer(order.archive, mark="x")


def method_that_defers_a_private_one(order):
    order.archive_later()


def inherited_method_of_an_entity(order):
    deferred.defer(models.customer().reindex)


def method_of_a_polymodel(order):
    deferred.defer(models.Dog(name="Rex").speak)


def hook_that_defers_a_method(order):
    Customer(name="Ann", home=models.Address(city="B")).put()


def super_method(order):
    order.reindex()


def class_method_of_a_model(order):
    deferred.defer(Order.close_old, datetime(2024, 1, 1))


def inherited_class_method(order):
    deferred.defer(Customer.import_rows, [["a", 1], ["b", 2]])


def class_method_with_a_name(order):
    interval = f"{Order._get_kind()}-views-3600-482"
    try:
        deferred.defer(Customer.import_rows, ["views"], _name=interval)
    except (deferred.TaskAlreadyExistsError, deferred.TombstonedTaskError):
        pass


def class_method_with_keys(order):
    deferred.defer(Customer.import_rows, [order.key, order.customer])


def class_method_through_an_entity(order):
    deferred.defer(order.import_rows, [])


def mapper_that_continues(order):
    ndb.put_multi([models.Dog(id=number) for number in range(1, 6)])
    models.AnimalMapper().run()


def method_of_a_plain_object(order):
    deferred.defer(models.Mailer("shop").send, "ann")


def runner_with_a_class(order):
    runner = models.AnimalMapper()
    runner.KIND = models.Dog
    runner.TOKEN = "abc"
    deferred.defer(runner.run, batch_size=10, _queue="background")


def object_of_objects(order):
    job = models.Job(models.Mailer("shop"), tasks.double, filters=[("paid =", True)])
    job.start()


def object_with_call(order):
    deferred.defer(models.Mailer("shop", retries=5), "ann", subject="Hello")


def plain_class(order):
    deferred.defer(models.Report, 2024, currency="EUR")


def put_of_an_entity(order):
    deferred.defer(order.put)


def delete_of_a_key(order):
    deferred.defer(order.key.delete)


def get_by_id_of_a_model(order):
    deferred.defer(Order.get_by_id, 7)


def model_class_as_task(order):
    deferred.defer(Order, number=1)


def put_multi(order):
    deferred.defer(ndb.put_multi, [order, models.Dog(name="Rex")])


def delete_multi(order):
    deferred.defer(ndb.delete_multi, order.related)


def built_in(order):
    deferred.defer(print, "order", order.number)


def function_of_the_standard_library(order):
    deferred.defer(logging.info, "order %s", order.number)


def function_of_this_module(order):
    deferred.defer(_here, order.number)


def _here(number):
    models.note(number)


def lambda_(order):
    deferred.defer(lambda: models.note(order.number))


def lambda_with_a_name(order):
    deferred.defer(tasks.shout, "x")


def nested_function(order):
    def later():
        models.note(order.number)

    deferred.defer(later)


def partial(order):
    deferred.defer(functools.partial(tasks.charge, order.key), 5)


def partial_of_a_module(order):
    deferred.defer(tasks.charge_euros, order.key, 5)


def static_method(order):
    deferred.defer(Order.purge, 7)


def static_method_through_self(order):
    deferred.defer(order.purge, 7)


def generator_function(order):
    deferred.defer(tasks.rows, 3)


def tasklet(order):
    deferred.defer(tasks.fetch, order.key)


def unbound_method(order):
    deferred.defer(Order.archive, order)


def decorated_without_wraps(order):
    deferred.defer(tasks.measure, 1)


def called_at_once(order):
    deferred.defer(tasks.charge(order.key, 5))


class Handler:
    """As webapp2's: it holds the request and the response."""

    def __init__(self, request):
        self.request = request
        self.response = io.BytesIO()

    def post(self, number):
        deferred.defer(self.work, number)

    def work(self, number):
        models.note(number)


def method_of_a_handler(order):
    with Flask(__name__).test_request_context("/?a=1"):
        Handler(request).post(order.number)


# --- Keys and entities ---


def key(order):
    deferred.defer(tasks.charge, order.key, 5)


def key_with_parent_and_namespace(order):
    deferred.defer(tasks.charge, ndb.Key("Shop", "a", "Order", 5, namespace="ü", project="other"), 5)


def key_and_cursor(order):
    deferred.defer(tasks.work, order.key, ndb.Cursor(b"\x01x"), num_updated=40)


def urlsafe_key(order):
    deferred.defer(tasks.charge, order.key.urlsafe(), 5)


def list_of_keys(order):
    deferred.defer(tasks.work, order.related, keys=[order.key])


def dicts_of_keys(order):
    deferred.defer(tasks.work, {"a": order.key}, {order.key: 1}, {order.key})


def entity(order):
    deferred.defer(tasks.work, order)


def unsaved_entity(order):
    deferred.defer(tasks.work, models.customer())


def stored_entity(order):
    order.put()
    deferred.defer(tasks.work, order.key.get(use_cache=False))


def entities(order):
    deferred.defer(tasks.work, [order, models.customer(), order], by_name={"ann": models.customer()})


def expando(order):
    deferred.defer(tasks.work, models.Event(kind="login", ip="::1", tries=3, seen=[1, 2]))


def polymodel(order):
    deferred.defer(tasks.work, models.Dog(name="Rex", id=1))


def structured_property(order):
    deferred.defer(tasks.work, models.customer().home, models.customer().others)


def entity_as_dict(order):
    deferred.defer(tasks.work, order.to_dict())


def model_class_as_argument(order):
    deferred.defer(tasks.work, Order, kinds=[Customer, models.Dog])


def values_of_ndb(order):
    found = models.customer()
    deferred.defer(tasks.work, found.place, found.account, found.photo, ndb.Cursor(b"\x01x"))


def cursor_as_text(order):
    deferred.defer(tasks.work, ndb.Cursor(b"\x01x").urlsafe(), start=b"\x01x")


def attribute_beside_properties(order):
    order.changed_by = "ann"
    deferred.defer(tasks.work, order)


def query_object(order):
    found = Order.query(ndb.OR(Order.number > 5, Order.related == order.key), ancestor=ndb.Key("Shop", 1)).order(
        -Order.number
    )
    deferred.defer(tasks.work, found, Order.query(Order.number == 7, projection=["number"]), Order.query())


def property_object(order):
    deferred.defer(tasks.work, Order.number)


def future(order):
    deferred.defer(tasks.work, order.put_async())


def ndb_client(order):
    deferred.defer(tasks.work, ndb.get_context().client)


# --- Values ---


def keyword_arguments(order):
    deferred.defer(tasks.charge, order.key, amount=5, currency="USD", dry_run=True)


def lists_and_dicts(order):
    deferred.defer(tasks.work, [1, [2, (3, {"a": None})]], {"x": {1: "one", (2, 3): "two"}}, nothing=[])


def dict_of_parameters(order):
    deferred.defer(tasks.work, params={"period": "2024-01", "testing": False, "resources": [1, 2]}, _queue="github")


def list_of_ids(order):
    deferred.defer(tasks.work, [key.id() for key in order.related], order.key.id(), _queue="mail")


def user(order):
    deferred.defer(tasks.work, ndb.User("ann@shop.example", "shop.example"), 7, context_key=None)


def parsed_url(order):
    deferred.defer(tasks.work, url=urlparse("https://shop.example:8443/a;b?c=1#d"), parts=urlsplit("/x?y=1"))


def entity_and_a_path(order):
    deferred.defer(tasks.work, order, _queue="problem-log", _url="/_ah/queue/deferred_problemlog")


def unicode_names(order):
    deferred.defer(tasks.work, "Grüße, 世界 🎉", {"straße": "ß"}, größe=3)


def naive_datetime(order):
    deferred.defer(tasks.work, order.created, since=datetime(2024, 3, 31, 2, 30))


def aware_datetimes(order):
    when = datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))
    deferred.defer(tasks.work, when, datetime.now(UTC), datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=2))))


def dates_and_times(order):
    deferred.defer(tasks.work, date(2024, 2, 29), time(12, 30), timedelta(days=1, microseconds=3))


def numbers(order):
    deferred.defer(tasks.work, Decimal("19.90"), Fraction(1, 3), 2**80, -0.0, float("inf"), 1 + 2j)


def named_tuple(order):
    deferred.defer(tasks.work, models.Money(Decimal("9.99"), "EUR"), [models.Money(1, None)])


def enum_members(order):
    deferred.defer(tasks.work, models.Status.OPEN, {models.Status.SHIPPED: 1}, models.Right.READ | models.Right.WRITE)


def enum_of_a_model(order):
    deferred.defer(tasks.work, Order.Kind.COMPANY)


def dataclass_object(order):
    deferred.defer(tasks.work, models.Line("book", Decimal(5), ["a"]), {"lines": [models.Line("pen", Decimal(1))]})


def plain_object(order):
    deferred.defer(tasks.work, models.Mailer("shop"))


def sets_and_bytes(order):
    deferred.defer(tasks.work, {1, 2, "x"}, frozenset([(1, 2)]), b"\x00\xff", bytearray(b"x"))


def collections_(order):
    counted, grouped = collections.Counter("hello"), collections.defaultdict(list, a=[1])
    deferred.defer(tasks.work, counted, grouped, collections.OrderedDict(b=1, a=2), collections.deque([1], maxlen=5))


def uuid_and_pattern(order):
    deferred.defer(tasks.work, uuid.UUID(int=5), re.compile(r"^ord-(\d+)$", re.IGNORECASE))


def pickled_bytes(order):
    deferred.defer(tasks.work, pickle.dumps({"a": (1, 2)}), zlib.compress(b"x" * 500), json.dumps({"a": 1}))


def large_bytes(order):
    deferred.defer(tasks.work, b"\x89" * 580_000)


def large_text(order):
    deferred.defer(tasks.work, "x" * 780_000)


def too_large_bytes(order):
    deferred.defer(tasks.work, b"\x89" * 600_000)


def new_exception(order):
    deferred.defer(tasks.work, models.ShopError(5, "no stock"), ValueError("x"))


def caught_exception(order):
    try:
        raise models.ShopError(5, "no stock")
    except models.ShopError as error:
        deferred.defer(tasks.work, error)


def callable_as_argument(order):
    deferred.defer(tasks.apply, tasks.double, [1, 2])


def method_as_argument(order):
    deferred.defer(tasks.work, order.archive, Order.close_old, models.Report)


def shared_argument(order):
    basket = ["book"]
    deferred.defer(tasks.work, basket, {"basket": basket}, again=basket)


def lambda_as_argument(order):
    deferred.defer(tasks.apply, lambda number: number + 1, [1])


def partial_as_argument(order):
    deferred.defer(tasks.apply, functools.partial(max, 3), [1])


def generator(order):
    deferred.defer(tasks.work, (number for number in range(3)))


def views_and_iterators(order):
    deferred.defer(tasks.work, {"a": 1}.keys(), map(str, [1]))


def request_object(order):
    with Flask(__name__).test_request_context("/?a=1"):
        deferred.defer(tasks.work, request._get_current_object())


def request_proxy(order):
    with Flask(__name__).test_request_context("/?a=1"):
        deferred.defer(tasks.work, request)


def form_of_a_request(order):
    with Flask(__name__).test_request_context("/", method="POST", data={"a": "1"}):
        deferred.defer(tasks.work, request.form)


def headers_of_a_request(order):
    with Flask(__name__).test_request_context("/"):
        deferred.defer(tasks.work, request.headers)


def values_of_a_request(order):
    with Flask(__name__).test_request_context("/?a=1&b=2", method="POST", data="body"):
        deferred.defer(tasks.work, request.args.to_dict(), dict(request.headers), request.get_data(), url=request.url)


def file_handle(order):
    with Path(__file__).open() as file:
        deferred.defer(tasks.work, file)


def file_in_memory(order):
    deferred.defer(tasks.work, io.BytesIO(b"a,b"))


def cache_client(order):
    deferred.defer(tasks.work, Redis())


def session(order):
    deferred.defer(tasks.work, requests.Session())


def lock_and_logger(order):
    deferred.defer(tasks.work, threading.Lock(), logger)


def module(order):
    deferred.defer(tasks.work, json)


def numpy_values(order):
    deferred.defer(tasks.work, numpy.float64(0.5), numpy.arange(3))


def protobuf(order):
    deferred.defer(tasks.work, Timestamp(seconds=5))


# --- Options ---


def countdown(order):
    deferred.defer(tasks.work, order.number, _countdown=0.5)


def aware_eta(order):
    deferred.defer(tasks.work, order.number, _eta=datetime.now(UTC) + timedelta(seconds=1))


def queue(order):
    deferred.defer(tasks.work, order.number, _queue="slow-jobs")


def name(order):
    task_name = f"charge-{order.key.id()}"
    try:
        deferred.defer(tasks.work, 1, _name=task_name)
        deferred.defer(tasks.work, 2, _name=task_name)
    except (deferred.TaskAlreadyExistsError, deferred.TombstonedTaskError):
        pass


def target(order):
    deferred.defer(tasks.work, order.number, _target="worker", _queue="admin")


def url(order):
    deferred.defer(tasks.work, order.number, _url="/_ah/queue/deferred")


def url_of_the_queue(order):
    deferred.defer(tasks.work, order.number, _url=None, _queue="mail")


def headers(order):
    deferred.defer(tasks.work, order.number, _headers={"X-Shop-Trace": "abc"})


def retry_options(order):
    options = deferred.TaskRetryOptions(min_backoff_seconds=0, max_backoff_seconds=1, task_retry_limit=0)
    deferred.defer(tasks.work, order.number, _retry_options=options, _transactional=False)


def options_in_a_dict(order):
    options = {"_queue": "mail", "_countdown": 1}
    deferred.defer(tasks.work, order.number, **options)


def transactional_if_there_is_one(order):
    deferred.defer(tasks.work, order.number, _transactional=ndb.in_transaction())


@ndb.transactional()
def transactional_in_ndb(order):
    order.put()
    deferred.defer(tasks.charge, order.key, 5, _transactional=True)


def transactional_with_an_entity_and_retries(order):
    def change():
        order.paid = True
        order.put()
        options = deferred.TaskRetryOptions(task_age_limit=3600)
        deferred.defer(tasks.work, order, _transactional=True, _countdown=5, _retry_options=options)

    ndb.transaction(change, xg=True)


def in_a_transaction_without_being_part_of_it(order):
    def change():
        deferred.defer(tasks.work, order.key)

    ndb.transaction(change)


def naive_eta(order):
    deferred.defer(tasks.work, order.number, _eta=datetime(2030, 1, 1))


def eta_and_countdown(order):
    deferred.defer(tasks.work, _eta=datetime.now(UTC), _countdown=5)


def transactional_outside(order):
    deferred.defer(tasks.work, order.number, _transactional=True)


def queue_with_an_underscore(order):
    deferred.defer(tasks.work, _queue="slow_jobs")


def name_with_a_space(order):
    deferred.defer(tasks.work, _name="order 7")


def misspelt_option(order):
    deferred.defer(tasks.work, _quue="mail")


def djangaes_options(order):
    deferred.defer(tasks.work, _small_task=True, _service="worker")


def own_keyword_with_an_underscore(order):
    deferred.defer(tasks.work, order.number, _limit=5)


def own_parameter_with_an_underscore(order):
    deferred.defer(tasks.get_batch, order.number, _token="abc", _num=2)


def own_keyword_like_an_option(order):
    deferred.current_app().options(countdown=0).defer(tasks.work, order.number, _limit=5, _queue="x")


# --- Modules that the policy does not name ---


def function_of_an_unnamed_module(order):
    deferred.defer(legacy.grant, order.key)


def entity_of_an_unnamed_module(order):
    deferred.defer(tasks.work, [legacy.Voucher(code="x", value=5)])


def three_unnamed_classes(order):
    deferred.defer(legacy.grant, legacy.Voucher(code="x"), levels={"a": legacy.Level.LOW})


def method_and_its_unnamed_arguments(order):
    deferred.defer(legacy.Voucher(code="x").redeem, legacy.Level.LOW)


def object_with_a_hook(order):
    deferred.defer(legacy.grant, [legacy.Rule("a"), legacy.Rule("b")], legacy.Level)


def hidden_among_others(order):
    order.extra = {"voucher": legacy.Voucher(code="x"), "rules": [legacy.Rule("a")]}
    order.details = None
    deferred.defer(order.archive, mark=legacy.Level.LOW)
