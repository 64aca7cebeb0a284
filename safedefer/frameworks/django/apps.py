"""The application for ``INSTALLED_APPS``: ``"safedefer.frameworks.django"``."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core import checks

from safedefer import deferred
from safedefer.errors import ConfigurationError
from safedefer.frameworks.django.conf import project_app


class SafedeferConfig(AppConfig):  # type: ignore[misc]  # Django has no types
    """Lets ``safedefer.deferred`` and the command line use the App of the project."""

    name = "safedefer.frameworks.django"
    label = "safedefer"
    verbose_name = "safedefer"

    def ready(self) -> None:
        """Make nothing: commands such as ``migrate`` need no keys."""
        deferred.make_by(project_app)
        checks.register(check_configuration)


def check_configuration(**_: Any) -> list[Any]:
    """Say what is wrong with the settings, as a warning: not every command needs keys."""
    try:
        project_app()
    except ConfigurationError as error:
        return [checks.Warning(str(error), id="safedefer.W001")]
    return []
