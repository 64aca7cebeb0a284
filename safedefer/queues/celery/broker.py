"""What a Celery broker is asked: whether it may lose messages that it has accepted, and how many wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from celery import Celery  # type: ignore[import-untyped]

#: Keeps each message until it is acknowledged. The transports that kombu calls virtual take it out of its queue before they
#: note who has it, in a step of its own: what is killed in between takes the message along (``kombu.transport.redis``).
_KEEPS: Final = "amqp"
_REDIS: Final = "redis"
#: Attributes of a queue, and arguments, by which RabbitMQ drops messages, or the queue, that nobody has acknowledged.
_LIMITS: Final = ("auto_delete", "exclusive", "expires", "message_ttl", "max_length", "max_length_bytes")
_LIMIT_ARGUMENTS: Final = ("x-expires", "x-message-ttl", "x-max-length", "x-max-length-bytes")
_PERSISTENT: Final = frozenset({2, "persistent"})


def is_lossless(task: Any) -> bool:
    """Whether the broker of a Celery application, of which this is the one task, loses nothing that it has accepted; it is not asked."""
    celery: Celery = task.app
    try:
        with celery.connection_for_write() as connection:
            urls = connection.alt or [None]  # all that it may connect to, one after another where one is away
        transports = [celery.connection_for_write(url).get_transport_cls() for url in urls]
        kept = all(getattr(each, "driver_type", None) == _KEEPS for each in transports)
        return kept and _is_durable(task) and not _drops(celery)
    except Exception:  # noqa: BLE001  # what does not import, or is no URL: enqueueing says so
        return False


def _queues(celery: Celery) -> list[Any]:
    """Return the queues that an application declares, whatever its task_queues is made of."""
    return list(celery.amqp.Queues(celery.conf.task_queues).values())


def _is_durable(task: Any) -> bool:
    """Whether messages and queues outlast their broker."""
    celery: Celery = task.app
    queues = _queues(celery)
    exchanges = {getattr(each.exchange, "delivery_mode", None) for each in queues}
    own = {_route(task, None).get("delivery_mode"), getattr(task, "delivery_mode", None)}
    modes = {celery.conf.task_default_delivery_mode, *((exchanges | own) - {None})}
    return modes <= _PERSISTENT and all(each.durable for each in queues)


def _drops(celery: Celery) -> bool:
    """Whether a queue drops messages by itself: by a limit, or, a quorum queue, after so many deliveries."""
    queues = _queues(celery)
    arguments = [each.queue_arguments or {} for each in queues]
    kinds = {each.get("x-queue-type") for each in arguments} | {
        celery.conf.task_default_queue_type,
        celery.conf.get("task_create_missing_queue_type"),
    }
    return (
        any(getattr(each, name, None) not in {None, False} for each in queues for name in _LIMITS)
        or any(name in each for each in arguments for name in _LIMIT_ARGUMENTS)
        or not kinds <= {None, "classic"}
    )


def _route(task: Any, queue: str | None) -> dict[str, Any]:
    """Return where Celery sends the one task, as it does when it publishes: routers are told the task."""
    found: dict[str, Any] = task.app.amqp.router.route({"queue": queue} if queue else {}, task.name, (), {}, task)
    return found


def waiting(task: Any, queue: str | None) -> int | None:
    """Return how many messages wait where the one task is sent: in a queue, or where the application's routes say.

    With Redis those count too that workers have taken and not acknowledged, of all queues: they may have taken all. None: the
    broker cannot say.
    """
    celery: Celery = task.app
    found = _route(task, queue).get("queue")
    name = getattr(found, "name", None) or queue or celery.conf.task_default_queue
    with celery.connection_for_write() as connection:
        kind = connection.transport.driver_type
        if kind not in {_KEEPS, _REDIS}:  # most others say 0, or guess
            return None
        channel = connection.default_channel
        if kind == _REDIS:  # a passive declaration does not know global_keyprefix
            return int(channel.client.hlen(channel.unacked_key)) + int(channel._size(name))  # noqa: SLF001
        try:
            return int(channel.queue_declare(queue=name, passive=True).message_count)
        except connection.channel_errors:  # there is no such queue
            return 0


def weaknesses(task: Any) -> list[str]:
    """Say how the broker may lose messages that it has accepted, and what to do; it is asked."""
    celery: Celery = task.app
    found = []
    if not _is_durable(task):
        found.append("its queues or messages are not durable: it forgets them when it ends; declare durable queues, and "
                     "leave task_default_delivery_mode as it is")  # fmt: skip
    if _drops(celery):
        found.append("its queues drop messages that nobody has acknowledged, by a limit of their time or number, or, quorum "
                     "queues, of their deliveries; declare classic queues without limits")  # fmt: skip
    with celery.connection_for_write() as connection:
        if connection.transport.driver_type == _REDIS:
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
