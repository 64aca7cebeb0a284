"""The short forms of the chaos scenarios; ``python -m tests.chaos`` runs the long ones."""

from __future__ import annotations

import subprocess
import tempfile

import pytest

from tests.chaos import deaths, places, storage, workers


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", name], capture_output=True)
        if not mounted.returncode:
            subprocess.run(["umount", name], check=True)
    return not mounted.returncode


def test_sigkill_of_any_process_loses_nothing_and_every_second_run_is_explained():
    deaths.kills(seed=5, tasks=500, least=3, per_second=150.0)


@pytest.mark.nightly  # by day: acceptance/test_supervisor kills and freezes workers one by one
def test_killed_frozen_and_overtaken_workers_lose_nothing_either():
    workers.kills(seed=5, tasks=400, least=3, per_second=100.0)


def test_without_kills_nothing_runs_twice():
    deaths.calm(tasks=300)


def test_a_handler_that_is_down_charges_no_attempt():
    deaths.down(tasks=50, seconds=1.0)


def test_a_dispatcher_that_was_stopped_settles_nothing_of_what_others_have():
    deaths.stopped(tasks=60, lease=2.0)


def test_sigterm_ends_well_and_leaves_nothing_claimed():
    deaths.terms(times=2)


def test_a_task_that_takes_its_process_along_ends_in_the_dead_letters():
    deaths.exits(dying=1, neighbours=40, lease=2.0)


def test_a_transactional_task_runs_if_and_only_if_its_order_was_committed():
    deaths.orders(orders=150, least=2, spacing=1.2)


def test_a_limit_on_the_file_is_raised_to_the_caller_and_loses_nothing():
    storage.limited(tasks=150, kilobytes=300)


@pytest.mark.nightly  # by day: a limit on the file, above
def test_a_full_disk_is_raised_to_the_caller_and_loses_nothing():
    if can_mount():
        storage.full(tasks=600, megabytes=2)
    else:  # the other test of this file fills what it can without rights
        storage.limited(tasks=400, kilobytes=400)


def test_a_locked_database_is_waited_for():
    storage.locked(tasks=300, seconds=2.0)


@pytest.mark.parametrize("who", ["dispatcher", pytest.param("handler", marks=pytest.mark.nightly)])
def test_a_clock_that_jumps_loses_nothing(who):
    places.clock(who=who, tasks=60, shift=3600.0 if who == "dispatcher" else -3600.0, seconds=2.0)


def test_a_log_that_was_cut_anywhere_leaves_a_whole_database():
    storage.cut(tasks=200, offsets=12)


def test_one_token_posted_at_once_to_two_handlers_runs_once():
    places.replay(posts=200)


def test_one_rate_and_one_cap_hold_for_several_dispatchers():
    places.rates(tasks=50, dispatchers=2)


def test_producers_and_a_handler_in_forked_children_lose_nothing():
    places.forks(children=2, each=50)


def test_much_that_waits_slows_nothing_down():
    # A low bar: what it is for is a look at every task that waits, which would be a hundred times slower.
    storage.million(pending=30_000, sample=200, bar=0.1)
