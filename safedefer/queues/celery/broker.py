"""What a Celery broker is asked: whether it may lose messages that it has accepted, and how many wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from celery import Celery  # type: ignore[import-untyped]

#: Keeps each message until it is acknowledged. The transports that kombu calls virtual take it out of its queue before they
#: note who has it, in a step of its own: what is killed in between takes the message along (``kombu.transport.redis``).
_KEEPS: Final = "amqp"


def is_lossless(celery: Celery) -> bool:
    """Whether the broker of a Celery application loses nothing that it has accepted; it is not asked."""
    try:
        transport = celery.connection_for_write().get_transport_cls()
    except Exception:  # noqa: BLE001  # what does not import, or is no URL: enqueueing says so
        return False
    return getattr(transport, "driver_type", None) == _KEEPS and _is_durable(celery)


def _is_durable(celery: Celery) -> bool:
    """Whether messages and queues outlast their broker."""
    conf = celery.conf
    return conf.task_default_delivery_mode in {2, "persistent"} and all(each.durable for each in conf.task_queues or ())


def waiting(celery: Celery, task: str, queue: str | None) -> int:
    """Return how many messages wait where a task is sent: to a queue, or where the application's routes say; 0 if there is none."""
    found = celery.amqp.router.route({"queue": queue} if queue else {}, task).get("queue")
    name = getattr(found, "name", None) or queue or celery.conf.task_default_queue
    with celery.connection_for_write() as connection:
        channel = connection.default_channel
        try:
            return int(channel.queue_declare(queue=name, passive=True).message_count)
        except connection.channel_errors:  # a list that is empty is no key: Redis has no such queue
            return 0


def weaknesses(celery: Celery) -> list[str]:
    """Say how the broker may lose messages that it has accepted, and what to do; it is asked."""
    found = []
    if not _is_durable(celery):
        found.append("its queues or messages are not durable: it forgets them when it ends; declare durable queues, and "
                     "leave task_default_delivery_mode as it is")  # fmt: skip
    with celery.connection_for_write() as connection:
        if connection.transport.driver_type == "redis":
            found += weaknesses_of_redis(connection.default_channel.client)
    return found


def weaknesses_of_redis(client: Any) -> list[str]:
    """Ask a server of Redis or Valkey what it keeps on its disk, and what it deletes."""
    found = []
    log = client.info("persistence").get("aof_enabled")
    try:
        synced = client.config_get("appendfsync").get("appendfsync")
    except Exception:  # noqa: BLE001  # a hosted server that answers no CONFIG
        synced = None
    if not log:
        found.append("it keeps no log of its writes: when it ends it has forgotten the messages since its last snapshot, or all; "
                     "set appendonly yes and appendfsync always")  # fmt: skip
    elif synced not in {None, "always"}:
        found.append(
            f"it does not sync each write (appendfsync {synced}): a power cut loses the last messages; set appendfsync always"
        )
    policy = client.info("memory").get("maxmemory_policy")
    if policy not in {None, "noeviction"}:
        found.append(
            f"it deletes messages when its memory is full (maxmemory-policy {policy}); set maxmemory-policy noeviction"
        )
    return found
