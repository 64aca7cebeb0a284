"""An application as README.md writes it: its queue is the developer's file."""

import asyncio
import secrets
import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass

import safedefer
from safedefer import Key, Keyring, Policy

app = safedefer.App(
    keyring=Keyring(
        Key("k1", secrets.token_bytes(32)), Key("old", secrets.token_bytes(32), "verify_only", queues=["mail"])
    ),
    policy=Policy("tests.testing.shop"),
    queue="sqlite:///tasks.db",
    environment="prod",
)
#: Kept by the module: made before any test began.
mail = app.options(queue="mail", countdown=60)

DONE = []


@dataclass
class Order:
    id: int

    def ship(self, carrier):
        DONE.append((self.id, carrier))


class Ticket:
    """Equal to itself only."""

    def __init__(self, number):
        self.number = number

    def close(self):
        DONE.append(self.number)


class Fragile:
    """Its state goes into a token, and does not come out again."""

    def __init__(self):
        self.glass = 1

    def __setstate__(self, state):
        raise ValueError("broken on the way")


def send_receipt(order_id, *, copy_to=None):
    DONE.append((order_id, copy_to))


def keep(value):
    DONE.append(value)


def enqueue(queue, name=None, countdown=0):
    DONE.append((queue, name, countdown))


def pay(order_id):
    return app.defer(send_receipt, order_id)


def where():
    DONE.append(threading.get_ident())


def nested_loop():
    DONE.append(asyncio.run(asyncio.sleep(0, "a loop of its own")))


async def loop_of():
    await asyncio.sleep(0)
    DONE.append(asyncio.get_running_loop())


async def pay_later(order_id):
    await app.defer_async(send_receipt, order_id)


def pay_again(order_id):
    DONE.append(order_id)
    if order_id:
        app.defer(pay_again, order_id - 1)


def fails(text):
    DONE.append(text)
    raise ValueError(text)


def waits_for_ever(text):
    DONE.append(text)
    raise safedefer.SingularTaskFailure


def interrupted():
    raise KeyboardInterrupt


def runs_due():
    from safedefer import deferred

    DONE.append(deferred.current_app())
    TESTS[-1].run_due()


def pay_with_transaction(value):
    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection, app.transaction(connection):
        app.options(transactional=True).defer(keep, value)


TESTS = []


class Slotted:
    """Its state is in slots, and it is equal to itself only."""

    __slots__ = ("number",)

    def __init__(self, number):
        self.number = number

    def __call__(self):
        DONE.append(self.number)
