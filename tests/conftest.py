"""Hypothesis profiles, the nightly tests, where temporary folders are, and what is kept of compiling.

``HYPOTHESIS_PROFILE=ci`` is derandomized. ``HYPOTHESIS_PROFILE=nightly`` searches long, and runs the tests that are marked
``nightly`` too: the long forms of what a shorter test covers every day. ``pytest -m nightly`` runs those alone.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Generator

import apsw
import pytest
from hypothesis import HealthCheck, given, settings, strategies

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("nightly", deadline=None, max_examples=5_000, suppress_health_check=list(HealthCheck))
_PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "dev")
settings.load_profile(_PROFILE)

#: A file system in memory: a commit to a SQLite file waits for no disk there.
_MEMORY = "/dev/shm"  # noqa: S108  # pytest makes a folder there that nobody else can read
_MEMORY_NEEDED = 2 * 2**30

if (
    "PYTEST_DEBUG_TEMPROOT" not in os.environ
    and os.access(_MEMORY, os.W_OK)
    and shutil.disk_usage(_MEMORY).free > _MEMORY_NEEDED
):
    os.environ["PYTEST_DEBUG_TEMPROOT"] = _MEMORY

# Many tests start an interpreter. One that keeps nothing of what it compiles, as images of containers often ask for,
# compiles all of safedefer each time, a second of work; and each process of pytest rewrites every module of tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


#: Milliseconds that a connection of a test waits for another one's lock: that of an App may be writing what is left to write.
_BUSY = 60_000


def _let_tests_wait(connection: apsw.Connection) -> None:
    """Give the connections that a test makes a busy timeout, and none to those of the product, which must say their own."""
    if sys._getframe(1).f_globals["__name__"].partition(".")[0] == "tests":
        connection.set_busy_timeout(_BUSY)


apsw.connection_hooks.append(_let_tests_wait)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``nightly``, unless it is night or it is asked for."""
    if _PROFILE == "nightly" or "nightly" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("nightly")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]


@settings(max_examples=1, database=None)
@given(strategies.none())
def _make_random_numbers(_: None) -> None:
    """Let Hypothesis make its generator of random numbers. It asks the collector who refers to that, which sees nothing frozen."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the tests themselves, which are many and stay, out of the sight of the garbage collector: it stops everything."""
    gc.disable()
    try:
        return (yield)
    finally:
        _make_random_numbers()
        gc.collect()
        gc.freeze()
        gc.enable()
