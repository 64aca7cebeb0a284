"""Runs coroutines and plain callables in the caller's thread.

A plain callable must not run inside the event loop: Django refuses its database there, and ``asyncio.run`` in a task would
fail. So the loop stops, the caller's thread makes the call, and the loop goes on with the result.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from typing import Any, TypeVar

from safedefer.concurrency.threads import InThread, Threads
from safedefer.execution import django

_T = TypeVar("_T")


class CallThreads(Threads):
    """Where the plain callables of a handler run: in threads, unless ``way`` says otherwise."""

    def __init__(self, most: int) -> None:
        super().__init__(most, "safedefer-testing")
        self.way: InThread | None = None

    def __call__(self, call: Callable[[], _T], /) -> asyncio.Future[_T]:
        """Return a future of the result of ``call``."""
        return super().__call__(call) if self.way is None else self.way(call)


class _CallerLoop:
    """An event loop that stops for every plain call."""

    def __init__(self) -> None:
        self._calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()

    def __call__(self, call: Callable[[], _T], /) -> asyncio.Future[_T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._calls.append((call, future))
        loop.stop()
        return future

    def run(self, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        # With a factory the thread's own event loop stays as it is.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            loop = runner.get_loop()
            # In an empty context, as in a worker: a task that needs what the test has set would fail there.
            task = loop.create_task(main(), context=Context())
            task.add_done_callback(lambda _: loop.stop())
            while not task.done():
                loop.run_forever()
                while self._calls:
                    self._call(*self._calls.popleft())
            return task.result()

    def _call(self, call: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            return
        try:
            result = call()
        except Exception as error:  # noqa: BLE001  # whoever awaits it gets any error
            future.set_exception(error)
        else:
            future.set_result(result)


def run_here(threads: CallThreads, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine function, and the plain callables that it runs in ``threads``, in this thread.

    Where an event loop runs in this thread, all run in another one. Where Django is used, coroutines run in another thread,
    and what they do by ``sync_to_async`` in this one, which has the connections of the test.
    """
    if asyncio._get_running_loop() is not None:  # noqa: SLF001  # public in asyncio's words: in events.__all__
        with ThreadPoolExecutor(1, thread_name_prefix="safedefer-testing") as thread:
            return thread.submit(_run_in_loop, threads, main).result()
    if is_sensitive():

        async def run() -> _T:  # asgiref warns of what is no coroutine function
            return await main()

        with _Way(threads, call_sensitive):
            return Context().run(sys.modules["asgiref.sync"].async_to_sync(run))  # type: ignore[no-any-return]
    return _run_in_loop(threads, main)


def _run_in_loop(threads: CallThreads, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    loop = _CallerLoop()
    with _Way(threads, loop):
        return loop.run(main)


async def run_on_loop(threads: CallThreads, main: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run a coroutine function in the running loop, and plain callables in threads; Django's in that of ``sync_to_async``."""
    if not is_sensitive():
        return await asyncio.create_task(main(), context=Context())
    with _Way(threads, call_sensitive):
        return await main()  # asgiref finds the thread of the test by the context


def is_sensitive() -> bool:
    """Whether Django is used here: its connections belong to the thread of ``sync_to_async``."""
    return django.is_used() and "asgiref.sync" in sys.modules


def call_sensitive(call: Callable[[], _T], /) -> asyncio.Future[_T]:
    """Call in the thread of ``sync_to_async``."""
    called: asyncio.Future[_T] = asyncio.ensure_future(
        sys.modules["asgiref.sync"].sync_to_async(call, thread_sensitive=True)()
    )
    return called


class _Way:
    """Sets the way of threads while the context lasts."""

    def __init__(self, threads: CallThreads, way: InThread) -> None:
        self._threads, self._way = threads, way

    def __enter__(self) -> None:
        self._threads.way = self._way

    def __exit__(self, *_: object) -> None:
        self._threads.way = None
