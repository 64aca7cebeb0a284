"""The pytest plugin of safedefer.

It is installed beside the package, as ``safedefer_pytest``: pytest loads it at every start, and nothing of safedefer is imported
before a fixture is used.

The fixture ``safedefer_app`` is a ``TestApp``, in test mode while the test runs. ``pytest.ini`` says of what::

    [pytest]
    safedefer_app = shop.tasks:app

or, where tasks are deferred by ``safedefer.deferred`` and settings, what may run: ``safedefer_policy = shop.tasks shop.jobs.*``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from safedefer.testing import TestApp

_REMEDY = "set safedefer_app = module:app, or safedefer_policy = patterns, in the section of pytest in its ini file"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the settings."""
    parser.addini("safedefer_app", "the App that the fixture safedefer_app puts into test mode: module:app")
    parser.addini("safedefer_policy", "without safedefer_app: the patterns of what may run", type="args")


@pytest.fixture
def safedefer_app(pytestconfig: pytest.Config) -> Iterator[TestApp]:
    """The App of the tests in test mode: a ``safedefer.testing.TestApp``."""
    with app_by(pytestconfig.getini("safedefer_app"), pytestconfig.getini("safedefer_policy")) as app:
        yield app


def app_by(name: str, policy: Sequence[str]) -> TestApp:
    """Return the TestApp that the settings say.

    Raises:
        pytest.UsageError: There are none, or the App cannot be had.
    """
    # Here and not at the top: nothing is imported for the tests that do not use it.
    from safedefer.errors import ConfigurationError  # noqa: PLC0415
    from safedefer.testing import TestApp  # noqa: PLC0415
    from safedefer.testing.unit import app_of  # noqa: PLC0415

    if not name and not policy:
        raise pytest.UsageError(_REMEDY)
    try:
        return TestApp(app_of(name)) if name else TestApp(*policy)
    except ConfigurationError as error:
        raise pytest.UsageError(f"{error}; {_REMEDY}") from error
