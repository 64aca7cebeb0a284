"""The shop's call sites on RQ: each function is one."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

from redis import Redis
from rq import Callback, Queue, Repeat, Retry
from rq.rate_limit import RateLimit
from rq.webhook import Webhook

from tests.ported.shop import models, tasks

TIMEOUT = 90
queue = Queue(connection=Redis())
mail = Queue("mail", connection=Redis(), default_timeout=300)


def function():
    queue.enqueue(tasks.work, 1, "x", name="ann")


def function_without_arguments():
    queue.enqueue(tasks.refresh)


def named_queue():
    mail.enqueue(tasks.work, 1)


def dotted_name():
    queue.enqueue("tests.ported.shop.tasks.work", 1, key="x")


def explicit_args_and_kwargs():
    queue.enqueue(tasks.work, args=(1, 2), kwargs={"a": 3}, job_timeout=30)


def enqueue_call():
    queue.enqueue_call(func=tasks.work, args=(1,), kwargs={"a": 2}, timeout=60)


def timeout_as_text():
    mail.enqueue(tasks.work, 1, job_timeout="10m")


def timeout_by_name():
    queue.enqueue(tasks.work, 1, job_timeout=TIMEOUT)


def keywords_of_the_function():
    queue.enqueue(tasks.work, 1, connection="x", group_id=2, func=3, is_async=False, job_class="y", job_timeout=20)


def lifetimes():
    queue.enqueue(tasks.work, 1, result_ttl=500, ttl=60, failure_ttl=3600, description="work", at_front=True)


def retries():
    queue.enqueue(tasks.work, 1, retry=Retry(max=3))


def job_id():
    queue.enqueue(tasks.work, 1, job_id="work-1")


def in_ten_minutes():
    queue.enqueue_in(timedelta(minutes=10), tasks.work, 1, a=2)


def at_a_time():
    queue.enqueue_at(datetime.now(UTC) + timedelta(hours=2), tasks.work, 1)


def wrapped_arguments():
    args, options = (order_number(), "x"), {"a": 1}
    queue.enqueue(tasks.work, *args, **options)


def order_number():
    return 7


def method_of_an_object():
    queue.enqueue(models.Mailer("shop").send, "ann")


def values():
    queue.enqueue(
        tasks.work, models.Line("book", Decimal(5)), [models.Status.OPEN], {"when": datetime(2024, 1, 1)}, b"\x00"
    )


def a_queue_of_the_moment():
    Queue("low", connection=Redis()).enqueue(tasks.work, 1)


def dependency():
    queue.enqueue(tasks.work, 2, depends_on="job-1")


def metadata():
    queue.enqueue(tasks.work, 1, meta={"step": 1})


def callbacks():
    queue.enqueue(tasks.work, 1, on_success=Callback(tasks.work), on_failure=tasks.work, on_stopped=tasks.work)


def repeated():
    queue.enqueue(tasks.work, 1, repeat=Repeat(times=3, interval=60))


def unique_job():
    queue.enqueue(tasks.work, 1, job_id="once", unique=True)


def rate_limited():
    queue.enqueue(tasks.work, 1, rate_limit=RateLimit("shop", 2))


def webhooks():
    queue.enqueue(tasks.work, 1, webhooks=[Webhook("https://shop.example", "finished")])


def many():
    queue.enqueue_many([Queue.prepare_data(tasks.work, (1,))])


def dotted_method():
    queue.enqueue("tests.ported.shop.models.Mailer.send", "ann")


def name_of_the_moment():
    queue.enqueue("tests.ported.shop.tasks." + "work", 1)


def lambda_():
    queue.enqueue(lambda: None)


def own_function():
    queue.enqueue(send_receipt, 7, copy=True)


def send_receipt(number, copy=False):
    models.note((number, copy))


def result():
    return queue.enqueue(tasks.work, 1).return_value()
