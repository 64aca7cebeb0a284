"""Work on invoices."""

from celery import shared_task

from invoices.celery import app

DONE = []
TRIED = []


@app.task
def render(number, copies=1):
    DONE.append(("render", number, copies))


@app.task(queue="mail", time_limit=60)  # slow
def send(number, *, to):
    """Sends an invoice, and archives it."""
    DONE.append(("send", number, to))
    archive.delay(number)


@shared_task(ignore_result=True)
def archive(number):
    DONE.append(("archive", number))


# Their server is down at times.
@shared_task(autoretry_for=(OSError,), retry_kwargs={"max_retries": 3}, retry_backoff=False, default_retry_delay=0)
def book(number):
    TRIED.append(number)
    if len(TRIED) < 2:
        raise OSError("try again")
