"""What runs on Cloud Run: name it in SAFEDEFER_POLICY=tasks."""


def send_receipt(order_id: int) -> None:
    """Send the receipt of an order."""
    print(f"receipt of order {order_id}", flush=True)
