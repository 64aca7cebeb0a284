"""The list of gadgets against the standard library of the Python that runs: what reaches a sink is never admitted unnamed."""

import pytest

from safedefer.errors import PolicyViolation
from safedefer.policy import Policy
from safedefer.refs import CallableRef
from tests import gadgets


@pytest.fixture(scope="module")
def found():
    return gadgets.scan()


#: They compile what they are given, and run none of it.
ARGUED = {
    "dis:Bytecode",
    "typing:NamedTupleMeta",
    "typing:TypeVar",
    "typing:_BoundVarianceMixin",
    "typing:_TypedDictMeta",
}


def test_the_scan_finds_what_everybody_knows(found):
    known = {
        "subprocess:run",
        "subprocess:getoutput",
        "os:popen",
        "timeit:timeit",
        "runpy:run_module",
        "code:InteractiveInterpreter.runcode",
    }
    known |= {"doctest:testfile", "pdb:Pdb.default", "bdb:Bdb.run", "importlib:import_module"}
    assert known - set(found) == set()
    assert len(found) > 200


def test_every_class_that_reaches_a_sink_when_it_is_made_is_listed(found):
    """A class of the application that inherits its construction from one must not be admitted by its module."""
    assert set(gadgets.unlisted(gadgets.made_by_sinks(found))) <= ARGUED, "run: python -m tests.gadgets"


@pytest.mark.parametrize(
    "policy", [Policy("tests.sample_tasks", deferrable=True), Policy("tests.*", "builtins:len")], ids=repr
)
def test_none_of_them_is_admitted_by_a_module_pattern_or_a_mark(policy, found):
    for name in found:
        module, _, qualname = name.partition(":")
        owner, _, member = qualname.rpartition(".")
        kinds = [("classmethod", owner, member)] if owner else [("function", qualname, None), ("class", qualname, None)]
        for kind, of, part in kinds:
            if part is None or not part.startswith("__"):
                with pytest.raises(PolicyViolation):
                    policy.check(CallableRef(kind=kind, module=module, qualname=of, member=part))
