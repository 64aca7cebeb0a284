"""Arguments as rows: bounded, typed by the tags of the wire format, never decoded."""

from dataclasses import replace

import pytest

from safedefer.dashboard.arguments import arguments_of, search_text
from safedefer.dashboard.obstacles import last_error
from safedefer.delivery.redaction import exception_type, redacted_traceback
from safedefer.ledger import AttemptRecord
from tests import sample_tasks
from tests.unit.apps import make_app


def claims_of(*args, **kwargs):
    app = make_app()
    return app.authenticate(app.queue.find(app.defer(sample_tasks.keywords, **kwargs).id).token) | {"args": list(args)}


def rows(*args, **kwargs):
    found = arguments_of(claims_of(*args, **kwargs))
    return [(row.depth, row.name, row.kind, row.text) for row in found.rows], found.is_cut


def test_values_have_their_names_types_and_depth():
    assert rows([1, {"a": None}], x=2.5, t=(1,)) == (
        [
            (0, "0", "list", "2 items"), (1, "0", "int", "1"), (1, "1", "dict", "1 item"), (2, "a", "None", "None"),
            (0, "x", "float", "2.5"), (0, "t", "tuple", "1 item"), (1, "0", "int", "1"),
        ],
        False,
    )  # fmt: skip


def test_a_bound_object_is_shown_first():
    claims = claims_of(1)
    claims["call"] = {**claims["call"], "bound": {"$object": ["m:C", {}]}}
    assert arguments_of(claims).rows[0].name == "self"


def test_long_texts_many_rows_and_deep_values_are_cut():
    (row,), is_cut = rows("x" * 5_000)
    assert (len(row[3]), is_cut) == (2_001, False)
    many, is_cut = rows([0] * 5_000)
    assert (len(many), is_cut) == (500, True)
    deep = 1
    for _ in range(60):
        deep = [deep]
    found, _ = rows(deep)
    assert found[-1][3] == "… (deeper values are not shown)"
    assert max(row[0] for row in found) == 12


def test_arguments_are_searched_as_the_token_spells_them():
    assert "4711" in search_text(claims_of(order=4711))
    assert search_text(claims_of(order=4711) | {"cty": "pickle"}) == ""


@pytest.fixture
def error_of():
    """The last error of a task whose newest attempt is this."""
    app = make_app()
    view = app.queue.find(app.defer(sample_tasks.add, 1).id)
    assert last_error(view) == ""

    def error(**changes):
        record = AttemptRecord(view.id, "a", 1.0, 2.0, "retry", 500)._replace(**changes)
        return last_error(replace(view, records=[record]))

    yield error
    app.close()


class Quiet(Exception):
    pass


def noted():
    error = ValueError("no address")
    error.add_note("the second line")
    return error


def caused():
    error = ValueError("outer\nmore")
    error.__cause__ = KeyError("inner")
    return error


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        pytest.param(ValueError("no address\nfor Ann\n"), "ValueError: no address", id="several lines"),
        pytest.param(ValueError(""), "ValueError", id="no text"),
        pytest.param(ValueError("\n\nlate"), "ValueError:", id="an empty first line"),
        pytest.param(noted(), "ValueError: no address", id="a note"),
        pytest.param(caused(), "ValueError: outer", id="a cause"),
        pytest.param(Quiet("a\nb"), f"{__name__}.Quiet: a", id="a class of the user's"),
        pytest.param(Quiet(), f"{__name__}.Quiet", id="the same without a text"),
        pytest.param(
            ExceptionGroup("two failed", [ValueError("a\nb"), KeyError("c")]),
            "ExceptionGroup: two failed (2 sub-exceptions)",
            id="a group",
        ),
        pytest.param(SyntaxError("bad", ("f.py", 1, 1, "x y\n")), "SyntaxError: bad", id="a syntax error"),
    ],
)
def test_the_last_error_is_the_type_and_the_first_line_of_its_text(error_of, raised, shown):
    try:
        raise raised
    except Exception as error:
        recorded = {"exception_type": exception_type(error), "traceback": redacted_traceback(error)}
    assert error_of(**recorded) == shown


def test_the_last_error_is_cut_and_is_the_last_line_of_a_text_that_is_no_traceback(error_of):
    error = error_of
    assert error() == ""
    assert error(exception_type="a.B") == "a.B"
    assert error(traceback="Traceback\n  x\na.B: no\n\n") == "a.B: no"
    assert len(error(traceback="x" * 5_000)) == 301
    assert error(outcome="succeeded", traceback="a.B: old") == ""
