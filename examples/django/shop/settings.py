"""The settings of the project. Those of safedefer are at the end."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parents[1]
SECRET_KEY = os.environ.get("DJANGO_SECRET_KEY", "of an example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
INSTALLED_APPS = ["shop", "safedefer.frameworks.django"]
ROOT_URLCONF = "shop.urls"
WSGI_APPLICATION = "shop.wsgi.application"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "shop.db"}}

TASKS = {"default": {"BACKEND": "safedefer.frameworks.django.backend.SafedeferBackend"}}
SAFEDEFER = {
    "POLICY": ["shop.tasks"],
    "QUEUE": f"sqlite:///{BASE_DIR}/tasks.db",
    "ENVIRONMENT": "example",
    "OUTBOXES": [f"sqlite:///{BASE_DIR}/shop.db"],
}
