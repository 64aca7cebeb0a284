"""One of what the seam takes many of; what is lost is an ``AssertionError``, where it is not asked for."""

from __future__ import annotations


def settle(queue, lease, settlement, *, now):
    """Settle a lease that is still ours."""
    assert list(queue.settle_many([(lease, settlement)], now=now)) == [True], "the lease is lost"


def extend(queue, lease, *, seconds, now):
    """Prolong a lease that is still ours."""
    assert list(queue.extend_many([lease], seconds=seconds, now=now)) == [True], "the lease is lost"


def begin(ledger, execution, *, now, lease):
    """Ask to run."""
    (admission,) = ledger.begin_many([execution], now=now, lease=lease)
    return admission


def finish(ledger, execution, state, record):
    """Store the end of a run; whether it was ours."""
    (ours,) = ledger.finish_many([(execution, state, record)])
    return ours
