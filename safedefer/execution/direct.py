"""Tokens that are run where they are: verified, called, and answered with the result. Asks no ledger."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from typing import Any

from safedefer.blobs import BlobStore
from safedefer.claims import split_audience
from safedefer.codecs.protocol import Codec
from safedefer.codecs.registry import REGISTRY
from safedefer.codecs.zones import load_zones
from safedefer.errors import PermanentTaskFailure
from safedefer.execution.around import Around, SyncManager, await_within, call_within, managers
from safedefer.execution.prepare import Prepared, is_async, prepare
from safedefer.policy import Policy
from safedefer.signing import Verifier
from safedefer.task import VerifiedPointer, VerifiedTask


class DirectRunner:
    """What ``App.run`` and its companions do.

    Args:
        verifier: Turns bytes into verified tasks.
        policy: Its modules are imported before the first task runs.
        codecs: By ``cty``.
        urls: The paths that a token may name.
        blobs: Returns where oversize tokens are.
        clock: Seconds since the epoch.
        around: Return context managers that are entered around the call.
    """

    def __init__(
        self,
        *,
        verifier: Verifier,
        policy: Policy,
        codecs: Mapping[str, Codec],
        urls: Container[str],
        blobs: Callable[[], BlobStore],
        clock: Callable[[], float],
        around: Sequence[Around] = (),
    ) -> None:
        self._verifier = verifier
        self._policy = policy
        self._codecs = codecs
        self._urls = urls
        self._blobs = blobs
        self._clock = clock
        self._around = around
        self._loaded = False

    def load_policy(self) -> None:
        """Import the modules that the policy names, and what distributions register, once.

        Raises:
            ConfigurationError: One cannot be imported.
        """
        if not self._loaded:
            self._policy.load()
            self._verifier.load()
            REGISTRY.discover()
            load_zones()
            self._loaded = True

    def run(self, data: bytes) -> object:
        """Verify a token, call what it says, and return the result.

        Raises:
            RejectedTask: The token is refused. Whatever the callable raises passes through.
            RuntimeError: An event loop runs in this thread; use ``run_async``.
        """
        import asyncio  # noqa: PLC0415  # only who runs tasks needs it

        if asyncio._get_running_loop() is not None:  # noqa: SLF001  # public in asyncio's words: in events.__all__
            raise RuntimeError("run() blocks and an event loop runs here; await run_async() instead")
        prepared = prepare(self._runnable(data), self._codecs)
        if self._around:
            outer, inner = managers(self._around)
            if outer or is_async(prepared.target):
                return asyncio.run(_within(outer, inner, prepared.__call__))
            result = call_within(inner, prepared.__call__)
            if inspect.isawaitable(result):
                return asyncio.run(await_within(inner, lambda: result))
            return result
        target, args, kwargs = prepared
        result = target(*args, **kwargs)
        return asyncio.run(_awaited(result)) if result is not None and inspect.isawaitable(result) else result

    async def run_async(self, data: bytes) -> object:
        """Do what ``run`` does inside a running loop: plain callables run in a thread."""
        import asyncio  # noqa: PLC0415  # as above

        prepared = await asyncio.to_thread(prepare, self._runnable(data), self._codecs)
        outer, inner = managers(self._around)
        if is_async(prepared.target):
            return await _within(outer, inner, prepared.__call__)
        return await _within(outer, (), lambda: _call_and_await(inner, prepared))

    def run_from_datastore(self, key: str) -> object:
        """Run the oversize task whose stored token has the id ``key``, and delete it unless it must be retried.

        Raises:
            PermanentTaskFailure: There is no such blob (as the original). Else as ``run``.
        """
        data = self._blobs().get(key)
        if data is None:
            raise PermanentTaskFailure("there is no stored task of this key; it has ended, or was never enqueued")
        try:
            result = self.run(data)
        except PermanentTaskFailure:
            self._blobs().delete(key)
            raise
        self._blobs().delete(key)
        return result

    def follow(self, verified: VerifiedTask | VerifiedPointer, *, expired: bool = False) -> VerifiedTask:
        """Return the task that a verified pointer leads to, verified too; runs nothing.

        Raises:
            PermanentTaskFailure: The stored token is gone.
            RejectedTask: It is not the one that was pointed to, or is refused.
        """
        if isinstance(verified, VerifiedTask):
            return verified
        data = self._blobs().get(verified.blob["id"])
        if data is None:
            raise PermanentTaskFailure("the stored token is gone; the task has ended, or the blob was lost")
        return self._verifier.verify_stored(
            verified, data, url=split_audience(verified.claims["aud"])[3], now=self._clock(), expired=expired
        )

    def check(self, task: VerifiedTask) -> None:
        """Check that a task's callable is here and takes its arguments; calls nothing. Pickles are not read.

        Raises:
            RejectedTask: One of its subclasses says why the task would not run.
        """
        self.load_policy()
        if task.claims["cty"] != "pickle":
            prepare(task, self._codecs)

    def _runnable(self, data: bytes) -> VerifiedTask:
        if not self._loaded:
            self.load_policy()
        verified = self._verifier.verify(data, self._urls, self._clock())
        return verified if type(verified) is VerifiedTask else self.follow(verified)


async def _within(
    outer: Sequence[AbstractAsyncContextManager[object]], inner: Sequence[SyncManager], call: Callable[[], object]
) -> object:
    result: object = None
    async with AsyncExitStack() as stack:
        for manager in outer:
            await stack.enter_async_context(manager)
        result = await await_within(inner, call)
    return result  # noqa: RET504  # None if the error was suppressed


async def _call_and_await(inner: Sequence[SyncManager], prepared: Prepared) -> object:
    result = await call_in_thread(partial(call_within, inner, prepared.__call__))
    return await await_within(inner, lambda: result) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> object:
    return await result


async def call_in_thread(call: Callable[[], object]) -> object:
    """Run a plain callable in a thread. Return its result or raise its exception, a ``StopIteration`` as RuntimeError."""
    import asyncio  # noqa: PLC0415  # as above

    def step() -> tuple[object, BaseException | None]:
        try:
            return call(), None
        except BaseException as error:  # noqa: BLE001  # a future cannot carry a StopIteration
            return None, error

    result, error = await asyncio.to_thread(step)
    if error is None:
        return result
    if isinstance(error, StopIteration):  # nor can a coroutine raise one (PEP 479)
        raise RuntimeError("the callable raised StopIteration") from error  # noqa: TRY004
    raise error
