"""The aiohttp handler: reads the raw body within limits, and passes it to ``Delivery.handle``.

``app.routes()`` serves the application's URL and those of its queues; ``TaskHandler`` is a view for
another URL, as App Engine's was. Both give the answer of ``App.handle``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from typing import Any, Final

from aiohttp import ClientError, web
from aiohttp.http import HttpProcessingError

from safedefer.delivery.handler import Delivery
from safedefer.headers import Response
from safedefer.web.body import OverBudgetError, read_body, warn_of_taken_body
from safedefer.web.served import Handles


def routes(app: Handles) -> list[web.AbstractRouteDef]:
    """Make the routes of an application: its URL, and ``/_ah/queue/<queue>`` for the queues' own."""
    handler = handler_for(app)
    paths = dict.fromkeys([app.url, "/_ah/queue/{queue:[A-Za-z0-9.-]{1,100}}"])
    # Every method, so that our handler answers a wrong one.
    return [web.route("*", f"{app.prefix}{path}", handler) for path in paths]


def handler_for(app: Handles) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Make an aiohttp handler for another URL.

    ``web.route("*", "/tasks", handler_for(app))`` answers wrong methods too; tasks name the URL: ``_url="/tasks"``.
    """

    async def handle(request: web.Request) -> web.Response:
        return await respond(app, request)

    return handle


async def respond(app: Handles, request: web.Request) -> web.Response:
    """Answer a request as ``App.handle`` would."""
    delivery = app.delivery
    answer = None
    # Most bodies arrive with their headers, and need no timer and no second look at the headers.
    at_hand = request.content.is_eof()
    read_already = request.content.at_eof()  # a middleware has read the body, or it is empty
    if not at_hand:
        answer = delivery.check_request(request.method, request.headers, request.content_length)
    if answer is None:
        try:
            if read_already:
                body: bytes | None = await request.read()
            elif at_hand:
                body = request.content.read_nowait(-1)
            else:
                body = await read_body(request.content.iter_any(), delivery.max_bytes, delivery.budget)
        except OverBudgetError:
            answer = delivery.busy()
        except TimeoutError:
            answer = delivery.timed_out()
        except (OSError, ClientError, HttpProcessingError):
            answer = delivery.broken()
        else:
            answer = delivery.too_large() if body is None else await _handle(app, delivery, request, body)
    response = web.Response(status=answer.status, headers=answer.headers, body=answer.body)
    if answer.status in _UNREAD or (answer.status == _BUSY and not at_hand):
        response.force_close()  # the rest of the body is not read
    return response


async def _handle(app: Handles, delivery: Delivery, request: web.Request, body: bytes) -> Response:
    if len(body) < getattr(request.content, "total_bytes", 0):
        warn_of_taken_body()
        return delivery.busy()
    url = app.accepts(request.rel_url.raw_path, _mount(request))
    return await delivery.handle(request.headers, body, url=url, method=request.method)


def _mount(request: web.Request) -> str:
    """Return the path that ``add_subapp`` mounts the innermost application at; empty where there is none."""
    apps = request.match_info.apps
    if len(apps) == 1:
        return ""
    for outer, inner in zip(apps[-2::-1], apps[:0:-1], strict=True):
        for resource in outer.router.resources():
            # Of a nested mount, aiohttp says the whole path. A domain has no path.
            if (info := resource.get_info()).get("app") is inner and "prefix" in info:
                return str(info["prefix"])
    return ""


_UNREAD: Final = frozenset({400, 405, 408, 413, 415})


_BUSY: Final = 503


def task_view(current_app: Callable[[], Handles]) -> type[web.View]:
    """Make the view class ``deferred.TaskHandler``, which serves the configured application."""

    class TaskHandler(web.View):
        """A view that processes deferred invocations (App Engine ``deferred.TaskHandler``).

        It serves the application of ``safedefer.configure``::

            web_app.router.add_view("/_ah/queue/deferred", deferred.TaskHandler)
        """

        def __await__(self) -> Generator[Any, None, web.StreamResponse]:
            """Answer the request. Methods that a subclass does not define are answered as by ``App.handle``."""
            if getattr(self, self.request.method.lower(), None) is None:
                return respond(current_app(), self.request).__await__()
            return super().__await__()

        async def post(self) -> web.Response:
            """Verify and execute the task in the body."""
            return await respond(current_app(), self.request)

    return TaskHandler
