"""The short forms of the chaos scenarios over PostgreSQL; ``python -m tests.chaos --queue postgres`` runs the long ones."""

from __future__ import annotations

import pytest

from tests.chaos import deaths, machines


@pytest.mark.nightly  # by day: test_postgres_broken ends connections and servers, test_chaos kills processes
def test_several_machines_lose_nothing_whoever_dies_the_server_too():
    machines.several(seed=3, tasks=300, least=3, restarts=1, per_second=90.0, later_every=10**9)


@pytest.mark.nightly  # by day: test_postgres_broken stops the server under producers and dispatchers
def test_an_outage_of_the_server_charges_nothing_and_all_go_on_by_themselves():
    machines.outage(seconds=5.5, around=1.0, per_second=50.0, lease=15.0)


@pytest.mark.nightly  # by day: test_chaos does so on SQLite, and the contract of engines refuses a stale settlement on each
def test_a_dispatcher_that_was_stopped_settles_nothing_of_what_others_have():
    deaths.stopped(tasks=120, lease=2.0, store="postgres")
