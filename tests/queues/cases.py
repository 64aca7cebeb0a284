"""The cases in which an engine decides something: what ``test_rules`` says of each, and every engine must do."""

from __future__ import annotations

from safedefer.ledger import EndState
from safedefer.queues.base import Settlement, Verdict

#: How the run of a delivery stands by the ledger when the delivery is settled; None: it never began.
RUNS = (None, "running", EndState.RETRY, EndState.SUCCEEDED, EndState.FAILED, EndState.CANCELLED)

_DONE, _DEAD, _RETRY = Verdict.DONE, Verdict.DEAD, Verdict.RETRY

SETTLEMENTS = (
    Settlement(verdict=_DONE, status=200, executed=True),
    Settlement(verdict=_DONE, charged=False),
    Settlement(verdict=_DEAD, reason="retry-limit", status=500),
    Settlement(verdict=_DEAD, status=200, executed=True),
    Settlement(verdict=_DEAD, reason="rejected", charged=False, rejected=True, status=500),
    Settlement(verdict=_RETRY, at=200.0, status=500, reason="retry"),
    Settlement(verdict=_RETRY, at=200.0, status=404, reason="retry", executed=True),
    Settlement(verdict=_RETRY, at=200.0, status=503, reason="busy", charged=False),
    Settlement(verdict=_RETRY, at=200.0, status=500, reason="rejected", charged=False, rejected=True),
    Settlement(verdict=_RETRY, at=200.0, reason="no-response", rejected=True, executed=True),
    Settlement(verdict=_RETRY, at=200.0, reason="no-response", answered=False),
    Settlement(verdict=_DEAD, reason="retry-limit", answered=False),
)
