"""The view that receives tasks, under WSGI and ASGI."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextvars import Context
from typing import Any, Final

from django.core.handlers.wsgi import WSGIRequest
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.views.decorators.csrf import csrf_exempt

from safedefer.app import App
from safedefer.frameworks.django.conf import project_app
from safedefer.web.asgi import length_of
from safedefer.web.body import answer_incomplete

__all__ = ["handle_task"]

_QUEUE_URL: Final = re.compile("/_ah/queue/[A-Za-z0-9.-]{1,100}$")


@transaction.non_atomic_requests  # type: ignore[untyped-decorator]  # Django has no types, here and below
@csrf_exempt  # type: ignore[untyped-decorator]
async def handle_task(request: HttpRequest, **_: str) -> HttpResponse:
    """Receive a task: verify its signature, and run it. No login and no CSRF token is asked for.

    Under WSGI all requests of a process share one event loop, in a thread of its own; under ASGI it is that of the server.
    """
    app = project_app()
    if isinstance(request, WSGIRequest):
        return _by_wsgi(app, request)
    asked: Any = request  # what Django says of itself has no types
    delivery, method, path = app.delivery, str(asked.method), str(asked.path)
    headers = {name.lower(): value for name, value in asked.headers.items()}
    length = length_of(headers)
    answer = delivery.check_request(method, headers, length)
    if answer is None:
        body = _body(asked).read(delivery.max_bytes + 1)
        answer = delivery.too_large() if len(body) > delivery.max_bytes else answer_incomplete(delivery, body, length)
        if answer is None:
            answer = await app.handle(headers, body, path=path, mount=_mount(app, path), method=method)
    return HttpResponse(answer.body, status=answer.status, headers=answer.headers, content_type="text/plain")


vars(handle_task)["login_required"] = False  # for LoginRequiredMiddleware


def _mount(app: App, path: str) -> str:
    """Return what ``include()`` puts in front of the path that tokens name."""
    if path.endswith(app.url):
        return path.removesuffix(app.url)
    return _QUEUE_URL.sub("", path)


def _body(request: Any) -> Any:
    """Return a file of the body: of the whole where a middleware read ``request.body``, else of what is left to read."""
    return io.BytesIO(request.body) if hasattr(request, "_body") else request


def _by_wsgi(app: App, request: Any) -> HttpResponse:
    """Hand a request to ``app.wsgi``, which reads the body from the server within its limits."""
    environ, response = dict(request.environ), HttpResponse()
    if request._read_started or hasattr(request, "_body"):  # noqa: SLF001  # Django has no public word for it
        environ["wsgi.input"] = _body(request)  # Django knows where the body ends; not every server does
    script, path = environ.get("SCRIPT_NAME", ""), environ.get("PATH_INFO", "")
    mount = _mount(app, path)
    environ["SCRIPT_NAME"], environ["PATH_INFO"] = script + mount, path.removeprefix(mount)

    def start_response(status: str, headers: list[tuple[str, str]], /) -> Callable[[bytes], object]:
        response.status_code = int(status.partition(" ")[0])
        for name, value in headers:
            response[name] = value
        write: Callable[[bytes], object] = response.write
        return write

    # Without the context of this request: asgiref would run what the task does by sync_to_async in this thread.
    response.content = b"".join(Context().run(app.wsgi, environ, start_response))
    return response
