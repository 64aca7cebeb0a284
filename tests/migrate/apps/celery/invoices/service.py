"""What the shop does."""

from functools import wraps

from . import tasks
from .tasks import book, send


def logged(function):
    @wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


@logged
def bill(number, to):
    tasks.render.delay(number, copies=2)
    send.apply_async((number,), {"to": to}, countdown=30, expires=3600)
    book.apply_async(
        args=[number],
        queue="books",
        priority=3,  # before the others
    )


def remind(numbers, options):
    for number in numbers:
        send.apply_async(args=[number], kwargs=options)
