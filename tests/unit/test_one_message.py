"""One message says all that a call lacks, with what it says to write instead: after doing so, the call is right."""

import asyncio
import functools
import os
import threading
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safedefer import Policy, TaskRetryOptions, deferred
from safedefer.codecs import obstacles
from safedefer.codecs.shared import Obstacles
from safedefer.codecs.typed import TypedCodec
from safedefer.errors import (
    BadTransactionStateError,
    DeferError,
    InvalidEtaError,
    InvalidTaskError,
    InvalidTaskNameError,
    NotDeferrable,
    UnencodableArgument,
    UnknownQueueError,
)
from safedefer.refs import UNBOUND
from tests import sample_tasks as tasks
from tests.unit.apps import make_app
from tests.zoo import far

TAKE = tasks.take
#: How many refusals are told at most.
MOST = 8


@pytest.fixture
def make():
    """Return a function that makes the app of ``deferred``, and has it closed."""
    made = []

    def new(*patterns, **more):
        metaclasses = more.pop("metaclasses", ())
        made.append(make_app(policy=Policy("tests.sample_tasks", *patterns, metaclasses=metaclasses), **more))
        deferred.configure(made[-1])
        return made[-1]

    far.RAN.clear()
    yield new
    assert far.RAN == []
    deferred.configure(None)
    for app in made:
        app.close()


def names(*qualnames):
    return tuple(f"{far.__name__}:{each}" for each in qualnames)


def refused(app, obj, *args, **kwargs):
    with pytest.raises((DeferError, TypeError)) as caught:
        deferred.defer(obj, *args, **kwargs)
    assert app.queue.tasks() == []
    return caught.value


def raised(*values):
    try:
        try:
            raise far.Failed(far.Plain())
        except far.Failed as error:
            raise ValueError(*values) from error
    except ValueError as error:
        return error


PLAIN, POINT = far.Plain(), far.Point(1, 2)
INSTEAD = {
    "partial": ((functools.partial(far.run, PLAIN, k=[far.Colour.RED]), POINT), (far.run, PLAIN, POINT), ("run", "Plain", "Colour", "Point")),
    "method of a partial": ((functools.partial(POINT.move, PLAIN),), (POINT.move, PLAIN), ("Point.move", "Point", "Plain")),
    "partial argument": ((TAKE, {"f": functools.partial(far.run, PLAIN)}), (TAKE, far.run, PLAIN), ("run", "Plain")),
    "partial in a partial": ((TAKE, functools.partial(print, functools.partial(far.run))), (TAKE, print, far.run), ("run",)),
    "views": ((TAKE, {"a": PLAIN}.values(), {far.Colour.RED: 1}.keys(), {1: POINT}.items()), (TAKE, [PLAIN], [far.Colour.RED], [(1, POINT)]), ("Plain", "Colour", "Point")),
    "namespace": ((TAKE, [SimpleNamespace(a=PLAIN, b=[POINT])]), (TAKE, [{"a": PLAIN, "b": [POINT]}]), ("Plain", "Point")),
    "raised": ((TAKE, raised(POINT)), (TAKE, ValueError(POINT), far.Failed(PLAIN)), ("Point", "Failed", "Plain")),
    "unbound method": ((far.Point.move, POINT, PLAIN), (POINT.move, PLAIN), ("Point.move", "Point", "Plain")),
}  # fmt: skip


@pytest.mark.parametrize("label", INSTEAD)
def test_what_is_to_be_passed_instead_is_looked_at_too(make, label):
    call, instead, missing = INSTEAD[label]
    app = make()
    error = refused(app, *call, far.Note(text="x"))
    ours = [pattern for pattern in error.missing if pattern.startswith(far.__name__)]
    assert sorted(ours) == sorted(names(*missing, "Note"))
    assert all(f"'{pattern}'" in str(error) for pattern in error.missing)
    assert str(error).count("partial objects") <= 1
    make(*error.missing)
    assert deferred.defer(*instead)


def test_what_a_partial_holds_and_cannot_travel_is_told_by_its_path(make):
    error = refused(make(), TAKE, [functools.partial(far.run, lambda: 1, key=threading.Lock())], POINT)
    assert error.missing == names("run", "Point")
    assert "$.args[0][0].args[0] (function) cannot be carried: a lambda" in str(error)
    assert "$.args[0][0].keywords.key (_thread.lock) cannot be carried" in str(error)


def test_a_partial_that_holds_itself_is_looked_at_once(make):
    own = []
    own.append(functools.partial(far.run, own))
    assert refused(make(), TAKE, own, POINT).missing == names("run", "Point")


def test_an_unbound_method_without_its_object_lacks_no_pattern(make):
    assert refused(make(), far.Point.move).missing == ()
    assert refused(make(), far.Point.move, 1, PLAIN).missing == names("Plain")
    assert refused(make(), far.Point.move, None, PLAIN).missing == names("Plain")


def test_a_class_lacks_its_pattern_beside_what_is_wrong_with_its_base(make, monkeypatch):
    class Inner:
        def __getstate__(self):
            raise AssertionError

        def __setstate__(self, state):
            raise AssertionError

    monkeypatch.setattr(far, "Heir", type("Heir", (Inner,), {"__module__": far.__name__}), raising=False)
    error = refused(make(), TAKE, [far.Heir(), far.Heir()], POINT)
    assert set(error.missing) == set(names("Heir", "Point"))
    assert "Inner is defined inside a function; move it" in str(error)


def deep():
    held = []
    for _ in range(100):
        held = [held]
    return held


def chained():
    error = ValueError()
    for _ in range(2 * MOST):
        try:
            raise KeyError from error
        except KeyError as raised:
            error = raised
    return error


@pytest.mark.parametrize("make_value", [
    chained, lambda: SimpleNamespace(a=deep()), lambda: functools.partial(TAKE, *(threading.Lock() for _ in range(2 * MOST))),
], ids=["many exceptions", "deep", "many locks"])  # fmt: skip
def test_what_is_wrong_instead_keeps_nothing_beside_it_from_being_told(make, make_value):
    assert refused(make(), TAKE, [make_value(), POINT], PLAIN).missing == names("Point", "Plain")


@pytest.fixture
def looks(monkeypatch):
    """Return the values that are looked at for a message. A look at too many fails, so that nothing more is told."""
    seen, look_at = [], obstacles._SurveyingEncoder.value

    def count(self, value, depth):
        seen.append(value)
        if len(seen) > 300_000:  # noqa: PLR2004
            raise RuntimeError("it goes on")
        look_at(self, value, depth)

    monkeypatch.setattr(obstacles._SurveyingEncoder, "value", count)
    return seen


def test_all_that_is_to_be_passed_instead_holds_no_more_together_than_a_call(make, looks):
    parts = [SimpleNamespace(a=[[i] for i in range(60_000)]) for _ in range(MOST - 1)]
    assert refused(make(), TAKE, parts, POINT).missing == names("Point")
    assert len(looks) < 150_000  # noqa: PLR2004 - a list and what is in it are two values


def test_what_several_values_hold_is_looked_at_once(make, looks):
    held = PLAIN
    for _ in range(MOST - 1):
        held = SimpleNamespace(**{f"a{i}": held for i in range(30)})  # 30 ** 7 ways lead to the innermost
    error = refused(make(), TAKE, held)
    assert error.missing == names("Plain")
    assert len(looks) < 5_000  # noqa: PLR2004
    assert len(str(error)) < 2_000  # noqa: PLR2004


@pytest.mark.parametrize("value", [
    {i: (i, i) for i in range(40_000)}.items(), functools.partial(TAKE, *[[i] for i in range(60_000)]), {i: i for i in range(100_001)}.keys(),
    SimpleNamespace(a=[[i] for i in range(60_000)]),
], ids=["view", "partial", "large view", "namespace"])  # fmt: skip
def test_more_than_a_call_may_hold_keeps_nothing_beside_it_from_being_told(make, value):
    error = refused(make(), TAKE, [value, threading.Lock(), POINT], {far.Colour.RED: value}, PLAIN)
    assert set(error.missing) == set(names("Point", "Colour", "Plain"))
    assert "_thread.lock" in str(error)


def test_the_bases_whose_hooks_will_run_are_named_with_the_class(make):
    error = refused(make(), TAKE, far.Inherits(), {far.Sealed.__new__(far.Sealed)}, POINT)
    assert error.missing == names("Inherits", "ByState", "Sealed", "Loud", "Point")
    error = refused(make(), TAKE, far.Sealed(), POINT)
    assert error.missing == names("Sealed", "Point")  # no key, so nothing asks for its hash
    far.RAN.clear()


def of_meta(value):
    made = object.__new__(far.OfMeta)
    made.value = [value]
    return made


@pytest.mark.parametrize("call", [
    (TAKE, of_meta(PLAIN)), (TAKE, [of_meta(PLAIN)], far.OfMeta), (TAKE, far.Holder([of_meta(PLAIN)])), (TAKE, far.Holder(far.OfMeta), PLAIN),(of_meta(PLAIN).go,), (far.OfMeta.of, PLAIN), (far.OfMeta, PLAIN),
])  # fmt: skip
def test_a_metaclass_is_told_with_the_patterns_of_its_class(make, call):
    error = refused(make(), *call)
    assert f"SAFEDEFER_METACLASSES={far.__name__}:Meta" in str(error)
    assert set(error.missing) - set(names("Holder")) == set(names("OfMeta", "Plain"))
    make(*error.missing, metaclasses=[far.Meta])
    assert deferred.defer(*call)


def test_an_entity_with_attributes_of_its_own_is_looked_into(make):
    pytest.importorskip("google.cloud.ndb")
    from tests.zoo import shelf  # noqa: PLC0415 - it needs ndb

    book = shelf.Book(notes={"a": PLAIN})
    book.extra = POINT
    error = refused(make(), TAKE, book)
    assert str(error).startswith(f"$.args[0] ({shelf.__name__}.Book) cannot be carried: the entity has attributes")
    assert sorted(error.missing) == sorted((f"{shelf.__name__}:Book", *names("Plain", "Point")))
    del book.__dict__["extra"]
    make(*error.missing)
    assert deferred.defer(TAKE, book, POINT)
    error = refused(make(), TAKE, [book])
    assert str(error).startswith(
        f"$.args[0][0] ({shelf.__name__}.Book) cannot be carried: the class {shelf.__name__}:Book is not"
    )
    book.notes = [1, {"k": threading.Lock()}]
    error = refused(make(f"{shelf.__name__}:Book"), TAKE, [book])
    assert error.path == "$.args[0][0].notes[1].k"


def test_what_was_added_to_a_key_is_looked_at(make):
    ndb = pytest.importorskip("google.cloud.ndb")
    from google.cloud.datastore.key import Key  # noqa: PLC0415 - as above

    key = ndb.Key._from_ds_key(Key("A", 1, project="p"))
    key.extra = [POINT]
    assert refused(make(), TAKE, key).missing == names("Point")


LEAVES = st.sampled_from([
    lambda: 1, far.Plain, lambda: far.Colour.RED, lambda: far.Colour, lambda: far.run, lambda: POINT.move, lambda: far.Point.make, lambda: list[far.Plain],
    lambda: far.Frozen(1), lambda: far.Note(text="x"), threading.Lock, lambda: lambda: 1, lambda: far.Page[int](items=[1]), lambda: far.OfMeta,
])  # fmt: skip
AROUND = st.sampled_from([
    lambda each: [each], lambda each: {"k": each}, lambda each: {"k": each}.values(), lambda each: functools.partial(far.run, each, k=each), raised, of_meta,
    lambda each: far.Point(each, 1), lambda each: far.Pair(each, each), lambda each: SimpleNamespace(a=each), lambda each: far.Failed(each),
])  # fmt: skip


@given(st.lists(st.tuples(LEAVES, st.lists(AROUND, max_size=4)), max_size=4))
def test_doing_what_a_message_says_of_the_policy_brings_no_news(parts):
    values = []
    for leaf, around in parts:
        values.append(leaf())
        for wrap in around:
            values[-1] = wrap(values[-1])
    codec, call = TypedCodec(), (UNBOUND, values, {})
    first = codec.obstacles(call, Policy())
    second = codec.obstacles(call, Policy(*first.missing, metaclasses=[far.Meta]))
    told = [refusal.rpartition("; ")[0] for refusal in first.refusals.values()]
    if len(told) < MOST and not any("it holds" in each for each in told):
        assert second.missing == ()
        assert {refusal.rpartition("; ")[0] for refusal in second.refusals.values()} <= set(told)
    if second == Obstacles():
        codec.encode(call, Policy(*first.missing, metaclasses=[far.Meta]))


NAIVE = datetime(2030, 1, 1)  # noqa: DTZ001 - what is refused
OPTIONS = {
    "naive eta": ({"_eta": NAIVE}, InvalidEtaError, ["eta has no time zone"]),
    "several": (
        {"_eta": NAIVE, "_countdown": 5, "_queue": "a_b", "_name": "a b", "_url": "x", "_deadline": 0, "_retry_options": 3},
        InvalidTaskError,
        ["not both", "no time zone", "'a_b'", "a task's name", "a task's URL", "deadline is", "retry_options is a builtins.int"],
    ),
    "headers": ({"_headers": {"Host": "a", "X-AppEngine-B": "b", "X-Own": "ü"}}, InvalidTaskError, ["Host", "X-AppEngine-B", "X-Own"]),
    "unknown and wrong": ({"_quue": "a", "_small_task": True, "_eta": NAIVE}, TypeError, ["_quue", "_small_task", "no time zone"]),
    "no transaction": ({"_transactional": True}, BadTransactionStateError, ["needs a transaction"]),
    "no transaction nor queue": ({"_transactional": True, "_queue": "other"}, BadTransactionStateError, ["needs a transaction", "no queue other"]),
    "too late": ({"_eta": datetime(2090, 1, 1, tzinfo=UTC)}, UnencodableArgument, ["within 30 days"]),
    "queue and target": ({"_queue": "other", "_target": "nobody"}, UnknownQueueError, ["no queue other", "no target nobody"]),
    "target": ({"_target": "nobody"}, InvalidTaskError, ["no target nobody"]),
    "target of another": ({"_target": "b", "_url": "http://a/x", "_name": "a b"}, InvalidTaskError, ["an absolute URL", "a task's name"]),
}  # fmt: skip


def _parts(error):
    return str(error).replace("; for the same call, ", "; ").split("; ")


@pytest.mark.parametrize("label", OPTIONS)
def test_options_and_arguments_are_refused_in_one_message(make, label):
    options, kind, words = OPTIONS[label]
    app = make(queues=["default"], targets={"a": "http://a", "b": "http://b"})
    error = refused(app, TAKE, [PLAIN], {"f": lambda: 1}, own=POINT, **options)
    assert isinstance(error, kind)
    for each in (*words, *(f"'{pattern}'" for pattern in names("Plain", "Point")), "a lambda"):
        assert str(error).count(each) == 1, (each, str(error))
    assert str(error).count("for the same call") == 1
    with pytest.raises(kind) as caught:
        asyncio.run(deferred.defer_async(TAKE, [PLAIN], {"f": lambda: 1}, own=POINT, **options))
    assert sorted(_parts(caught.value)) == sorted(_parts(error))
    make(*names("Plain", "Point"))
    assert deferred.defer(TAKE, [PLAIN], {"f": TAKE}, own=POINT)


def test_an_option_is_not_refused_for_want_of_another(make):
    app = make(targets={"a": "http://a", "b": "http://b"})
    with pytest.raises(InvalidTaskError) as caught:
        app.options(unique=True, unique_until="start", target="b", url="http://b/x", name="a", queue="a_b")
    assert sorted(str(caught.value).split("; for the same call, ")) == [
        "a unique task has no name; leave one of the two out",
        "the queue is 1 to 100 characters of A-Z a-z 0-9 . -, not 'a_b'",
    ]


def test_a_call_that_lacks_nothing_else_is_refused_for_its_option_alone(make):
    app = make()
    error = refused(app, TAKE, 1, _eta=NAIVE, _retry_options=TaskRetryOptions())
    assert "for the same call" not in str(error)
    error = refused(app, TAKE, PLAIN, _queue="a_b", _pickle=True)  # a pickle takes what no pattern names
    assert "for the same call" not in str(error)
    assert refused(app, far.run, 1, _limit=5).args[0].count("may not run") == 1


def test_an_admitted_hook_that_fails_leaves_the_refusal_of_an_option_as_it_is(make, monkeypatch):
    app = make()
    monkeypatch.setattr(type(app._builder), "serialize", lambda *args: 1 / 0)
    assert str(refused(app, TAKE, 1, _queue="a_b")).endswith("not 'a_b'")


class Odd:
    def __bool__(self):
        raise RuntimeError("it has no truth")


class Headers(dict):
    def items(self):
        raise RuntimeError("it has no items")


def test_what_an_option_is_does_not_replace_its_refusal(make):
    app = make()
    assert "pickle is True or False" in str(refused(app, TAKE, 1, _pickle=Odd()))
    with pytest.raises(InvalidTaskNameError, match="a task's name"):
        app.options(name="a b", headers=Headers(a="b"))


def test_of_many_headers_some_are_told(make):
    app = make()
    error = refused(app, TAKE, 1, _headers={f"x-google-{i}": "1" for i in range(500)}, _name="a b")
    assert isinstance(error, InvalidTaskNameError)
    assert str(error).count("is written by the delivery") == MOST


def test_nothing_is_pickled_for_a_message(make, monkeypatch):
    ran = []
    monkeypatch.setattr(tasks, "Pickled", type("Pickled", (), {
        "__module__": tasks.__name__, "__getstate__": lambda self: ran.append("state"),
    }), raising=False)  # fmt: skip
    app = make(queues=["default"], allow_pickle=True)
    value = tasks.Pickled()
    assert isinstance(refused(app, TAKE, value, _queue="other", _pickle=True), UnknownQueueError)
    assert isinstance(refused(app, TAKE, value, _transactional=True, _pickle=True), BadTransactionStateError)
    assert ran == []


def test_an_unknown_option_is_refused_as_such_where_no_app_can_be_made(monkeypatch):
    for name in [name for name in os.environ if name.startswith("SAFEDEFER_")]:
        monkeypatch.delenv(name)
    deferred.configure(None)
    with pytest.raises(TypeError, match="no option '_quue'"):
        deferred.defer(TAKE, 1, _quue="x")
    with pytest.raises(TypeError, match="no option '_quue'"):
        asyncio.run(deferred.defer_async(TAKE, 1, _quue="x"))


def test_the_loop_goes_on_while_a_refused_call_is_looked_at(make, monkeypatch):
    app, threads = make(), []
    monkeypatch.setattr(type(app._builder), "serialize", lambda *args: threads.append(threading.current_thread()))
    with pytest.raises(InvalidTaskNameError):
        asyncio.run(deferred.defer_async(TAKE, 1, _name="a b"))
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_the_errors_of_a_call_are_those_that_it_has_by_itself(make):
    app = make()
    assert isinstance(refused(app, far.run, POINT), NotDeferrable)
    assert isinstance(refused(app, TAKE, POINT), UnencodableArgument)
