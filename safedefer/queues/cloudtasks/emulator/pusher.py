"""Sends the attempts of due tasks to their targets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable
from typing import Final

import aiohttp
from yarl import URL

from safedefer.queues.cloudtasks.emulator.state import Dispatch, State
from safedefer.queues.cloudtasks.emulator.values import blob

_log: Final = logging.getLogger("safedefer.cloudtasks")

#: Seconds after which the clock is looked at again in any case: it may be another one than the loop's.
_LOOK: Final = 1.0
_APP_ENGINE_AGENT: Final = "AppEngine-Google; (+http://code.google.com/appengine)"
#: What a task cannot set; the service sets it, or nobody.
_OWN: Final = re.compile(r"(?i)(host|content-length|user-agent|x-google-.*|x-appengine-.*|x-cloudtasks-.*)")
_SECONDS: Final = re.compile("[0-9]{1,6}")


class Pusher:
    """Dispatches while ``run`` is awaited.

    Args:
        state: Queues and tasks.
        token: Makes an OIDC token from e-mail and audience.
        app_engine: The address of the application that App Engine tasks go to; None: they get no answer.
    """

    def __init__(self, state: State, token: Callable[[str, str], str], app_engine: str | None = None) -> None:
        self._state = state
        self._token = token
        self._app_engine = app_engine
        self._wake = asyncio.Event()
        self._attempts: set[asyncio.Task[None]] = set()
        state.changed = self._wake.set

    async def run(self) -> None:
        """Dispatch until cancelled."""
        # Each answer is read to its end and dropped; a connection that breaks is that of its attempt.
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False) as session:
            try:
                while True:
                    self._wake.clear()
                    for dispatch in self._state.take():
                        self.start(session, dispatch)
                    moment = self._state.next_time()
                    wait = _LOOK if moment is None else min(max(moment - self._state.clock(), 0.001), _LOOK)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(wait):
                            await self._wake.wait()
            finally:
                for attempt in self._attempts:
                    attempt.cancel()
                await asyncio.gather(*self._attempts, return_exceptions=True)

    def start(self, session: aiohttp.ClientSession, dispatch: Dispatch) -> None:
        """Make an attempt, in a task of its own."""
        attempt = asyncio.create_task(self._attempt(session, dispatch))
        self._attempts.add(attempt)
        attempt.add_done_callback(self._attempts.discard)

    def force(self, dispatch: Dispatch) -> None:
        """Make the attempt of a RunTask."""

        async def alone() -> None:
            async with aiohttp.ClientSession(auto_decompress=False, trust_env=False) as session:
                await self._attempt(session, dispatch)

        attempt = asyncio.create_task(alone())
        self._attempts.add(attempt)
        attempt.add_done_callback(self._attempts.discard)

    async def _attempt(self, session: aiohttp.ClientSession, dispatch: Dispatch) -> None:
        status, wait = None, 0.0
        task = dispatch.task
        body = blob(task.request["body"], "body") if "body" in task.request else None
        try:
            address = self._address(dispatch)
            if address is not None:
                # The target chose its own paths: nothing in a URL is decoded or put in order.
                request = session.request(
                    task.request["httpMethod"],
                    URL(address, encoded=True),
                    headers=self.headers(dispatch),
                    data=body,
                    allow_redirects=False,
                    skip_auto_headers=("Content-Type",),
                    timeout=aiohttp.ClientTimeout(total=task.deadline),
                )
                async with request as response:
                    await response.read()
                    status, wait = response.status, _retry_after(response.headers.get("Retry-After"))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            _log.info("an attempt of %s got no answer (%s)", task.name, type(error).__name__)
        self._state.finish(dispatch, status, retry_after=wait)

    def _address(self, dispatch: Dispatch) -> str | None:
        request = dispatch.task.request
        if dispatch.task.is_http:
            return str(request["url"])
        return None if self._app_engine is None else f"{self._app_engine}{request['relativeUri']}"

    def headers(self, dispatch: Dispatch) -> dict[str, str]:
        """Return the headers of an attempt: the task's, and the service's own."""
        task, request = dispatch.task, dispatch.task.request
        headers = {name: value for name, value in request["headers"].items() if _OWN.fullmatch(name) is None}
        family, agent = "X-CloudTasks", "Google-Cloud-Tasks"
        if not task.is_http:
            family = "X-AppEngine"
            given = next((value for name, value in request["headers"].items() if name.lower() == "user-agent"), None)
            agent = _APP_ENGINE_AGENT if given is None else f"{given} {_APP_ENGINE_AGENT}"
            if "body" in request and not any(name.lower() == "content-type" for name in headers):
                headers["Content-Type"] = "application/octet-stream"
        queue, _, name = task.name.rpartition("/tasks/")
        headers |= {
            "User-Agent": agent,
            f"{family}-QueueName": queue.rpartition("/")[2],
            f"{family}-TaskName": name,
            f"{family}-TaskRetryCount": str(dispatch.retries),
            f"{family}-TaskExecutionCount": str(dispatch.executions),
            f"{family}-TaskETA": f"{dispatch.eta:.6f}",
        }
        if dispatch.previous is not None:
            headers[f"{family}-TaskPreviousResponse"] = str(dispatch.previous)
            headers[f"{family}-TaskRetryReason"] = "" if task.is_http else "App Error"
        if "oidcToken" in request:
            token = request["oidcToken"]
            made = self._token(token["serviceAccountEmail"], token.get("audience") or request["url"])
            headers = {each: value for each, value in headers.items() if each.lower() != "authorization"}
            headers["Authorization"] = f"Bearer {made}"
        return headers


def _retry_after(text: str | None) -> float:
    """Return the seconds of a ``Retry-After``; the emulator does not read dates there."""
    return float(text) if text is not None and _SECONDS.fullmatch(text) else 0.0
