"""Runs tasks in a test: those of App Engine's stub."""

import os
import unittest

from google.appengine.ext import deferred, testbed


class TaskTestCase(unittest.TestCase):
    def setUp(self):
        self.testbed = testbed.Testbed()
        self.testbed.activate()
        self.testbed.init_taskqueue_stub(root_path=os.path.dirname(os.path.abspath(__file__)))
        self.addCleanup(self.testbed.deactivate)
        self.failed = []

    def run_tasks(self):
        stub = self.testbed.get_stub(testbed.TASKQUEUE_SERVICE_NAME)
        while stub.get_filtered_tasks():
            for queue in ("default", "stats"):
                for task in stub.get_filtered_tasks(queue_names=[queue]):
                    stub.DeleteTask(queue, task.name)
                    self.run_one(task.payload)

    def run_one(self, payload):
        for _ in range(6):
            try:
                deferred.run(payload)
            except deferred.SingularTaskFailure:
                continue
            except deferred.PermanentTaskFailure:
                self.failed.append("permanent-task-failure")
            return

    def dead(self):
        return self.failed
