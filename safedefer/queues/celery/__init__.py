"""Tasks through a Celery broker, beside a store: ``App(queue=celery_app, store="postgresql://…")``. Needs the extra ``celery``."""
