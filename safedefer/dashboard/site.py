"""The dashboard as an aiohttp application, to be mounted anywhere: all its pages are in one folder, and its links are relative."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeAlias

from aiohttp import web

from safedefer.concurrency.threads import Threads
from safedefer.dashboard.access import Access, Sessions
from safedefer.dashboard.actions import Actions
from safedefer.dashboard.audit import AuditLog
from safedefer.dashboard.guard import (
    COOKIE,
    HEADERS,
    Authorize,
    Guard,
    PageRefusal,
    Visitor,
    check_same_origin,
    read_form,
)
from safedefer.dashboard.managed import Managed
from safedefer.dashboard.overview import Numbers
from safedefer.dashboard.pages import DashboardPages, Made, Values, done_text
from safedefer.dashboard.render import Renderer
from safedefer.errors import ConfigurationError, Error, QueueUnavailable
from safedefer.observe.trace_links import check_trace_url

_log: Final = logging.getLogger("safedefer")
_STATIC: Final = Path(__file__).with_name("static")
_FILES: Final = {"style.css": "text/css", "htmx.min.js": "text/javascript", "icon.svg": "image/svg+xml"}
#: Calls of the queue at a time.
_THREADS: Final = 4
_STORE_TROUBLE: Final = "The queue's store does not answer; the command safedefer doctor says what is wrong with it."
#: The most characters of what the store says of itself, and what stands before an address and may hold a password.
_MOST_TEXT: Final = 600
_PASSWORD: Final = re.compile(r"//[^/\s]*@")

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """Answers requests of browsers.

    Args:
        app: The application.
        authorize: The user's own login, in place of login tokens.
        clock: Seconds since the epoch.
        trace_url: Where traces are shown: a URL of http or https, with ``{trace_id}``. None shows no links.

    Raises:
        ConfigurationError: ``trace_url`` is none.
    """

    def __init__(
        self,
        app: Managed,
        authorize: Authorize | None,
        clock: Callable[[], float],
        *,
        trace_url: str | None = None,
    ) -> None:
        trace_url = None if trace_url is None else check_trace_url(trace_url)
        self.sessions: Sessions = Sessions(app.keyring, environment=app.environment, clock=clock)
        self._sessions, self._clock, self._environment = self.sessions, clock, app.environment
        self._guard = Guard(self.sessions, authorize)
        self._has_login = authorize is None
        self.audit: AuditLog = AuditLog(clock)
        self._notices = app.notices
        self._numbers = Numbers(app)
        self._pages = DashboardPages(app, numbers=self._numbers, audit=self.audit, clock=clock, trace_url=trace_url)
        self._actions = Actions(app, audit=self.audit, clock=clock)
        self._render = Renderer()
        self._threads = Threads(_THREADS, "safedefer-dashboard")
        self._files = {name: (_STATIC / name).read_bytes() for name in _FILES}
        self._versions = {name: sha256(text).hexdigest()[:12] for name, text in self._files.items()}

    def application(self) -> web.Application:
        """Return the aiohttp application."""
        web_app = web.Application(middlewares=[self._answer])
        pages, actions = self._pages, self._actions
        for path, page in (
            ("/", pages.overview), ("/live", pages.live), ("/tasks", pages.tasks), ("/task", pages.task),
            ("/dead", pages.dead), ("/queues", pages.queues), ("/system", pages.system), ("/confirm", pages.confirm),
        ):  # fmt: skip
            web_app.router.add_get(path, self._page(page))
        for path, action in (
            ("/retry", actions.retry), ("/retry-all", actions.retry_all), ("/discard", actions.discard),
            ("/discard-all", actions.discard_all), ("/cancel", actions.cancel), ("/pause", actions.pause),
            ("/resume", actions.resume), ("/purge", actions.purge),
        ):  # fmt: skip
            web_app.router.add_post(path, self._action(action))
        for name in _FILES:
            web_app.router.add_get(f"/{name}", self._file)
        web_app.router.add_get("/login", self._login_page)
        web_app.router.add_post("/login", self._log_in)
        web_app.router.add_post("/logout", self._log_out)
        web_app.router.add_route("*", "/{rest:.*}", self._nothing)
        web_app.on_cleanup.append(self._close)
        return web_app

    async def _close(self, _: web.Application) -> None:
        self._notices.look_away()
        self._threads.close(wait=False, cancel=True)

    # --- Every request ----------------------------------------------------------------------------

    @web.middleware
    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Answer a request: what is refused or fails is a page too, and every answer has the headers."""
        try:
            if request.method not in {"GET", "HEAD"}:
                check_same_origin(request)
            response = await handler(request)
        except PageRefusal as refusal:
            response = self._message(request, refusal.status, refusal.text)
        except web.HTTPException as error:
            response = self._message(request, error.status, error.reason)
        except QueueUnavailable:
            response = self._message(request, 503, _STORE_TROUBLE)
        except Error as error:
            response = self._message(request, 409, f"{error.slug}: {error}")
        except Exception as error:  # noqa: BLE001  # its text may quote what is in the storage
            _log.error("the dashboard could not answer a request (%s)", type(error).__name__)
            response = self._message(request, 500, "This page could not be made; the log says why.")
        response.headers.update({name: value for name, value in HEADERS.items() if name not in response.headers})
        return response

    def _message(self, request: web.Request, status: int, text: str) -> web.Response:
        # What is polled is put into the page, and must go on polling.
        template = "live_message" if "HX-Request" in request.headers else "message"
        page = self._render(template, **self._frame(None), status=status, text=text, has_login=self._has_login)
        return web.Response(status=status, text=page, content_type="text/html")

    def _frame(self, visitor: Visitor | None) -> dict[str, Any]:
        """Return the values that every page has."""
        return {
            "environment": self._environment,
            "now": self._clock(),
            "versions": self._versions,
            "user": "" if visitor is None else visitor.access.user,
            "acts": visitor is not None and visitor.access.acts_somewhere,
            "csrf": "" if visitor is None else self._sessions.form_field(visitor.session, visitor.access.user),
            "may_log_out": visitor is not None and self._has_login,
            "done": "",
            "page": "",
        }

    async def _nothing(self, request: web.Request) -> web.Response:
        await self._guard.visitor(request)
        raise PageRefusal(404, "There is no such page.")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        headers = {"Cache-Control": "private, max-age=3600"}
        return web.Response(body=self._files[name], content_type=_FILES[name], charset="utf-8", headers=headers)

    # --- Login ------------------------------------------------------------------------------------

    async def _login_page(self, request: web.Request) -> web.Response:
        """Show the button that uses the token up: a link may be followed by programs that look where it leads."""
        token = request.query.get("token", "")
        if not self._has_login or not self._sessions.is_login(token):
            raise PageRefusal(403, "This login link is over, was used, or is of another application; make a new one.")
        page = self._render("login", **self._frame(None), token=token)
        return web.Response(text=page, content_type="text/html")

    async def _log_in(self, request: web.Request) -> web.Response:
        fields = await read_form(request)
        session = self._sessions.log_in(fields.get("token", "")) if self._has_login else None
        if session is None or session.access is None:
            self.audit.add("somebody", "log in", result="refused", allowed=False)
            raise PageRefusal(403, "This login link is over, was used, or is of another application; make a new one.")
        self.audit.add(session.access.user, "log in")
        response = web.Response(status=303, headers={"Location": "./"})
        self._guard.set_cookie(request, response, session)
        return response

    async def _log_out(self, request: web.Request) -> web.Response:
        visitor = await self._guard.visitor(request)
        self._guard.check_form(visitor, await read_form(request))
        self._sessions.end(visitor.session)
        self.audit.add(visitor.access.user, "log out")
        response = self._message(request, 200, "You are logged out.")
        response.del_cookie(COOKIE, path="")
        return response

    # --- DashboardPages and actions ------------------------------------------------------------------------

    def _page(self, page: Callable[[Access, Values], Made]) -> _Handler:
        async def answer(request: web.Request) -> web.Response:
            visitor = await self._guard.visitor(request)
            try:
                name, values = await self._threads(partial(page, visitor.access, _first(request)))
            except (QueueUnavailable, ConfigurationError) as error:
                raise PageRefusal(503, _store_trouble(error, visitor.access)) from None
            frame = self._frame(visitor) | {"page": name, "done": done_text(_first(request))}
            text = await self._threads(partial(self._render, name, **frame, **values))
            response = web.Response(text=text, content_type="text/html")
            if visitor.is_new:
                self._guard.set_cookie(request, response, visitor.session)
            return response

        return answer

    def _action(self, action: Callable[[Access, Values], str]) -> _Handler:
        async def answer(request: web.Request) -> web.Response:
            visitor = await self._guard.visitor(request)
            fields = await read_form(request)
            self._guard.check_form(visitor, fields)
            location = await self._threads(partial(action, visitor.access, fields))
            self._numbers.forget()
            return web.Response(status=303, headers={"Location": location})

        return answer


def _store_trouble(error: Error, access: Access) -> str:
    """Return what is said of a store that fails: what it says itself only to those who see everything."""
    if not access.reads_all:
        return _STORE_TROUBLE
    text = _PASSWORD.sub("//", "".join(char if char.isprintable() else " " for char in str(error)[:_MOST_TEXT]))
    return f"{_STORE_TROUBLE} It says: {text}"


def _first(request: web.Request) -> dict[str, str]:
    """Return the values of a URL; the first one of a name counts."""
    return {name: request.query.getall(name)[0] for name in request.query}
