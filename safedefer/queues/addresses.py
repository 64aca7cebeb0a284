"""Addresses of databases as they may be shown: without user, password and parameters. One function redacts them all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit

from safedefer.errors import ConfigurationError

if TYPE_CHECKING:
    from safedefer.queues.base import PullQueue

_HIDDEN: Final = "..."
#: Characters at which a program that misreads an address may cut it, and quote a piece of the password.
_CUTS: Final = r"[/@?#:\[\],\s]"
#: Shorter pieces of a password are in every text.
_SHORTEST: Final = 4
_SERVERS: Final = r"([^:]*|\[[0-9A-Fa-f:.]*\]|[^:]*:\d{0,5})(,([^:]*|[^:]*:\d{0,5}))*"
#: Between two URLs. A comma or space elsewhere is a part of one: of a list of hosts, or of a password, of which a piece that
#: was cut off would look like an address.
_BETWEEN: Final = r"[,\s]+(?=[A-Za-z][A-Za-z0-9+.-]*://|$)"
_PARAMETER: Final = r"[A-Za-z_]+=(?:[^%]|%[0-9A-Fa-f]{2})*"
_BAD_ESCAPE: Final = r"%(?![0-9A-Fa-f]{2})"

#: How the addresses of push engines begin. Each engine is imported where one is opened (``queues.open_engine``).
_PUSH: Final = r"(?i:cloudtasks|celery(?:\+[a-z]+)?)://"


def is_push_address(url: str) -> bool:
    """Whether a URL names a push engine, which delivers to a handler, and needs a store beside it."""
    return re.match(_PUSH, url) is not None


def full_place(queue: PullQueue, shown: str) -> str:
    """Return where a queue is: of a file the absolute path, else its address as it may be shown."""
    return shown if queue.file is None else queue.file.path


def place(url: str) -> str:
    """Return the address in a URL, without user, password and parameters.

    A URL that may be read in two ways, as where a password holds an ``@``, ``?`` or ``/`` that should be escaped, shows its
    scheme only.
    """
    scheme, colon, rest = url.partition("://")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return _HIDDEN
    if scheme.lower() == "cloudtasks":  # it has no user; its parameters have an e-mail address
        rest = rest.partition("?")[0]
    if scheme.startswith("sqlite") or "@" not in rest:
        shown = re.split(r"[?#]", rest, maxsplit=1)[0]
        # What stands where a port should may be a password whose host is missing.
        named = scheme.startswith("sqlite") or re.fullmatch(_SERVERS, shown.partition("/")[0])
        return f"{scheme}://{shown if named else _HIDDEN}"
    user, _, shown = rest.partition("@")
    shown = re.split(r"[?#]", shown, maxsplit=1)[0]
    if "@" in rest.partition("@")[2] or re.search(r"[/?#]", user):
        return f"{scheme}://{_HIDDEN}"
    return f"{scheme}://{shown}"


def split_urls(text: str) -> list[str]:
    """Return the URLs of a list that is separated by commas or spaces."""
    return [url for url in re.split(_BETWEEN, text.strip()) if url]


def check_url(url: str) -> str:
    """Return a database's URL that all programs read alike, so that none takes a piece of the password for something else.

    Raises:
        ConfigurationError: It holds a character that must be escaped. The message does not quote it.
    """
    scheme, _, rest = url.partition("://")
    user, at, _ = rest.rpartition("@")
    wrong = place(url).endswith(_HIDDEN) or not rest.isascii() or not rest.isprintable() or " " in rest
    if wrong or (at and (re.search(_BAD_ESCAPE, user) or "[" in user or "]" in user)):
        raise ConfigurationError(
            f"the {scheme if scheme.isalnum() else 'database'} URL cannot be read in one way only; in its user and password write "
            "@ as %40, : as %3A, / as %2F, ? as %3F, # as %23 and % as %25, and escape what is not ASCII"
        )
    query = rest.partition("#")[0].partition("?")[2]
    if any(not re.fullmatch(_PARAMETER, each) for each in query.split("&") if query):
        raise ConfigurationError(
            f"the parameters in the URL of {place(url)} are malformed; write ?name=value&name=value"
        )
    try:
        urlsplit(url).port  # noqa: B018  # it is parsed when it is asked for
    except ValueError:
        if "," not in rest:  # libpq's list of hosts
            raise ConfigurationError(f"the host or the port in {place(url)} is malformed; write host:port") from None
    return url


def redacted(text: str, url: str) -> str:
    """Return a text of somebody else's, such as a driver's error, without the password of a URL, whole or in pieces."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return text


def describe(url: str, error: BaseException) -> str:
    """Return type and text of an error, without the password of a URL."""
    return f"{type(error).__name__}: {redacted(str(error), url)}"


def _secrets(url: str) -> set[str]:
    found = set()
    rest = url.partition("://")[2]
    # Where the host is missing, what follows the colon may be the password.
    user = rest.rpartition("@")[0] or (rest if place(url).endswith(_HIDDEN) else "")
    if ":" in user:
        found |= {user, user.partition(":")[2]}
    found |= set(re.findall(r"(?i)(?:password|passwd|pwd)\s*=\s*([^&\s]+)", url))
    found |= {unquote(each) for each in found}
    pieces = {piece for each in found for piece in re.split(_CUTS, each) if len(piece) >= _SHORTEST}
    if found:
        found.add(url)
    return {each for each in found | pieces if len(each) >= _SHORTEST}
