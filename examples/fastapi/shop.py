"""A FastAPI application that defers a receipt, and receives the task at its own address."""

import os
from pathlib import Path

from fastapi import FastAPI

import safedefer
from safedefer import Keyring, Policy
from safedefer.frameworks.fastapi import Tasks, setup

app = safedefer.App(
    keyring=Keyring.from_text(os.environ["SAFEDEFER_KEYS"]),
    policy=Policy("shop:send_receipt"),
    queue="sqlite:///tasks.db",
    environment="example",
)
api = FastAPI()
setup(api, app)


def send_receipt(order_id: int) -> None:
    Path(f"receipt-{order_id}.txt").write_text(f"Thank you for order {order_id}.\n")


@api.post("/pay/{order_id}", status_code=202)
async def pay(order_id: int, tasks: Tasks) -> str:
    tasks.add_task(send_receipt, order_id)
    return "Your receipt is on its way."
