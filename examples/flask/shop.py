"""A Flask application that defers a receipt, and receives the task at its own address."""

import os
from pathlib import Path

from flask import Flask, current_app

import safedefer
from safedefer import Keyring, Policy
from safedefer.frameworks.flask import Safedefer

web = Flask(__name__)
app = safedefer.App(
    keyring=Keyring.from_text(os.environ["SAFEDEFER_KEYS"]),
    policy=Policy("shop:send_receipt"),
    queue="sqlite:///tasks.db",
    environment="example",
    around=[web.app_context],
)
Safedefer(app, web)


def send_receipt(order_id: int) -> None:
    Path(f"receipt-{order_id}.txt").write_text(f"Thank you for order {order_id} at {current_app.name}.\n")


@web.post("/pay/<int:order_id>")
def pay(order_id: int) -> tuple[str, int]:
    app.defer(send_receipt, order_id)
    return "Your receipt is on its way.\n", 202
