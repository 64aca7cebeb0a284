"""Call sites as applications on App Engine write them, with the real ndb: right at once, or refused in one message.

``shop`` is the application, and ``shop/mended.py`` has the sites that were refused, after doing what the message says. A site is
right if its task runs to its end, and all that was deferred arrived with type, state and sharing. Whether App Engine took the
arguments of a site, pickle says.
"""

# ruff: noqa: E402 - what is skipped without ndb

import contextlib
import inspect
import pickle
from datetime import UTC, datetime
from pathlib import Path
from types import FunctionType, MethodType

import pytest

ndb = pytest.importorskip("google.cloud.ndb")

from google.auth.credentials import AnonymousCredentials

from safedefer import Policy, deferred
from safedefer.errors import DeferError
from safedefer.refs import UNBOUND, bound_object
from safedefer.testing import TestApp
from tests.datastore.kinds import use_kinds
from tests.datastore.server import DatastoreServer
from tests.datastore.store import Store
from tests.ported.compare import state
from tests.ported.shop import handlers, legacy, mended, models, tasks
from tests.ported.shop.models import Order

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "leave-app-engine.md"
MODULES = (models, tasks, handlers, mended)
#: What the guide says: the modules of the models and of the tasks.
POLICY = Policy(*(module.__name__ for module in MODULES))
TARGETS = {"default": "http://localhost:1", "worker": "http://localhost:2"}


def sites_of(module):
    found = {name: each for name, each in vars(module).items() if type(each) is FunctionType}
    return {name: each for name, each in found.items() if list(inspect.signature(each).parameters) == ["order"]}


SITES = sites_of(handlers)
MENDED = sites_of(mended)

#: Refused, and the message says what to add to the policy.
TO_ADMIT = {
    "put_of_an_entity": ["tests.ported.shop.models:Order._put"],
    "delete_of_a_key": ["google.cloud.ndb.key:Key.delete"],
    "get_by_id_of_a_model": ["tests.ported.shop.models:Order._get_by_id"],
    "model_class_as_task": ["tests.ported.shop.models:Order"],
    "put_multi": ["google.cloud.ndb.model:put_multi"],
    "delete_multi": ["google.cloud.ndb.model:delete_multi"],
    "property_object": ["google.cloud.ndb.model:IntegerProperty"],
    "built_in": ["builtins:print"],
    "function_of_the_standard_library": ["logging:info"],
    "function_of_an_unnamed_module": [f"{legacy.__name__}:grant"],
    "entity_of_an_unnamed_module": [f"{legacy.__name__}:Voucher"],
    "three_unnamed_classes": [f"{legacy.__name__}:{name}" for name in ("grant", "Voucher", "Level")],
    "method_and_its_unnamed_arguments": [f"{legacy.__name__}:{name}" for name in ("Voucher.redeem", "Voucher", "Level")],
    "object_with_a_hook": [f"{legacy.__name__}:{name}" for name in ("grant", "Rule", "Level")],
    "hidden_among_others": [f"{legacy.__name__}:{name}" for name in ("Voucher", "Rule", "Level")],
}  # fmt: skip
#: Refused, and the message says what to write instead; each of these words is in it.
TO_WRITE = {
    "super_method": "overrid|not through super", "lambda_": "a lambda; top level of a module", "lambda_with_a_name": "a lambda; top level of a module",
    "nested_function": "top level of a module", "partial": "pass the arguments", "partial_of_a_module": "pass the arguments",
    "static_method": "static method; a function at the top level", "static_method_through_self": "static method; a function at the top level",
    "generator_function": "defer a function that exhausts it", "tasklet": "generator; defer a function", "unbound_method": "obj.method",
    "decorated_without_wraps": "functools.wraps", "called_at_once": "pass a function and its arguments",
    "method_of_a_handler": "$.bound.request; $.bound.response; pass an id", "attribute_beside_properties": "changed_by; as arguments of their own",
    "future": "of this process", "ndb_client": "of this process",
    "too_large_bytes": "1048576; pass its id", "caught_exception": "with_traceback(None)", "lambda_as_argument": "$.args[0]; a lambda",
    "partial_as_argument": "pass the function and its arguments", "generator": "a list of its items",
    "views_and_iterators": "$.args[0] (dict_keys); $.args[1] (map); a list of its items", "request_object": "pass an id, or the values that the task needs",
    "request_proxy": "pass an id, or the values that the task needs", "form_of_a_request": "value.to_dict(flat=False)",
    "headers_of_a_request": "pass an id, or the values that the task needs", "file_handle": "pass its path, or what was read",
    "file_in_memory": "value.getvalue()", "cache_client": "pass an id", "session": "pass an id; more may be missing",
    "lock_and_logger": "$.args[0] (_thread.lock); $.args[1] (logging.Logger); by its name", "module": "pass its name",
    "numpy_values": "value.item(); value.tolist()", "protobuf": "value.SerializeToString()", "naive_eta": "datetime.now(timezone.utc)",
    "eta_and_countdown": "not both", "transactional_outside": "app.transaction(connection)", "queue_with_an_underscore": "A-Z a-z 0-9 . -",
    "name_with_a_space": "A-Z a-z 0-9 _ -", "misspelt_option": "did you mean _queue?", "djangaes_options": "_small_task; leave it out; _service; use _target",
    "own_keyword_with_an_underscore": "app.options(...).defer(...)",
}  # fmt: skip


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    use_kinds(monkeypatch, models, legacy)


@pytest.fixture(scope="module")
def client():
    with contextlib.closing(DatastoreServer()) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATASTORE_EMULATOR_HOST", server.host)
        client = ndb.Client(project="shop", credentials=AnonymousCredentials())
        client.server = server
        yield client
        client.stub.grpc_channel.close()


class Spy:
    """``deferred``, as the application sees it, and what it was given."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return getattr(deferred, name)

    def defer(self, obj, /, *args, **kwargs):
        task = deferred.defer(obj, *args, **kwargs)
        own = {name: each for name, each in kwargs.items() if name not in deferred.OPTIONS}
        self.calls.append((task.id, called(obj, args, own)))
        return task


def called(function, args, kwargs):
    """What there is of a call."""
    bound = bound_object(function)
    name = getattr(function, "__func__", function)
    return None if bound is not UNBOUND and not isinstance(function, MethodType) else name, state([bound, args, kwargs])


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    for module in MODULES:
        monkeypatch.setattr(module, "deferred", spy)
    return spy


def run(site, client, spy, policy):
    """Defer as the site does, run all to the end, and compare; return how many tasks ran."""
    client.server.store = Store()
    with TestApp(policy, around=[client.context], targets=TARGETS) as app:
        with client.context():
            site(models.order())
        ran = app.run_due()
        while app.waiting():
            app.clock.advance(60)
            ran += app.run_due()
        assert app.dead() == []
        arrived = {task.id: called(task.function, task.args, task.kwargs) for task in app.deferred_tasks}
    for task_id, sent in spy.calls:
        assert arrived[task_id] == sent
    assert {each.outcome for each in ran} == {"succeeded"}
    return len(ran)


def refusal(site, client, policy):
    """Return the error that a site gets."""
    with TestApp(policy, around=[client.context], targets=TARGETS) as app, client.context():
        with pytest.raises((DeferError, TypeError)) as caught:
            site(models.order())
        assert app.waiting() == []
    return caught.value


@pytest.mark.parametrize("name", sorted(SITES.keys() - TO_ADMIT.keys() - TO_WRITE.keys()))
def test_a_site_is_right_at_once(client, spy, name):
    assert run(SITES[name], client, spy, POLICY) >= 1


@pytest.mark.parametrize("name", TO_ADMIT)
def test_one_message_names_every_pattern_that_is_missing_and_with_them_the_site_is_right(client, spy, name):
    models.DONE.clear()
    error = refusal(SITES[name], client, POLICY)
    assert models.DONE == []  # nor did a hook run
    assert sorted(error.missing) == sorted(TO_ADMIT[name])
    assert all(f"'{pattern}'" in str(error) for pattern in error.missing)
    assert run(SITES[name], client, spy, Policy(*POLICY.patterns, *error.missing)) >= 1


@pytest.mark.parametrize("name", TO_WRITE)
def test_one_message_says_what_to_write_and_then_the_site_is_right(client, spy, name):
    error = str(refusal(SITES[name], client, POLICY))
    for words in TO_WRITE[name].split("; "):
        assert any(word in error for word in words.split("|")), error
    assert run(MENDED[name], client, spy, POLICY) >= 1


@pytest.mark.parametrize("name", sorted(SITES.keys() - TO_WRITE.keys()))
def test_under_an_empty_policy_one_message_names_all_that_the_first_call_needs(client, spy, name):
    error = refusal(SITES[name], client, Policy())
    assert error.missing
    assert all(f"'{pattern}'" in str(error) for pattern in error.missing)
    policy = Policy(*error.missing)
    with TestApp(policy, around=[client.context], targets=TARGETS) as app, client.context():
        try:
            SITES[name](models.order())
        except DeferError:
            # The site has a second call.
            assert spy.calls
        assert app.waiting()


def app_engine_took(site, client):
    """Whether the original could pickle the call: it did so with a function and what it is called with."""
    taken = []

    class Original:
        def __getattr__(self, name):
            return getattr(deferred, name)

        def defer(self, obj, *args, **kwargs):
            own = {name: each for name, each in kwargs.items() if name not in deferred.OPTIONS}
            if not isinstance(obj, FunctionType) and hasattr(obj, "__self__"):
                obj, args = deferred.invoke_member, (obj.__self__, obj.__name__, *args)
            assert callable(obj)
            taken.append(pickle.loads(pickle.dumps((obj, args, own))))

    with pytest.MonkeyPatch.context() as patch, client.context():
        for module in MODULES:
            patch.setattr(module, "deferred", Original())
        try:
            site(models.order())
        except (pickle.PicklingError, TypeError, AttributeError, AssertionError, deferred.Error):
            return False
    return bool(taken)


#: How many of 122 public call sites, looked up by text and sorted by hand, have a shape.
SEEN = {
    "function": 14, "key": 9, "function_without_arguments": 9, "entity": 7, "list_of_ids": 7, "class_method_of_a_model": 5, "dict_of_parameters": 5,
    "function_that_defers_itself": 5, "target": 4, "class_method_with_a_name": 4, "key_and_cursor": 3, "queue": 3, "class_method_with_keys": 3,
    "method_of_a_plain_object": 3, "runner_with_a_class": 3, "user": 3, "countdown": 2, "retry_options": 2, "name": 2, "method_of_an_entity": 2,
    "urlsafe_key": 2, "function_in_a_loop": 1, "function_passed_through": 1, "object_of_objects": 1, "entity_and_a_path": 1, "model_class_as_argument": 1,
    "list_of_keys": 1, "values_of_ndb": 1, "keyword_arguments": 1, "pickled_bytes": 1, "parsed_url": 1, "query_object": 1,
    "transactional_in_ndb": 7, "transactional_with_an_entity_and_retries": 3, "method_of_a_handler": 2, "own_parameter_with_an_underscore": 1, "lambda_": 1,
}  # fmt: skip
#: What ``taskqueue`` refused beside the arguments, or what did another thing than was meant: a generator ran nothing.
NEVER = {
    "misspelt_option", "djangaes_options",
    "eta_and_countdown", "name_with_a_space", "queue_with_an_underscore", "transactional_outside", "generator_function", "tasklet", "super_method",
}  # fmt: skip


def test_the_counts_of_the_guide_are_those_of_the_table(client):
    right = SITES.keys() - TO_ADMIT.keys() - TO_WRITE.keys()
    taken = {name for name in SITES if app_engine_took(SITES[name], client)} - NEVER
    assert len(SITES) == len(right) + len(TO_ADMIT) + len(TO_WRITE)
    rows = [
        ("call sites, each of another shape", len(SITES), len(right), len(TO_ADMIT), len(TO_WRITE)),
        ("of them: App Engine took them", *(len(taken & each) for each in (SITES.keys(), right, TO_ADMIT.keys(), TO_WRITE.keys()))),
        ("public call sites, by shape", *(sum(SEEN[name] for name in SEEN.keys() & each) for each in (SITES.keys(), right, TO_ADMIT.keys(), TO_WRITE.keys()))),
    ]  # fmt: skip
    assert SEEN.keys() <= SITES.keys()
    text = GUIDE.read_text()
    for label, *counts in rows:
        assert f"| {label} | {' | '.join(map(str, counts))} |" in text
    assert len(SITES) >= 60


def test_no_name_stands_in_two_lists_and_each_site_that_changed_has_what_it_became():
    assert TO_ADMIT.keys().isdisjoint(TO_WRITE)
    assert TO_ADMIT.keys() | TO_WRITE.keys() <= SITES.keys()
    assert MENDED.keys() == TO_WRITE.keys()


PAIRS = [
    lambda: (1, True), lambda: (1, 1.0), lambda: ("1", b"1"), lambda: ([1], (1,)), lambda: ({"a": 1}, {"a": 2}), lambda: ({1}, frozenset([1])),
    lambda: (models.Money(1, "EUR"), (1, "EUR")), lambda: (models.Report, models.Mailer), lambda: (models.order(), models.customer()),
    lambda: (models.Order(number=1), models.Order(number=2)), lambda: (ValueError(1), ValueError(2)), lambda: ([[1]] * 2, [[1], [1]]),
    lambda: (models.Mailer("a"), models.Mailer("b")), lambda: (models.Mailer("a").send, models.Mailer("b").send),
    lambda: (ndb.GeoPt(1, 2), ndb.GeoPt(1, 3)), lambda: (ndb.Cursor(b"a"), ndb.Cursor(b"b")), lambda: (Order.query(), Order.query(Order.number == 1)),
    lambda: (ndb.Key("A", 1), ndb.Key("A", 2)), lambda: (datetime(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC)),
]  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_the_comparison_tells_values_apart(client, pair):
    with client.context():
        one, other = pair()
        assert state(one) == state(one)
        assert state(one) != state(other)
