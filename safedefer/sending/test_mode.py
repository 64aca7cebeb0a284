"""Test mode: while a ``TestApp`` is active, applications beside it enqueue nothing.

A task that a test defers by an App that is not in test mode would go to a real queue, and the test would not see it.
"""

from __future__ import annotations

from typing import Final, NoReturn

from safedefer.errors import ConfigurationError


class TestMode:
    """Counts the active test modes of this process."""

    __test__ = False  # pytest would take it for a test

    def __init__(self) -> None:
        self.active = 0


TEST_MODE: Final = TestMode()


def refuse() -> NoReturn:
    """Refuse an App that is not in test mode.

    Raises:
        ConfigurationError: Always; call it where ``TEST_MODE.active`` and the App is not in test mode.
    """
    raise ConfigurationError(
        "a TestApp is active, and this App is not in test mode: the task would reach its real queue; put it into test mode "
        "too, with TestApp(app)"
    )
