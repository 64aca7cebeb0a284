"""Runs tasks in a test: Celery's eager mode."""

import unittest

from invoices.celery import app

app.conf.task_always_eager = True
app.set_default()


class TaskTestCase(unittest.TestCase):
    def run_tasks(self):
        """They have run."""
