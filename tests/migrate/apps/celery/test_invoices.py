"""The application's own tests."""

import unittest

from invoices import service, tasks
from running import TaskTestCase


class InvoicesTest(TaskTestCase):
    def setUp(self):
        super().setUp()
        tasks.DONE.clear()
        tasks.TRIED.clear()

    def test_an_invoice_is_rendered_sent_archived_and_booked(self):
        service.bill(7, "ada@example.com")
        self.run_tasks()
        self.assertEqual(
            sorted(tasks.DONE, key=repr), [("archive", 7), ("render", 7, 2), ("send", 7, "ada@example.com")]
        )
        self.assertEqual(tasks.TRIED, [7, 7])

    def test_reminders_are_sent(self):
        service.remind([1, 2], {"to": "bob@example.com"})
        self.run_tasks()
        self.assertEqual(sorted(each for each in tasks.DONE if each[0] == "archive"), [("archive", 1), ("archive", 2)])

    def test_a_task_is_a_function_too(self):
        tasks.render(9)
        self.assertEqual(tasks.DONE, [("render", 9, 1)])


if __name__ == "__main__":
    unittest.main()
