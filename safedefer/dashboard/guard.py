"""The guard in front of every page: who asks, whether a POST comes from one of our own forms, and the headers of each answer.

A POST counts only with ``Sec-Fetch-Site: same-origin``, or without that header with an ``Origin`` that equals ``Host``, and
with a field that was sealed for the session and the person. The address of the client and ``X-Forwarded-*`` are not read.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web

from safedefer.dashboard.access import SESSION_SECONDS, Access, Session, Sessions

COOKIE: Final = "safedefer_dashboard"
CSRF_FIELD: Final = "csrf"
#: Bytes of a form, and its fields.
_FORM_BYTES: Final = 16_384
_FIELDS: Final = 30
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; connect-src 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer."""

Authorize: TypeAlias = Callable[[web.Request], Access | Awaitable[Access | None] | None]
"""The user's own login: what the person behind a request may do; None: nothing."""


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks."""

    access: Access
    session: Session
    is_new: bool
    """Whether the browser has no cookie of the session yet."""


class PageRefusal(Exception):
    """A request that is not answered with what it asks for."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Guard:
    """Says who asks, and refuses forms that are not ours.

    Args:
        sessions: Seals and reads cookies and form fields.
        authorize: The user's own login, in place of login tokens.
    """

    def __init__(self, sessions: Sessions, authorize: Authorize | None) -> None:
        self.sessions = sessions
        self._authorize = authorize

    async def visitor(self, request: web.Request) -> Visitor:
        """Return who asks. Raises ``PageRefusal``: nobody who may see anything."""
        session = self.sessions.read(request.cookies.get(COOKIE, ""))
        if self._authorize is None:
            access = None if session is None else session.access
            if session is None or access is None or not access.reads_something:
                raise PageRefusal(401, "Log in first: the command safedefer dashboard prints a login link.")
            return Visitor(access, session, is_new=False)
        answer = self._authorize(request)
        allowed = await answer if inspect.isawaitable(answer) else answer
        # What is none of ours (True, a user) must not pass for everything.
        if not isinstance(allowed, Access) or not allowed.reads_something:
            raise PageRefusal(403, "You may not see this page; ask whoever runs the application.")
        if session is None or session.access is not None:
            return Visitor(allowed, self.sessions.new(None), is_new=True)
        return Visitor(allowed, session, is_new=False)

    def check_form(self, visitor: Visitor, fields: Mapping[str, str]) -> None:
        """Check that a form was made for this visitor. Raises ``PageRefusal``."""
        if not self.sessions.is_form_field(visitor.session, visitor.access.user, fields.get(CSRF_FIELD, "")):
            raise PageRefusal(403, "This form is too old, or is not of your session; open the page again.")

    def set_cookie(self, request: web.Request, response: web.StreamResponse, session: Session) -> None:
        """Let the browser keep the session. Its path is the folder of the page, whatever prefix a proxy adds."""
        response.set_cookie(
            COOKIE,
            self.sessions.write(session),
            max_age=SESSION_SECONDS,
            path="",  # left out: the browser takes the folder
            httponly=True,
            samesite="Strict",
            secure=is_secure(request),
        )


def is_secure(request: web.Request) -> bool:
    """Whether the browser came by https, maybe to a proxy: it sends ``Sec-Fetch-Site`` to such hosts and to its own machine."""
    host = urlsplit(f"//{request.host}").hostname or ""
    return request.secure or ("Sec-Fetch-Site" in request.headers and host not in _LOOPBACK)


def check_same_origin(request: web.Request) -> None:
    """Check that a POST comes from one of our own pages. Raises ``PageRefusal``."""
    sites = request.headers.getall("Sec-Fetch-Site", [])
    origins = request.headers.getall("Origin", [])
    if sites:
        if sites == ["same-origin"]:
            return
    elif len(origins) == 1 and urlsplit(origins[0]).netloc == request.host and request.host:
        return
    raise PageRefusal(403, "The form comes from another site; open the page here, by https or on this machine.")


async def read_form(request: web.Request) -> dict[str, str]:
    """Return the fields of a form; the first one of a name counts. Raises ``PageRefusal``."""
    if request.content_type != "application/x-www-form-urlencoded":
        raise PageRefusal(415, "This is no form.")
    body = b""
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > _FORM_BYTES:
            raise PageRefusal(413, "This form is too large.")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=_FIELDS, errors="strict")
    except ValueError:
        raise PageRefusal(400, "This form cannot be read.") from None
    fields: dict[str, str] = {}
    for name, value in pairs:
        fields.setdefault(name, value)
    return fields
