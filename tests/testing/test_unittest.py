"""The mixin for unittest."""

import asyncio
import unittest

from safedefer import deferred
from safedefer.testing import DeferTestMixin
from tests.testing import shop


def cases():
    """In a function: pytest would run them by itself, and one fails on purpose."""

    class PayTest(DeferTestMixin, unittest.TestCase):
        safedefer_app = "tests.testing.shop:app"

        def setUp(self):
            super().setUp()
            shop.DONE.clear()

        def test_it_is_in_test_mode(self):
            shop.pay(1)
            self.tasks.assert_deferred(shop.send_receipt, 1)
            self.tasks.run_due()
            assert shop.DONE == [(1, None)]

        def test_a_failure(self):
            shop.pay(2)
            self.tasks.assert_deferred(shop.send_receipt, 1)

    class InlineTest(DeferTestMixin, unittest.IsolatedAsyncioTestCase):
        safedefer_app = shop.app
        safedefer_inline = True

        async def test_it_runs_at_once(self):
            shop.DONE.clear()
            await shop.app.defer_async(shop.keep, 3)
            assert shop.DONE == [3]

        async def test_the_loop_is_shared(self):
            shop.DONE.clear()
            shop.mail.defer(shop.loop_of)
            self.tasks.clock.advance(60)
            await self.tasks.run_due_async()
            assert shop.DONE[0] is asyncio.get_running_loop()

    class Wrong(DeferTestMixin, unittest.TestCase):
        safedefer_app = "tests.testing.shop:DONE"

        def runTest(self):
            raise AssertionError("not reached")

    return PayTest, InlineTest, Wrong


def run(case):
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    return result


def test_tests_of_unittest_have_the_app_in_test_mode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pay, inline, wrong = cases()
    result = run(pay)
    assert (result.testsRun, result.errors) == (2, [])
    ((failed, text),) = result.failures
    assert failed.id().endswith("test_a_failure")
    assert "send_receipt(2)" in text
    result = run(inline)
    assert (result.testsRun, result.errors, result.failures) == (2, [], [])
    ((_, text),) = run(wrong).errors
    assert "is a list, not an App" in text
    assert list(tmp_path.iterdir()) == []
    assert deferred.configured_app() is None
