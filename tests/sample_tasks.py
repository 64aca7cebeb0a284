"""What the tests of the handler and the dispatcher defer. Every run leaves a line in ``RAN``."""

import asyncio
import functools
import logging
import re
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import wraps
from types import coroutine

from safedefer import PermanentTaskFailure, SingularTaskFailure, current_task, defer

RAN = []
CONTEXTS = []
GATE = threading.Event()
STARTED = threading.Event()
SECRET = "the-argument-that-nobody-may-print"


def reset():
    """Begin a test. A call of an earlier test that still waits ends, and what it says goes to that test's list."""
    global RAN, GATE
    GATE.set()
    RAN, GATE = [], threading.Event()
    CONTEXTS.clear()
    STARTED.clear()


def add(a, b=0, *, scale=1):
    RAN.append(("add", a, b, scale))
    return (a + b) * scale


def keywords(**values):
    RAN.append(values)


async def add_later(a, b=0):
    await asyncio.sleep(0)
    RAN.append(("add_later", a, b))
    asyncio.get_running_loop()
    return a + b


def thread_name():
    RAN.append(threading.current_thread().name)


async def loop_thread_name():
    RAN.append(threading.current_thread().name)


def returns_awaitable(value):
    async def inner():
        RAN.append(("awaited", value))
        return value

    return inner()


def keep_context():
    CONTEXTS.append(current_task())


async def keep_context_async():
    await asyncio.sleep(0)
    CONTEXTS.append(current_task())


def fail(text="no"):
    RAN.append("fail")
    raise ValueError(text)


def fail_once(text="no"):
    RAN.append("fail_once")
    if RAN.count("fail_once") == 1:
        raise ValueError(text)


class Unusual(Exception):
    def __str__(self):
        raise RuntimeError("no text")


RAISES = {
    "ValueError": lambda: ValueError("no"),
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": lambda: KeyboardInterrupt(),
    "StopIteration": lambda: StopIteration(1),
    "StopAsyncIteration": lambda: StopAsyncIteration(),
    "GeneratorExit": lambda: GeneratorExit(),
    "BaseException": lambda: BaseException("no"),
    "CancelledError": lambda: asyncio.CancelledError(),
    "MemoryError": lambda: MemoryError(),
    "RecursionError": lambda: RecursionError(),
    "ExceptionGroup": lambda: ExceptionGroup("no", [ValueError("no")]),
    "Unusual": lambda: Unusual(),
    "TimeoutError": lambda: TimeoutError(),
}


def raise_(name):
    RAN.append(name)
    raise RAISES[name]()


async def raise_async(name):
    RAN.append(name)
    raise RAISES[name]()


class Hopeless(PermanentTaskFailure):
    pass


class NotNow(SingularTaskFailure):
    pass


def permanent(kind="plain"):
    RAN.append("permanent")
    raise PermanentTaskFailure("never") if kind == "plain" else Hopeless("never")


def singular(kind="plain"):
    RAN.append("singular")
    raise SingularTaskFailure("not now") if kind == "plain" else NotNow("not now")


def wait_for_gate(seconds=200.0):
    ran = RAN
    STARTED.set()
    GATE.wait(seconds)
    ran.append("waited")


async def sleep_long(seconds=300.0):
    ran = RAN
    ran.append("begun")
    try:
        await asyncio.sleep(seconds)
    finally:
        ran.append("over")


async def suppress_cancellation():
    """Go on after a cancellation, until the gate opens."""
    ran, gate = RAN, GATE
    ran.append("begun")
    while not gate.is_set():
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            ran.append("suppressed")
    ran.append("over")


async def clean_up_badly():
    """Turn the cancellation into another error."""
    RAN.append("begun")
    try:
        await asyncio.sleep(30)
    finally:
        raise ValueError("the clean-up failed")


def fail_at_gate():
    """Wait for the gate, and fail."""
    ran = RAN
    STARTED.set()
    GATE.wait(200.0)
    ran.append("failed")
    raise PermanentTaskFailure("too late")


def wait_for_cancellation(end="return"):
    """Look whether the task was cancelled, as a plain function does."""
    ran, gate = RAN, GATE
    STARTED.set()
    while not current_task().cancelled and not gate.is_set():
        time.sleep(0.01)
    ran.append(("cancelled", current_task().cancelled))
    if end == "raise":
        raise ValueError("stopped")


def backtrack(length):
    """Hold the interpreter in a regular expression: C code that no other thread interrupts."""
    ran = RAN
    ran.append("begun")
    re.match(r"(a+)+$", "a" * length + "b")
    ran.append("over")


def numbers():
    RAN.append("numbers")
    yield 1


async def later_numbers():
    RAN.append("numbers")
    yield 1


@contextmanager
def managed():
    RAN.append("managed")
    yield


@asynccontextmanager
async def managed_later():
    RAN.append("managed")
    yield


MADE = {"generator": numbers, "async generator": later_numbers, "context": managed, "async context": managed_later}


def make_unrun(kind):
    """Return what only makes a generator, as a decorator without functools.wraps does."""
    return MADE[kind]()


async def make_unrun_later(kind):
    return MADE[kind]()


@coroutine
def old_coroutine():
    yield from asyncio.sleep(0).__await__()
    RAN.append("old")


def make_old_coroutine():
    return old_coroutine()


def sleep(seconds):
    ran = RAN
    time.sleep(seconds)
    ran.append("slept")


def defer_another(depth):
    RAN.append(depth)
    if depth:
        defer(defer_another, depth - 1)


def typed(count: int, names: list[str], *more: int, **options: bool):
    RAN.append("typed")


def badly_annotated(x: "Nowhere"):  # noqa: F821
    RAN.append(x)


def raise_rejection():
    from safedefer import errors

    raise errors.InvalidArguments("mine")


async def times_out():
    async with asyncio.timeout(0.01):
        await asyncio.sleep(5)


def with_connection(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function("connection", *args, **kwargs)

    return wrapper


@with_connection
def injected(connection, x):
    RAN.append((connection, x))


@dataclass
class Counter:
    start: int

    def __call__(self, by):
        RAN.append(("call", self.start + by))

    def increment(self, by=1):
        RAN.append(("increment", self.start + by))
        return self.start + by

    async def increment_async(self, by=1):
        RAN.append(("increment_async", self.start + by))

    @classmethod
    def make(cls, start):
        RAN.append(("make", start))
        return cls(start)

    @staticmethod
    def static():
        raise AssertionError


class AsyncCall:
    async def __call__(self, by):
        RAN.append(("async call", by))


def loud(secret):
    RAN.append("loud")
    raise ValueError(f"{secret}\nFORGED LINE \x1b[31m")


def pass_gate(*, fails=False):
    RAN.append("gate")
    STARTED.set()
    assert GATE.wait(60)
    if fails:
        raise ValueError("late")


@dataclass
class Account:
    number: int

    def pay(self, amount, note):
        RAN.append((self.number, amount, note))


def say(name, text):
    """Log a line."""
    logging.getLogger(name).info(text)


async def say_async(name, text):
    """Log a line."""
    logging.getLogger(name).info(text)


def raises_without_saying_what(given):
    raise LookupError("no such order")


def note_span():
    """Keep the id of the active OpenTelemetry span."""
    from opentelemetry.trace import get_current_span

    RAN.append(get_current_span().get_span_context().span_id)


async def note_span_async():
    """Keep the id of the active OpenTelemetry span."""
    await asyncio.sleep(0)
    note_span()


def take(*args, **kwargs):
    RAN.append(("take", args, kwargs))


def underscored(_token=None, **others):
    RAN.append(("underscored", _token, others))


@functools.wraps(underscored)
def underscored_and_wrapped(*args, **kwargs):
    underscored(*args, **kwargs)


underscored_and_wrapped.__qualname__ = underscored_and_wrapped.__name__ = "underscored_and_wrapped"


class Underscored:
    def method(self, _token=None, **others):
        RAN.append(("method", _token, others))

    def __call__(self, **others):
        RAN.append(("call", others))
