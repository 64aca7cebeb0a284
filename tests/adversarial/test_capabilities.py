"""A stolen key that is limited to a queue or to patterns: the verifier, not the signer, enforces its limits."""

import pytest

from safedefer.app import App
from safedefer.errors import CapabilityExceeded, NotDeferrable, RejectedTask, UnknownQueueError
from safedefer.keys import Key, Keyring
from safedefer.policy import Policy
from safedefer.queues.base import QueuedTask, Settlement, TaskState, Verdict
from tests.adversarial import heirs, victim
from tests.adversarial.forge import NOW, URL, VICTIM, make_app, mint, post
from tests.queues.single import settle
from tests.schema import invalid_arguments, tasks, vectors
from tests.zoo import parsed
from tests.zoo.exactly import decode_one

FORGED = [
    pytest.param(kid, changes, id=comment)
    for comment, slug, kid, changes in invalid_arguments.NAMES
    if slug == "capability-exceeded"
]


def forged(kid, changes):
    return vectors.mint(vectors.claims(**changes), kid=kid).encode()


@pytest.fixture
def app():
    app = make_app(policy=Policy(VICTIM, "tests.schema.tasks", "operator:add", moved=vectors.CONFIG["moved"]))
    yield app
    app.close()


def bury(app, token):
    """Make a dead letter of a token, as a writer of the queue's storage can."""
    app.queue.enqueue_many(
        [
            QueuedTask(
                id="0123456789abcdef0123456789abcdef",
                queue="default",
                token=token,
                audience=f"test:default:default:{URL}",
                url=URL,
                target="default",
                eta=NOW,
                created=NOW,
                expires=NOW + 1000,
            )
        ]
    )
    (lease,) = app.queue.lease(owner="attacker", limit=1, seconds=1, now=NOW)
    settle(app.queue, lease, Settlement(verdict=Verdict.DEAD, reason="planted"), now=NOW)


@pytest.mark.parametrize(("kid", "changes"), FORGED)
def test_what_a_limited_key_may_not_sign_is_refused_like_a_forgery(app, kid, changes, ran):
    status, headers, body = post(app, forged(kid, changes))
    assert (status, headers["Safedefer-Outcome"], body) == (403, "refused", b"refused\n")
    assert ran == []


@pytest.mark.parametrize(("kid", "changes"), FORGED)
def test_a_dead_letter_of_a_limited_key_is_not_laundered_by_running_it_again(app, kid, changes, ran):
    """What it calls is judged at once; what is inside the arguments by the handler, within the limits of the same key."""
    bury(app, forged(kid, {**changes, "retry_of": None}))
    try:
        again = app.retry("0123456789abcdef0123456789abcdef")
    except CapabilityExceeded:
        assert app.queue.find("0123456789abcdef0123456789abcdef").state is TaskState.DEAD
        assert [task.state for task in app.queue.tasks()] == [TaskState.DEAD]
    else:
        assert "args" in changes or "kwargs" in changes
        assert app.verify(again.payload).claims["root"] == {"id": "0123456789abcdef0123456789abcdef", "kid": kid}
        assert post(app, again.payload)[0] == 403
    assert ran == []


def test_a_dead_letter_is_not_laundered_into_a_queue_that_its_key_may_not_sign_for(app):
    token = mint(kid="mail-only", aud=f"test:mail:default:{URL}", args=["attacker"])
    bury(app, token)
    with pytest.raises(CapabilityExceeded):
        app.retry("0123456789abcdef0123456789abcdef", queue="default")
    assert app.retry("0123456789abcdef0123456789abcdef", queue="mail").queue_name == "mail"


def test_the_same_tokens_by_an_unlimited_key_are_not_refused_as_forgeries(app):
    """The control: it is the limit that refused them."""
    for number, (kid, changes) in enumerate(param.values for param in FORGED):
        if "cty" not in changes and kid == "narrow":
            status, _, _ = post(app, forged("now", {**changes, "jti": f"{number:032x}"}))
            assert status in {200, 500}, changes


def test_a_limited_key_runs_what_it_may(app, ran):
    assert post(app, mint(kid="mail-only", aud=f"test:mail:default:{URL}"))[0] == 200
    assert ran == [((), {})]


def test_a_key_that_may_sign_pickles_is_still_within_the_policy(tmp_path, ran):
    """And a key that may not is refused before the pickle is looked at."""
    import os
    import pickle
    import sys
    from base64 import b64encode

    import cloudpickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    text = b64encode(pickle.dumps(((), (Evil(),), {}), 5)).decode()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    app = make_app(allow_pickle=True)
    args = [text, version, cloudpickle.__version__]
    assert post(app, mint(kid="pickles", cty="pickle", args=args))[0] == 500
    assert post(app, mint(kid="now", jti="f" * 32, cty="pickle", args=args))[0] == 403
    assert not (tmp_path / "owned").exists()
    assert ran == []
    app.close()


def test_a_limited_key_runs_the_methods_of_its_classes():
    keys = Keyring(Key("limited", bytes(range(7, 39)), "active", patterns=["tests.schema.tasks:Receipt"]))
    app = App(keyring=keys, policy=Policy("tests.schema.tasks"), queue="memory://", clock=lambda: NOW)
    assert app.run(app.serialize(tasks.Receipt(7).send, 2)) == (7, 2)
    assert app.run(app.serialize(tasks.Receipt.build, 9)) == tasks.Receipt(9)
    with pytest.raises(NotDeferrable):
        app.serialize(tasks.echo)
    app.close()


def limited(**limits):
    keys = Keyring(Key("limited", bytes(range(7, 39)), "active", **limits))
    return App(keyring=keys, policy=Policy(VICTIM), queue="memory://", clock=lambda: NOW)


def test_the_sender_sees_the_limits_of_its_own_key():
    app = limited(queues=["mail"], patterns=[f"{VICTIM}:note"])
    app.options(queue="mail").defer(victim.note)
    with pytest.raises(UnknownQueueError, match="limited"):
        app.defer(victim.note)
    with pytest.raises(NotDeferrable, match="active key"):
        app.options(queue="mail").defer(victim.other)
    with pytest.raises(Exception, match="active key"):
        app.options(queue="mail").defer(victim.note, victim.Parcel(1))
    app.close()


def test_a_key_of_patterns_outside_the_policy_gains_nothing(ran):
    keys = Keyring(Key("wide", bytes(range(7, 39)), "active", patterns=["tests.schema.tasks", "os:getcwd"]))
    app = App(keyring=keys, policy=Policy(VICTIM), queue="memory://", environment="test", clock=lambda: NOW)
    for module, name in ((VICTIM, "note"), ("tests.schema.tasks", "echo"), ("os", "getcwd")):
        claims = vectors.claims(call={"kind": "function", "module": module, "qualname": name})
        with pytest.raises(RejectedTask):
            app.run(keys.sign(vectors.compact(claims).encode()))
    assert ran == []
    app.close()


PARSED, HEIRS = parsed.__name__, heirs.__name__
PAGE = {"items": []}
WAYS = {
    "a callable": {"$callable": {"kind": "function", "module": victim.__name__, "qualname": "note"}},
    "a class method": {"$callable": {"kind": "classmethod", "module": HEIRS, "qualname": "Model", "member": "make"}},
    "a factory": {"$defaultdict": [{"$callable": {"kind": "function", "module": victim.__name__, "qualname": "note"}}]},
    "a class as a factory": {"$defaultdict": [{"$class": f"{victim.__name__}:Parcel"}]},
    "a class": {"$class": f"{PARSED}:Page"},
    "a generic model": {"$model": [[f"{PARSED}:Page", {"$class": "builtins:int"}], PAGE, [], None, None]},
    "the argument of one": {"$model": [[f"{PARSED}:Page", {"$class": f"{PARSED}:Tree"}], PAGE, [], None, None]},
    "an alias": {"$generic_alias": {"$tuple": [{"$class": f"{PARSED}:Page"}, {"$tuple": [{"$class": "builtins:int"}]}]}},
    "the argument of an alias": {"$generic_alias": {"$tuple": [{"$class": "builtins:list"}, {"$tuple": [{"$class": f"{PARSED}:Tree"}]}]}},
    "a member of an enum": {"$enum": [f"{HEIRS}:Color", "RED"]},
    "an exception": {"$exception": [f"{victim.__name__}:NoSuchThing", [], {}]},
    "a key": {"$set": [{"$object": {"class": f"{HEIRS}:Keyed"}}]},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_no_value_leads_a_limited_key_beyond_its_patterns(way):
    policy = Policy(PARSED, HEIRS, victim.__name__)
    patterns = [f"{victim.__name__}:other", *([f"{PARSED}:Page"] if "argument" in way else [])]
    with pytest.raises(CapabilityExceeded):
        decode_one(WAYS[way], policy=policy.restricted(patterns))
