"""The queues."""

import os

from redis import Redis
from rq import Queue

connection = Redis(unix_socket_path=os.environ.get("THUMBS_REDIS", "redis.sock"))
images = Queue("images", connection=connection, default_timeout=120)


def get_queue():
    return Queue(connection=connection)
