"""The guestbook's own tests."""

import unittest

from guestbook import store, tasks, views
from running import TaskTestCase


class GuestbookTest(TaskTestCase):
    def setUp(self):
        super().setUp()
        store.clear()
        tasks.TRIED.clear()

    def test_words_are_counted_and_the_author_gets_a_letter(self):
        entry_id = tasks.sign("ada", "so nice a book")
        self.assertEqual(store.COUNTS, {})
        self.run_tasks()
        self.assertEqual(store.COUNTS, {entry_id: 4})
        self.assertEqual(store.LETTERS, [("ada", "Thank you")])

    def test_a_second_click_signs_nothing(self):
        self.assertTrue(tasks.sign_once("ada", "hello", "t1"))
        self.assertFalse(tasks.sign_once("ada", "hello", "t1"))
        self.run_tasks()
        self.assertEqual(len(store.ENTRIES), 1)

    def test_a_recount_goes_through_all_pages(self):
        for text in ("a", "a b", "a b c", "a b c d", "a b c d e"):
            tasks.sign("ada", text)
        self.run_tasks()
        tasks.recount()
        self.run_tasks()
        self.assertEqual(store.TOTALS, [("words", 15)])

    def test_class_methods_and_objects_are_called(self):
        tasks.sign("ada", "x")
        tasks.sign("bob", "y")
        store.LETTERS.clear()
        views.close(["ada", "bob"])
        self.run_tasks()
        self.assertEqual(
            sorted(each for each in store.LETTERS if each[1] == "Closed"), [("ada", "Closed"), ("bob", "Closed")]
        )
        self.assertEqual(store.TOTALS, [("authors", 2)])

    def test_a_singular_failure_is_tried_again_and_a_permanent_one_is_not(self):
        tasks.deferred.defer(tasks.shaky)
        tasks.deferred.defer(tasks.hopeless)
        self.run_tasks()
        self.assertEqual(sorted(tasks.TRIED), ["hopeless", "shaky", "shaky", "shaky"])
        self.assertEqual(self.dead(), ["permanent-task-failure"])


if __name__ == "__main__":
    unittest.main()
