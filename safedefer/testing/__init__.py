"""For the tests of applications that defer tasks: an App in test mode, in memory, with a clock to move.

    from safedefer.testing import TestApp
    from shop.tasks import app, send_receipt

    def test_the_receipt_is_sent_an_hour_later(outbox):
        with TestApp(app) as tasks:
            place_order(42)  # calls app.options(countdown=3600).defer(send_receipt, 42), as in production
            tasks.assert_deferred(send_receipt, 42, countdown=3600)
            tasks.clock.advance(3600)
            tasks.run_due()
            assert outbox == [42]

Tasks are signed with a random key, encoded, queued in memory, verified, decoded and called, in the same code as in
production: a call that could not be deferred or run there fails here too.

pytest has the fixture ``safedefer_app``, and unittest the mixin ``DeferTestMixin``.
"""

from safedefer.testing.app import TestApp
from safedefer.testing.clock import Clock
from safedefer.testing.recorded import DeferredTask
from safedefer.testing.reports import Ran, TaskFailed
from safedefer.testing.unit import DeferTestMixin

__all__ = ["Clock", "DeferTestMixin", "DeferredTask", "Ran", "TaskFailed", "TestApp"]
