"""The URLs of tasks: ``path("", include("safedefer.frameworks.django.urls"))``."""

from __future__ import annotations

from typing import Any, Final

from django.urls import path

from safedefer.frameworks.django.views import handle_task

urlpatterns: Final[list[Any]] = [path("_ah/queue/<str:queue>", handle_task, name="safedefer-task")]
