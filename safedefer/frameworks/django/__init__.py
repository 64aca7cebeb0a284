"""Django: an application for ``INSTALLED_APPS``, a backend of its Tasks, URLs for tasks and for the dashboard, a command.

``from safedefer.frameworks.django import app`` is the App of the project: the one that ``SAFEDEFER["APP"]`` names, else one that
is made of the setting ``SAFEDEFER`` and ``SAFEDEFER_*`` in the environment when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from safedefer.app import App

    app: App
    """The App of the Django project."""

__all__ = ["app"]


def __getattr__(name: str) -> App:
    # When it is asked for: Django imports this module before its settings are complete.
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from safedefer.frameworks.django.conf import project_app  # noqa: PLC0415

    return project_app()
