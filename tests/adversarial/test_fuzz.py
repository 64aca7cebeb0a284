"""A bounded run of every fuzz target, by Hypothesis: seeds from the vectors and the corpus, changed at random."""

import random
import sys
import time
from _thread import start_new_thread
from pathlib import Path
from zoneinfo import TZPATH

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz import fuzz_claims, fuzz_handler, fuzz_pickle, fuzz_references, fuzz_token, fuzz_typed
from fuzz.audit import Reached, nothing_happens
from fuzz.harness import changed, corpus
from tests.strategies import tagged_trees

TARGETS = {
    "token": fuzz_token,
    "claims": fuzz_claims,
    "typed": fuzz_typed,
    "pickle": fuzz_pickle,
    "references": fuzz_references,
    "handler": fuzz_handler,
}
SEEDS = {name: [*target.seeds(), *corpus(name)] for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_and_every_crash_of_the_past_passes(name):
    for seed in SEEDS[name]:
        TARGETS[name].one_input(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_a_bounded_run_finds_nothing(name):
    target, seeds = TARGETS[name], SEEDS[name]

    @settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.one_of(
            st.binary(max_size=200), st.integers(0, 2**64 - 1).map(lambda seed: changed(random.Random(seed), seeds))
        )
    )
    def run(data):
        target.one_input(data)

    run()


@settings(max_examples=200, deadline=None)
@given(tagged_trees)
def test_trees_that_are_nearly_right_do_nothing_either(tree):
    import json

    fuzz_typed.one_input(json.dumps(tree).encode())


@pytest.mark.parametrize(
    "act",
    [
        lambda: eval("1"),
        lambda: exec("pass"),
        lambda: __import__("this_module_is_not_there"),
        lambda: Path("/dev/null").write_text(""),
        lambda: Path("/dev/zero").open("rb").close(),
        lambda: Path("/home/zoneinfo/.ssh/id_rsa").open("rb").close(),
        lambda: Path(TZPATH[0], "../../../dev/zero").open("rb").close(),
        lambda: __import__("socket").socket().close(),
        lambda: __import__("os").system("true"),
        lambda: __import__("subprocess").Popen(["true"]).wait(),
        lambda: __import__("pickle").loads(b"cos\ngetcwd\n."),
    ],
)
def test_the_audit_hook_sees_what_it_is_there_to_see(act):
    """The control: without it, no target could fail."""
    with pytest.raises(Reached), nothing_happens():
        try:
            act()
        except (ImportError, FileNotFoundError):
            pass


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="from 3.12 on, threads do not refuse each other")
def test_the_audit_hook_keeps_no_thread_from_being_traced():
    """One of Python code lets other threads run within ``sys.settrace``, which refuses the one that begins meanwhile."""
    refused, ended, number = [], [], 8_000

    def begin():
        try:
            sys.settrace(lambda *_: None)
            sys.settrace(None)
        except RuntimeError as error:
            refused.append(error)
        ended.append(1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(number // 20):
            for _ in range(20):
                start_new_thread(begin, ())
            time.sleep(0.001)
        while len(ended) < number:
            time.sleep(0.01)
    finally:
        sys.setswitchinterval(interval)
    assert refused == []
