"""A refusal names all that keeps a call from being deferred, and to find it out runs nothing of a class that is not admitted."""

import sys
import threading
from collections import Counter, OrderedDict, defaultdict
from datetime import date

import pytest

from safedefer import Key, Keyring, KeyState, Policy
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.typed import TypedCodec
from safedefer.errors import NotDeferrable, UnencodableArgument
from safedefer.options import Limits
from safedefer.policy import deferrable
from safedefer.refs import UNBOUND
from safedefer.sending.advice import tell_all
from tests import sample_tasks as tasks
from tests.unit.apps import make_app
from tests.zoo import far, near

FAR, NEAR = far.__name__, near.__name__


@pytest.fixture
def app():
    far.RAN.clear()
    app = make_app(policy=Policy("tests.sample_tasks"))
    yield app
    app.close()
    assert far.RAN == []


def refused(app, obj, *args, **kwargs):
    with pytest.raises((NotDeferrable, UnencodableArgument)) as caught:
        app.defer(obj, *args, **kwargs)
    assert app.queue.tasks() == []
    return caught.value


def names(*qualnames):
    return tuple(f"{FAR}:{each}" for each in qualnames)


def test_one_refusal_names_the_callable_and_every_class_of_the_arguments(app):
    error = refused(
        app, far.run, [far.Point(1, far.Colour.RED)], {"pair": far.Pair(1, far.Note(text="x"))}, kind=far.Plain
    )
    assert isinstance(error, NotDeferrable)
    assert error.missing == names("run", "Point", "Colour", "Pair", "Note", "Plain")
    assert str(error).startswith(f"{FAR}:run may not run: no pattern admits it; add '{FAR}:run' or its module")
    assert all(f"'{pattern}'" in str(error) for pattern in error.missing)
    app = make_app(policy=Policy(*error.missing))
    assert app.defer(far.run, [far.Point(1, far.Colour.RED)], {"pair": far.Pair(1, far.Note(text="x"))}, kind=far.Plain)
    app.close()


def test_the_first_value_is_named_by_its_path_and_the_others_by_theirs(app):
    error = refused(app, tasks.take, a=[far.Plain()], b=threading.Lock(), c=lambda: 1, d={"x": [iter([])]})
    assert error.path == "$.kwargs.a[0]"
    assert error.missing == names("Plain")
    for path in ("$.kwargs.b (_thread.lock)", "$.kwargs.c (function)", "$.kwargs.d.x[0] (list_iterator)"):
        assert f"{path} cannot be carried" in str(error)
    assert str(error).count("Plain") == 3


def test_arguments_that_do_not_fit_are_told_beside_the_policy(app):
    error = refused(app, far.Plain, 1, 2, far.Colour.RED)
    assert "it does not take these arguments" in str(error)
    assert error.missing == names("Plain", "Colour")
    with pytest.raises(TypeError, match=rf"does not take these arguments.*; for the same call, add '{FAR}:Colour'"):
        app.defer(tasks.add, 1, 2, 3, 4, 5, far.Colour.RED)


@pytest.mark.parametrize(("make", "advice"), [
    (lambda: near.Child, f"add '{NEAR}:Child' to the policy"), (lambda: near.Own, f"add '{NEAR}:Own' or its module to the policy"),
    (lambda: near.Moved(1, 2).move, f"add '{NEAR}:Moved.move' to the policy"), (lambda: near.Moved(1, 2).own, f"add '{NEAR}:Moved.own' or its module to"),
    (lambda: near.Moved.make, f"add '{NEAR}:Moved.make' to the policy"), (lambda: near.run, f"add '{NEAR}:run' or its module to the policy"),
])  # fmt: skip
def test_a_module_is_advised_only_where_its_pattern_admits_the_callable(app, make, advice):
    assert advice in str(refused(app, make()))


def test_a_function_that_a_decorator_made_is_told_with_what_the_decorator_lacks(app):
    def inner(): ...

    assert "use functools.wraps in the decorator" in str(refused(app, inner))


def test_a_refusal_that_is_alone_is_told_as_before(app):
    error = refused(app, tasks.take, far.Plain())
    assert "for the same call" not in str(error)
    error = refused(app, lambda: far.Plain())
    assert (error.reason, error.missing) == ("lambda", ())
    assert "for the same call" not in str(error)


def test_what_is_no_callable_is_not_looked_into(app):
    error = refused(app, "text", 1)
    assert error.reason == "not-callable"
    error = refused(app, far.Colour.__str__, far.Colour.RED)
    assert error.missing == names("Colour")


@pytest.mark.parametrize("make", [far.Closed, far.ByState, far.Made, far.WithArgs, far.Inherits])
def test_no_hook_of_a_class_runs_before_it_is_admitted_and_the_message_says_that_more_may_come(app, make):
    error = refused(app, tasks.take, [make(), make()], more=far.Colour.RED)
    bases = [base.__name__ for base in make.__mro__[1:-1]]
    assert error.missing == names(make.__name__, *bases, "Colour")
    assert "more may be missing once" in str(error)


def test_a_hook_that_an_admitted_class_inherits_does_not_run_either():
    far.RAN.clear()
    app = make_app(policy=Policy("tests.sample_tasks", f"{FAR}:Inherits"))
    error = refused(app, tasks.take, far.Inherits(), far.Colour.RED)
    assert error.missing == names("ByState", "Colour")
    assert far.RAN == []
    app.close()


def test_the_new_of_a_base_without_a_pattern_does_not_run():
    values = [far.Heir.__new__(far.Heir, 1), far.Number(2)]
    app = make_app(policy=Policy("tests.sample_tasks", f"{FAR}:Heir"))
    far.RAN.clear()
    error = refused(app, tasks.take, object(), *values, far.Colour.RED)
    assert error.missing == names("Number", "Colour")
    assert far.RAN == []
    app.close()


@pytest.mark.parametrize("make", [set, frozenset, dict.fromkeys, OrderedDict.fromkeys, Counter])
def test_no_key_is_asked_for_its_hash(app, make):
    keys = make([far.Loud() for _ in range(100)])
    far.RAN.clear()
    assert refused(app, tasks.take, object(), keys, far.Colour.RED).missing == names("Loud", "Colour")


def test_no_signature_of_a_refused_callable_is_asked_for(app):
    far.RAN.clear()
    assert "does not take" not in str(refused(app, far.signed, 1))
    assert "does not take" not in str(refused(app, far.OfCalled, 1, 2))
    assert "does not take these arguments: missing a required argument: 'by'" in str(refused(app, far.Point(1, 2).move))
    assert "does not take these arguments: too many" in str(refused(app, far.Holder, 1, 2))


def test_a_registered_type_is_not_encoded_before_its_class_is_admitted(app):
    assert refused(app, tasks.take, [far.Registered(1)]).missing == names("Registered")


def test_a_generic_model_is_not_made_again_before_it_is_admitted(app):
    assert refused(app, tasks.take, far.Page[int](items=[1]), far.Colour.RED).missing == names("Page", "Colour")


def test_no_pattern_is_named_for_what_no_pattern_helps(app):
    error = refused(app, tasks.take, far.Holder(threading.Lock()), far.Colour.RED)
    assert error.missing == names("Colour")
    assert "Holder' or its module" not in str(error)
    assert "$.args[0] (tests.zoo.far.Holder) cannot be carried: it holds $.args[0].value (_thread.lock), and" in str(
        error
    )
    assert "pass an id, or the values that the task needs" in str(error)
    nested = refused(app, tasks.take, [far.Holder(far.Holder([threading.Lock()]))])
    assert nested.missing == ()
    assert str(nested).count("cannot be carried") == 1


def test_a_value_that_is_made_anew_by_each_look_is_left_out_by_what_is_around_it():
    app = make_app(policy=Policy("tests.sample_tasks", f"{FAR}:Fresh"))
    error = refused(app, tasks.take, [far.Fresh(), far.Colour.RED])
    assert error.missing == names("Colour")
    assert str(error).count("(_thread.lock) cannot be carried") == 1
    app.close()
    far.RAN.clear()


@pytest.mark.parametrize("make", [far.Anew, far.Shifting])
def test_what_a_hook_makes_anew_keeps_nothing_else_from_being_told(make):
    app = make_app(policy=Policy("tests.sample_tasks", f"{FAR}:{make.__name__}"))
    error = refused(app, tasks.take, [make(), *[far.Point(1, 2) for _ in range(40)], threading.Lock()], far.Colour.RED)
    assert error.missing == (names("Point", "Colour") if make is far.Anew else ())
    assert len(far.RAN) <= 20
    far.RAN.clear()
    app.close()


def test_a_class_without_a_pattern_is_named_however_many_of_its_objects_come(app):
    error = refused(
        app,
        tasks.take,
        [far.Closed() for _ in range(100)],
        [far.Page[int](items=[i]) for i in range(100)],
        far.Colour.RED,
    )
    assert error.missing == names("Closed", "Page", "Colour")


def test_what_one_refused_object_shares_with_others_is_still_named(app):
    shared = far.Point(1, 2)
    error = refused(app, tasks.take, far.Holder([shared, threading.Lock()]), shared, far.Colour.RED)
    assert error.missing == names("Point", "Colour")
    around = [far.Frozen(1)]
    around += [(around,), threading.Lock(), far.Colour.RED, (around, threading.Lock(), far.Note(text="x"))]
    error = refused(app, tasks.take, around)
    assert error.missing == names("Frozen", "Colour", "Note")
    assert str(error).count("_thread.lock") == 2


def test_no_more_values_are_looked_at_in_all_than_a_call_may_hold():
    app = make_app(policy=Policy("tests.sample_tasks"), limits=Limits(items=1_000))
    locks = [threading.Lock() for _ in range(400)]
    error = refused(app, tasks.take, [far.Plain()], locks, far.Colour.RED)
    assert error.missing == names("Plain")
    assert 1 <= str(error).count("_thread.lock") <= 4
    app.close()


def _calls(app, *args):
    """Return how often a value was met: in the refusal itself, and in all."""
    counts = []
    met = Encoder.value

    def count(self, value, depth):
        counts.append(self.looks_only)
        return met(self, value, depth)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "value", count)
        refused(app, tasks.take, *args)
    return counts.count(False), len(counts)


@pytest.mark.parametrize("rest", [[threading.Lock() for _ in range(40)], [far.Closed()] * 40, [far.Colour.RED]])
def test_the_look_does_little_more_work_than_the_refusal(app, rest):
    data = [{"id": i, "day": date(2026, 1, 1), "tags": ["a", ("b",)]} for i in range(300)]
    first, in_all = _calls(app, data, rest)
    assert first > 1_200
    assert in_all <= 2.5 * first


def test_a_look_that_fails_leaves_the_refusal_as_it_is(app):
    class Failing(TypeRegistry):
        def by_class(self, cls):
            if sys._getframe(1).f_code.co_name == "_plan":
                raise LookupError("a library's own fault")
            return super().by_class(cls)

    gate = app._builder._signer.gate
    codec = TypedCodec(registry=Failing())
    error = NotDeferrable("the refusal; the remedy", reason="policy", missing=("a:b",))
    tell_all(error, codec, gate, far.run, [far.Plain()], {})
    assert str(error) == "the refusal; the remedy"
    assert error.missing == ("a:b",)


def test_sets_and_keys_are_looked_into(app):
    error = refused(app, tasks.take, {far.Frozen(1), far.Frozen(2)}, {far.Colour.RED: far.Note(text="x")})
    assert sorted(error.missing) == sorted(names("Frozen", "Colour", "Note"))


def test_a_factory_and_a_method_among_the_arguments_are_named(app):
    error = refused(app, tasks.take, defaultdict(far.Plain), far.Point(1, 2).move, far.run)
    assert error.missing == names("Plain", "Point.move", "Point", "run")


def test_callable_and_object_of_a_method_are_named_and_so_are_those_of_its_state(app):
    error = refused(app, far.Point(far.Colour.RED, None).move, 1)
    assert error.missing == names("Point.move", "Point", "Colour")


def test_so_many_refusals_are_told_and_the_walks_are_bounded(app):
    error = refused(app, tasks.take, [threading.Lock() for _ in range(100)])
    assert str(error).count("cannot be carried") <= 9
    deep = []
    for _ in range(100):
        deep = [deep]
    assert "nest deeper" in str(refused(app, tasks.take, deep, far.Colour.RED))
    app = make_app(policy=Policy("tests.sample_tasks"), limits=Limits(items=20))
    assert "holds more than 20" in str(refused(app, tasks.take, [[1] * 15, [2] * 15], x=far.Colour.RED))
    app.close()


@pytest.mark.parametrize("make", [
    lambda: [OSError(2, "no") for _ in range(1000)], lambda: ExceptionGroup("many", [ValueError(i) for i in range(2000)]),
])  # fmt: skip
def test_errors_that_a_call_may_hold_are_not_told_to_be_too_many(make):
    codec = TypedCodec(limits=Limits(items=7000))
    codec.encode((UNBOUND, (make(),), {}), Policy("tests.sample_tasks"))
    found = codec.obstacles((UNBOUND, (object(), make()), {}), Policy("tests.sample_tasks"))
    assert list(found.refusals) == ["$.args[0]"]


def test_a_keyword_that_is_refused_ends_the_look(app):
    error = refused(app, tasks.take, far.Colour.RED, **{"$x": 1})
    assert error.missing == names("Colour")


def test_what_a_key_may_not_name_is_told_without_a_pattern_of_the_policy():
    key = Key("k", bytes(range(32)), KeyState.ACTIVE, patterns=["tests.sample_tasks"])
    app = make_app(policy=Policy("tests.sample_tasks", FAR), keyring=Keyring(key))
    error = refused(app, tasks.take, far.Colour.RED, [far.Note(text="x")])
    assert error.missing == ()
    assert str(error).count("the active key may not name it") == 2
    app.close()


def test_a_metaclass_is_told_with_its_setting(app):
    error = refused(app, tasks.take, far.Colour.RED, [far.OfMeta, far.OfMeta()])
    assert f"SAFEDEFER_METACLASSES={FAR}:Meta" in str(error)
    assert error.missing == names("Colour", "OfMeta")


def test_a_pickled_call_is_not_looked_into():
    app = make_app(policy=Policy("tests.sample_tasks"), allow_pickle=True)
    with pytest.raises(NotDeferrable) as caught:
        app.options(pickle=True).defer(far.run, far.Colour.RED)
    assert caught.value.missing == names("run")
    assert "for the same call" not in str(caught.value)
    app.close()


def test_a_mark_admits_what_it_marked_also_in_the_look(app):
    app = make_app(policy=Policy("tests.sample_tasks", deferrable=True))
    deferrable(far.Marked)
    assert refused(app, tasks.take, [far.Marked(), far.Colour.RED]).missing == names("Colour")
    app.close()


def test_what_is_known_is_told_where_the_stack_is_nearly_full(app):
    seen = set()

    def descend(levels):
        if levels:
            return descend(levels - 1)
        return app.defer(tasks.take, [far.Plain()], far.Colour.RED)

    for levels in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        try:
            descend(levels)
        except UnencodableArgument as error:
            seen.add(error.missing)
        except RecursionError:
            break
    assert seen
    assert app.queue.tasks() == []
