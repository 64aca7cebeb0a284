"""The test kit for unittest, and for Django's test cases."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import ClassVar

from safedefer.app import App
from safedefer.errors import ConfigurationError
from safedefer.testing.app import TestApp


class DeferTestMixin:
    """Puts an App into test mode around every test of a ``unittest.TestCase``: ``class T(DeferTestMixin, TestCase)``.

    ``self.tasks`` is the ``TestApp``.
    """

    safedefer_app: ClassVar[App | str]
    """The App, or where it is: ``"shop.tasks:app"``."""
    safedefer_inline: ClassVar[bool] = False
    """Whether tasks run at once: ``TestApp(inline=True)``."""
    tasks: TestApp

    def setUp(self) -> None:
        """Put the App into test mode."""
        self.tasks = TestApp(app_of(self.safedefer_app), inline=self.safedefer_inline)
        self.enterContext(self.tasks)  # type: ignore[attr-defined]  # of unittest.TestCase
        super().setUp()  # type: ignore[misc]  # as above


def app_of(given: App | str) -> App:
    """Return an App, imported if it is named.

    Raises:
        ConfigurationError: It is none, or is not there.
    """
    try:
        found = resolve_name(given) if isinstance(given, str) else given
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigurationError(f"there is no App {given!a} ({error}); write module:app") from error
    if not isinstance(found, App):
        raise ConfigurationError(f"{given!a} is a {type(found).__name__}, not an App; write module:app")
    return found
