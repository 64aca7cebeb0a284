"""The application's own tests."""

import unittest

from running import TaskTestCase
from thumbs import service, tasks


class ThumbsTest(TaskTestCase):
    def setUp(self):
        super().setUp()
        tasks.DONE.clear()
        tasks.TRIED.clear()

    def test_an_upload_is_scaled_published_and_told(self):
        service.Uploads().upload("cat.png")
        self.assertEqual(tasks.DONE, [])
        self.run_tasks()
        self.assertEqual(
            sorted(tasks.DONE, key=repr),
            [
                ("publish", ("cat.png", "b"), {"public": True}),
                ("scale", "cat.png", 100, None),
                ("scale", "cat.png", 200, 300),
                ("tell", "ada"),
            ],
        )

    def test_what_is_due_later_runs_later(self):
        service.Uploads().later("dog.png")
        self.run_tasks()
        self.assertEqual(
            sorted(tasks.DONE, key=repr),
            [("add", "summer", "dog.png"), ("publish", ("dog.png",), {}), ("scale", "dog.png", 1, None)],
        )

    def test_what_fails_is_tried_again(self):
        service.Uploads().risky()
        self.run_tasks()
        self.assertEqual(tasks.TRIED, ["shaky", "shaky"])


if __name__ == "__main__":
    unittest.main()
