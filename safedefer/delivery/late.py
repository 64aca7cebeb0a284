"""The end of a run that returns after its request was answered at the deadline."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

from safedefer.delivery.ledger_client import LedgerClient
from safedefer.delivery.request import HandlerRequest
from safedefer.errors import QueueUnavailable
from safedefer.execution.run import Outcome, Result
from safedefer.ledger import Execution, RunEnd

_log: Final = logging.getLogger("safedefer")


class LateEnd:
    """Stores the end of a run that returned after its deadline: a success counts, anything else is tried again."""

    __slots__ = ("_end_of", "_execution", "_ledger_client", "_request")

    def __init__(
        self,
        ledger_client: LedgerClient,
        end_of: Callable[[HandlerRequest, Execution, Outcome, int | None], RunEnd],
        request: HandlerRequest,
        execution: Execution,
    ) -> None:
        self._ledger_client = ledger_client
        self._end_of = end_of
        self._request = request
        self._execution = execution

    async def finish(self, outcome: Outcome) -> None:
        """Store the end of a run on its loop."""
        with self._logged():
            await self._ledger_client.finish(self._end(outcome))

    def detach(self) -> None:
        """Go on extending the run, whose loop is being closed."""
        self._ledger_client.renewal.detach(self._execution)

    def finish_in_thread(self, outcome: Outcome) -> None:
        """Store the end of a run whose loop is closed, from its thread."""
        with self._logged():
            self._ledger_client.finish_in_thread(self._end(outcome))

    def _end(self, outcome: Outcome) -> RunEnd:
        if outcome.result is not Result.SUCCEEDED:
            outcome = Outcome(result=Result.RETRY, reason=outcome.reason, error=outcome.error)
        return self._end_of(self._request, self._execution, outcome, None)

    @contextlib.contextmanager
    def _logged(self) -> Iterator[None]:
        try:
            yield
        except QueueUnavailable:
            _log.error("the end of task %s was not stored; it runs again", self._execution.task_id)
        finally:
            self._ledger_client.renewal.remove(self._execution)
