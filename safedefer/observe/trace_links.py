"""The page of a trace in whatever shows traces, by a URL that has a place for the trace's id."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from safedefer.errors import ConfigurationError

_PLACE: Final = "{trace_id}"
#: W3C Trace Context: version, trace id, parent id, flags.
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_URL: Final = re.compile(r"[!#-;=?-\[\]_a-z~]+")
_REMEDY: Final = "write such as https://traces.example/trace/{trace_id}"


def check_trace_url(url: str) -> str:
    """Return a URL with a place for a trace's id as it is.

    Raises:
        ConfigurationError: It is not http or https, names no host, or has no place for the id behind the host.
    """
    try:
        parts = urlsplit(url) if _URL.fullmatch(url.replace(_PLACE, "")) else None
    except ValueError:  # half of an IPv6 address
        parts = None
    if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname or parts.username is not None:
        raise ConfigurationError(f"the URL of traces is no address of http or https; {_REMEDY}")
    if url.count(_PLACE) != 1 or _PLACE in parts.netloc:
        raise ConfigurationError(f"the URL of traces needs one {_PLACE} behind its host; {_REMEDY}")
    return url


def trace_link(url: str | None, traceparent: str | None) -> str:
    """Return the page of the trace that a ``traceparent`` names; empty without one, or without a URL."""
    match = None if traceparent is None else _TRACEPARENT.fullmatch(traceparent)
    return "" if url is None or match is None else url.replace(_PLACE, match[1])
