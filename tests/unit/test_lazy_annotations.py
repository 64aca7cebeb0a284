"""Annotations are evaluated by Python 3.14 when they are asked for: what they name, and what they raise, hinders no call."""

import inspect
import re
import sys

import pytest

from safedefer import Policy, deferred
from safedefer.errors import InvalidArguments
from safedefer.execution import annotations
from safedefer.execution.annotations import _function_hints, check_annotations
from safedefer.execution.binding import _shape, check_binds
from safedefer.testing import TestApp
from tests.unit.apps import handle, make_app
from tests.zoo import lazy
from tests.zoo.exactly import carry_one

CALLS = {
    "a function": lazy.send,
    "a list of the name": lazy.send_all,
    "a dotted name": lazy.send_dotted,
    "a wrapped function": lazy.wrapped,
    "an annotation that raises": lazy.broken,
    "a class": lazy.Sender,
    "a method": lazy.Sender().method,
    "a class method": lazy.Sender.build,
    "an object": lazy.Sender(),
}


@pytest.fixture
def app():
    lazy.RAN.clear()
    app = make_app(policy=Policy(lazy.__name__), validate="annotations")
    deferred.configure(app)
    yield app
    deferred.configure(None)
    app.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_task_whose_annotations_only_type_checkers_can_follow_is_deferred_and_runs(app, name):
    task = deferred.defer(CALLS[name], "an order", count=2)
    assert handle(app, task.payload).headers["Safedefer-Outcome"] == "succeeded"
    assert lazy.RAN[-1:] == [("an order", 2)]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "a wrapped function"])
def test_wrong_arguments_are_refused_as_python_says_it(name):
    with pytest.raises(TypeError, match="too many positional|unexpected keyword"):
        check_binds(CALLS[name], ["an order", 2, 3], {})


@pytest.mark.parametrize("name", [name for name in CALLS if name != "an annotation that raises"])
def test_the_arguments_beside_are_checked_against_their_annotations(name):
    check_annotations(CALLS[name], ["an order"], {"count": 1})
    with pytest.raises(InvalidArguments, match="the argument count"):
        check_annotations(CALLS[name], ["an order"], {"count": "1"})


def test_what_the_signature_of_an_older_python_raises_hinders_no_check_of_the_arguments(monkeypatch):
    """Python 3.14 evaluates an annotation that asks for more than a name, and this one raises."""
    real, asked = inspect.signature, []

    def signature(target, **options):
        asked.append(target)
        if target is lazy.broken:
            return 1 / 0
        return real(target, **options)

    monkeypatch.setattr(inspect, "signature", signature)
    _shape.cache_clear()
    with pytest.raises(TypeError, match="too many positional"):
        check_binds(lazy.broken, ["an order", 2, 3], {})
    assert asked[0] is lazy.broken


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
@pytest.mark.parametrize("check", [check_binds, check_annotations])
def test_a_stack_or_a_memory_that_is_full_turns_no_check_off(monkeypatch, check, error):
    """They tell of the caller, and the next one may have room: nothing is remembered of the callable."""

    def full(*_args, **_options):
        raise error

    _shape.cache_clear()
    _function_hints.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "signature", full)
        with pytest.raises(error):
            check(lazy.send, ["an order"], {"count": "1", "none": 1})
    with pytest.raises((TypeError, InvalidArguments)):
        check(lazy.send, ["an order"], {"count": "1", "none": 1} if check is check_binds else {"count": "1"})


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
@pytest.mark.parametrize("step", ["_annotations", "get_type_hints"])
def test_a_full_stack_marks_no_annotation_as_unchecked(monkeypatch, step, error):
    def full(*_args, **_options):
        raise error

    _function_hints.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(annotations, step, full)
        with pytest.raises(error):
            check_annotations(lazy.send, ["an order"], {"count": 1})
    with pytest.raises(InvalidArguments, match="the argument count"):
        check_annotations(lazy.send, ["an order"], {"count": "1"})


def test_an_annotation_that_raises_is_said_to_be_unchecked(caplog):
    _function_hints.cache_clear()
    check_annotations(lazy.broken, ["an order"], {"count": 1})
    which = "all" if sys.version_info >= (3, 14) else "order"
    assert f"broken are not checked: {which};" in caplog.text


def test_a_parameter_of_ones_own_that_begins_with_an_underscore_is_found(app):
    deferred.defer(lazy.marked, "an order", _token="t")
    with pytest.raises(TypeError, match=re.escape("no option '_tokne'")):
        deferred.defer(lazy.marked, "an order", _tokne="t")


def test_an_assertion_compares_arguments_by_parameter(app):
    with TestApp(app, policy=Policy(lazy.__name__)) as tasks:
        tasks.app.defer(lazy.send, "an order")
        tasks.assert_deferred(lazy.send, order="an order", count=1)
        with pytest.raises(TypeError, match="correct the assertion"):
            tasks.assert_deferred(lazy.send, orders=1)


def test_an_object_whose_new_has_such_annotations_is_carried():
    assert carry_one(lazy.BareNew("an order"), _policy=Policy(lazy.__name__)).order == "an order"


def test_the_signature_that_a_new_claims_is_not_asked(monkeypatch):
    """Its parameters count, which Python itself will fill."""
    monkeypatch.setattr(lazy.BareNew.__new__, "__signature__", "none", raising=False)
    assert carry_one(lazy.BareNew("an order"), _policy=Policy(lazy.__name__)).order == "an order"
