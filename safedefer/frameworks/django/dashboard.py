"""The dashboard below a URL of a Django project: ``path("admin/tasks/", include(dashboard_urls()))``."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from aiohttp import web
from django.http import HttpRequest, HttpResponse
from django.urls import re_path
from django.views.decorators.csrf import csrf_exempt

from safedefer.dashboard.access import Access
from safedefer.frameworks.django.conf import project_app
from safedefer.web.embedded import Embedded

__all__ = ["dashboard_urls", "superusers"]

DjangoAuthorize: TypeAlias = Callable[[Any], Access | None]
#: Headers of the browser that the dashboard reads.
_PASSED: Final = ("Origin", "Sec-Fetch-Site", "Content-Type", "HX-Request", "Cookie")
#: What a query keeps as it is (RFC 3986), and what is quoted already.
_QUERY: Final = "%/?:@!$&'()*+,;="
_ASKED_BY: Final = "Safedefer-Asked-By"


def superusers(request: Any) -> Access | None:
    """Let superusers who are active see everything and do everything, and nobody else anything."""
    user = getattr(request, "user", None)
    if user is None or not (user.is_active and user.is_superuser):
        return None
    return Access(user=str(user.get_username()), read=True, act=True)


def dashboard_urls(authorize: DjangoAuthorize = superusers) -> list[Any]:
    """Return the URLs of the dashboard, for ``include()``. Needs the extra ``dashboard``.

    Args:
        authorize: Called with every ``HttpRequest``; returns what the person may do, or None. Without it, superusers may
            do everything.
    """
    site = _Dashboard(authorize)

    @csrf_exempt  # type: ignore[untyped-decorator]  # its forms have a field of their own
    def dashboard(request: HttpRequest, page: str) -> HttpResponse:
        return site.answer(request, page)

    return [re_path(r"^(?P<page>.*)$", dashboard, name="safedefer-dashboard")]


class _Dashboard:
    def __init__(self, authorize: DjangoAuthorize) -> None:
        self._authorize = authorize
        self._asking: dict[str, Access | None] = {}
        """What the people may do whose requests are under way, by a random text that only this process knows."""
        self._embedded = Embedded(self._application)

    def _application(self) -> web.Application:
        return project_app().dashboard(authorize=lambda request: self._asking.get(request.headers.get(_ASKED_BY, "")))

    def answer(self, request: Any, page: str) -> HttpResponse:
        """Answer a request of Django's."""
        access = self._authorize(request)
        user = getattr(request, "user", None)
        if access is None and request.method == "GET" and user is not None and not user.is_authenticated:
            # Here: a project without django.contrib.auth has an authorize of its own.
            from django.contrib.auth.views import redirect_to_login  # noqa: PLC0415

            return redirect_to_login(request.get_full_path())
        headers = {name: request.headers[name] for name in _PASSED if name in request.headers}
        query = quote(request.META.get("QUERY_STRING", ""), safe=_QUERY)
        asked_by = secrets.token_urlsafe(32)
        self._asking[asked_by] = access
        try:
            answer = self._embedded.ask(
                str(request.method),
                f"/{quote(page)}{'?' if query else ''}{query}",
                {**headers, "Host": request.get_host(), _ASKED_BY: asked_by},
                request.body,
            )
        finally:
            del self._asking[asked_by]
        response = HttpResponse(answer.body, status=answer.status)
        del response["Content-Type"]
        for name, value in answer.headers:
            if name.lower() == "set-cookie":
                response.cookies.load(value)
            else:
                response[name] = value
        return response
