"""An aiohttp application that defers a receipt, and receives the task at its own address."""

import os
from pathlib import Path

from aiohttp import web

import safedefer
from safedefer import Keyring, Policy
from safedefer.frameworks.aiohttp import setup

app = safedefer.App(
    keyring=Keyring.from_text(os.environ["SAFEDEFER_KEYS"]),
    policy=Policy("shop:send_receipt"),
    queue="sqlite:///tasks.db",
    environment="example",
)


def send_receipt(order_id: int) -> None:
    Path(f"receipt-{order_id}.txt").write_text(f"Thank you for order {order_id}.\n")


async def pay(request: web.Request) -> web.Response:
    await app.defer_async(send_receipt, int(request.match_info["order_id"]))
    return web.Response(status=202, text="Your receipt is on its way.\n")


def make_app(_argv: list[str] | None = None) -> web.Application:
    web_app = web.Application()
    web_app.router.add_post("/pay/{order_id}", pay)
    setup(web_app, app)
    return web_app
