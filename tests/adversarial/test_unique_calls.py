"""Unique calls: no argument makes two different calls equal, so that one of them is not stored."""

import pytest

from tests.adversarial import victim
from tests.adversarial.forge import make_app


@pytest.fixture
def app():
    app = make_app()
    yield app
    app.close()


def told_apart(app, *calls):
    """The ids of unique calls: options, positional and named arguments."""
    ids = [app.options(**options).defer(victim.note, *args, **kwargs).id for options, args, kwargs in calls]
    return len(set(ids)) == len(ids)


def test_a_call_compared_whole_does_not_take_the_place_of_one_compared_by_names(app):
    """Whoever chose a text of the former could name the latter's parameters, and the task was not stored."""
    whole = {"unique": True}, ("total",), {"total": 1}
    by_name = {"unique": ("total",)}, ("somebody", "else"), {"total": 1}
    assert told_apart(app, whole, by_name)
    assert not told_apart(app, whole, whole)
    assert not told_apart(app, by_name, ({"unique": ("total",)}, (), {"total": 1, "more": 2}))


LOOKALIKES = {
    "a number, a truth and a float": (1, True, 1.0, "1"),
    "zeros": (0, False, 0.0, -0.0),
    "nothings": (None, "None", "", (), []),
    "a tag and a dict like one": ((1,), {"$tuple": [1]}, [{"$tuple": [1]}]),
    "texts of one shape": ("ſ", "s", "S", "ß"),
    "composed and not": ("é", "e\u0301"),
    "names and what they hold": ({"names": ["a"]}, ["names", ["a"]]),
}


@pytest.mark.parametrize("label", LOOKALIKES)
@pytest.mark.parametrize("unique", [True, ("a",)])
def test_what_only_looks_alike_is_not_the_same_call(app, label, unique):
    assert told_apart(app, *(({"unique": unique}, (), {"a": value}) for value in LOOKALIKES[label]))


def test_names_and_values_do_not_run_into_each_other(app):
    calls = [
        ({"unique": ("a", "b")}, (), {"a": 1, "b": 2}),
        ({"unique": ("a", "b")}, (), {"a": 2, "b": 1}),
        ({"unique": ("a",)}, (), {"a": 1, "b": 2}),
        ({"unique": ("b",)}, (), {"a": 1, "b": 2}),
        ({"unique": True}, (), {"a": 1, "b": 2}),
        ({"unique": True}, ("a", "b"), {"a": 1, "b": 2}),
        ({"unique": True}, (["a", "b"],), {"a": 1, "b": 2}),
        ({"unique": True, "queue": "mail"}, (), {"a": 1, "b": 2}),
        ({"unique": True, "unique_until": "start"}, (), {"a": 1, "b": 2}),
        ({"unique": ("a", "b"), "unique_until": "start"}, (), {"a": 1, "b": 2}),
    ]
    assert told_apart(app, *calls)
