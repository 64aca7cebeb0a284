"""Templates. The only importer of jinja2. Everything in a page is text unless a template of ours says that it is markup."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from safedefer.dashboard.lookup import time_field, write_position
from safedefer.dashboard.obstacles import last_error
from safedefer.dashboard.queue_rows import duration
from safedefer.errors import MissingExtra

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape
except ModuleNotFoundError as _error:
    raise MissingExtra("dashboard", "the dashboard") from _error

_TEMPLATES: Final = Path(__file__).with_name("templates")
#: Seconds: what is nearer is "now".
_NOW: Final = 1.0
#: Seconds: what is shorter is shown in milliseconds, and what is longer in minutes.
_MILLISECONDS: Final = 1.0
_SECONDS: Final = 60.0


def _shown(value: Any) -> Any:
    """Return a value as it is put into a page: characters that write nothing, or that turn the text around, are replaced."""
    if type(value) is not str:
        return value
    if value.isascii() and value.isprintable():
        return value
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in value)


def link(page: str, **values: Any) -> str:
    """Return the relative URL of a page: all pages are in one folder, so no prefix need be known."""
    given = {name: str(value) for name, value in values.items() if value not in {None, ""}}
    return f"{page}?{urlencode(given)}" if given else page


def _iso(seconds: float | None) -> str:
    try:
        return datetime.fromtimestamp(seconds or 0.0, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):  # a hint in the storage, which nobody signed
        return "impossible"


def _relative(seconds: float | None, now: float) -> str:
    if seconds is None:
        return "never"
    if abs(seconds - now) < _NOW:
        return "now"
    return f"{duration(now - seconds)} ago" if seconds < now else f"in {duration(seconds - now)}"


def _when(seconds: float | None, now: float) -> Markup:
    exact = _iso(seconds)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        exact.replace(" UTC", "Z").replace(" ", "T"), exact, _relative(seconds, now)
    )


def _took(seconds: float) -> str:
    """Return how long something took, with the unit that fits."""
    if seconds < _MILLISECONDS:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < _SECONDS else duration(seconds)


def _number(value: int) -> str:
    return f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _commands(text: str) -> Markup:
    """Return words of ours with what stands between backticks as code."""
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part)
        for number, part in enumerate(text.split("`"))
    )


class Renderer:
    """Makes pages of the templates of this package."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_shown,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.globals["link"] = link
        self._environment.filters.update(
            position=write_position,
            last_error=last_error,
            iso=_iso,
            duration=duration,
            number=_number,
            took=_took,
            when=_when,
            field=time_field,
            commands=_commands,
        )

    def __call__(self, template: str, **values: Any) -> str:
        """Return the text of a page."""
        return self._environment.get_template(f"{template}.html").render(values)
