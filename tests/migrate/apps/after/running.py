"""Runs tasks in a test: safedefer's."""

import unittest
from pathlib import Path

from safedefer.testing import TestApp

#: The one module of tasks of the application.
POLICY = [f"{path.parent.name}.tasks" for path in Path(__file__).parent.glob("*/tasks.py")]


class TaskTestCase(unittest.TestCase):
    def setUp(self):
        self.kit = self.enterContext(TestApp(*POLICY))

    def run_tasks(self):
        """Run what is due, and what that defers, until nothing waits; what fails is tried again."""
        rounds = 20
        while self.kit.waiting() and rounds:
            self.kit.run_due(raises=False)
            self.kit.clock.advance(3_600)
            rounds -= 1
        self.assertEqual(self.kit.waiting(), [])

    def dead(self):
        return [task.reason for task in self.kit.dead()]
