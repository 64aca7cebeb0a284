"""Tasks that the decorators of other libraries leave in a module, one of each kind that is installed."""

import functools
from importlib.util import find_spec

TASKS = {}
"""Label to (task object, its function, the arguments of a call, the result)."""
REFUSED = {}
"""Label to what wraps no function that can be called by itself."""

if find_spec("celery"):
    import celery

    celery_app = celery.Celery("decorated", broker="memory://", set_as_current=False)

    @celery_app.task
    def celery_send(number):
        return number + 1

    @celery_app.task(lazy=False, autoretry_for=(ValueError,), name="another.name")
    def celery_eager(number):
        return number + 1

    @celery.shared_task
    def celery_shared(number):
        return number + 1

    @celery_app.task(bind=True)
    def celery_bound(self, number):
        return number

    class CelerySend(celery.Task):
        name = "of.a.class"

        def run(self, number):
            return number

    class CeleryHeir(CelerySend):
        name = "of.a.subclass"

    celery_of_class = celery_app.register_task(CelerySend())
    celery_of_heir = celery_app.register_task(CeleryHeir())

    TASKS |= {
        "celery": (celery_send, celery_send.run), "celery eager": (celery_eager, celery_eager.__wrapped__), "celery shared": (celery_shared, celery_shared.run),
    }  # fmt: skip
    REFUSED |= {"celery bound": celery_bound, "celery class": celery_of_class, "celery subclass": celery_of_heir}

if find_spec("dramatiq"):
    import dramatiq
    from dramatiq.brokers.stub import StubBroker

    stub = StubBroker()

    @dramatiq.actor(broker=stub)
    def dramatiq_send(number):
        return number + 1

    @dramatiq.actor(broker=stub)
    async def dramatiq_async(number):
        return number + 1

    class Reports(dramatiq.GenericActor):
        class Meta:
            abstract = True
            broker = stub

    TASKS |= {"dramatiq": (dramatiq_send, dramatiq_send.fn)}
    # The actor itself keeps a function that starts a loop; the coroutine function is the one that it wraps.
    TASKS |= {"dramatiq async": (dramatiq_async, dramatiq_async.fn)}

if find_spec("huey"):
    import huey

    memory = huey.MemoryHuey(immediate=False)

    @memory.task(retries=2)
    def huey_send(number):
        return number + 1

    @memory.periodic_task(huey.crontab(minute="0"))
    def huey_periodic(number=3):
        return number + 1

    TASKS |= {"huey": (huey_send, huey_send.func), "huey periodic": (huey_periodic, huey_periodic.func)}

if find_spec("taskiq"):
    import taskiq

    broker = taskiq.InMemoryBroker()

    @broker.task
    def taskiq_send(number):
        return number + 1

    @broker.task(task_name="another.name")
    async def taskiq_async(number):
        return number + 1

    TASKS |= {
        "taskiq": (taskiq_send, taskiq_send.original_func), "taskiq async": (taskiq_async, taskiq_async.original_func),
    }  # fmt: skip

if find_spec("procrastinate"):
    import procrastinate
    from procrastinate import testing

    jobs = procrastinate.App(connector=testing.InMemoryConnector())

    @jobs.task(queue="mail")
    def procrastinate_send(number):
        return number + 1

    @jobs.task
    async def procrastinate_async(number):
        return number + 1

    TASKS |= {
        "procrastinate": (procrastinate_send, procrastinate_send.func), "procrastinate async": (procrastinate_async, procrastinate_async.func),
    }  # fmt: skip

DJANGO = next((name for name in ("django.tasks", "django_tasks") if find_spec(name)), None)

if DJANGO:
    from importlib import import_module

    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure(DATABASES={})
        django.setup()
    if not hasattr(settings, "TASKS"):
        settings.TASKS = {"default": {"BACKEND": f"{DJANGO}.backends.dummy.DummyBackend"}}
    task = import_module(DJANGO).task

    @task()
    def django_send(number):
        return number + 1

    @task(priority=5)
    async def django_async(number):
        return number + 1

    TASKS |= {"django": (django_send, django_send.func), "django async": (django_async, django_async.func)}


# --- Of a library of one's own ----------------------------------------------------------------------


class Job:
    """What a decorator of one's own leaves."""

    def __init__(self, function):
        functools.update_wrapper(self, function, updated=())
        self.inner = function

    def __call__(self, *args):
        raise AssertionError("the function runs, not its wrapper")


class SlotJob:
    __slots__ = ("inner",)

    def __init__(self, function):
        self.inner = function


class SlotHeir(SlotJob):
    __slots__ = ("other",)


class Heir(Job):
    pass


@Job
def own(number):
    return number + 1


@SlotJob
def own_slot(number):
    return number + 1


@SlotHeir
def own_heir(number):
    return number + 1


@Heir
def heir(number):
    return number + 1


def plain(number):
    return number


@Job
def generator(number):
    yield number


moved = own
renamed = Job(plain)
no_function = SlotJob(print)
empty = object.__new__(SlotJob)
