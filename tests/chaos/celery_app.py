"""The application of the scenarios of a Celery broker, as its workers import it."""

from __future__ import annotations

import os

from safedefer import App

app = App.from_settings()
celery = app.push_queue.engine.celery
celery.conf.update(worker_prefetch_multiplier=2, broker_connection_retry_on_startup=True)
if celery.conf.broker_url.startswith("redis:"):
    celery.conf.broker_transport_options = {
        "visibility_timeout": float(os.environ["CHAOS_VISIBILITY"]),
        "unacked_restore_throttle": 1,  # look for what lost workers had every 10 s, not every 100
    }
