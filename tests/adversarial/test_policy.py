"""What a token may try against a policy and the limits of its key: imports, look-alikes, stolen keys."""

import sys

import pytest

from safedefer.errors import CapabilityExceeded, NotDeferrable, PolicyViolation, RejectedTask, UnresolvableCallable
from safedefer.keys import Key, Keyring
from safedefer.options import Limits, Serves
from safedefer.policy import Policy
from safedefer.refs import CallableRef
from safedefer.signing import Signer, Verifier
from tests.adversarial.finder import put_first

PACKAGE = {
    "zoo_shop/__init__.py": "def top(): ...\n",
    "zoo_shop/__main__.py": "def main(): ...\n",
    "zoo_shop/tasks.py": (
        "from subprocess import run\nfrom os import system\nfrom zoo_tools import helper, Helper\nimport subprocess as sp\n"
        "def send(): ...\nclass Order:\n    def ship(self): ...\n    popen = sp.Popen\n"
    ),
    "zoo_shop/more/__init__.py": "",
    "zoo_shop/more/mail.py": "def post(): ...\n",
    "zoo_tools/__init__.py": "def helper(): ...\nclass Helper:\n    def help(self): ...\n    @classmethod\n    def make(cls): ...\n",
    "zoo_tools/secret.py": "def leak(): ...\nclass Leak: ...\n",
    "zoo_shop2.py": "def send(): ...\n",
    "zoo_sho.py": "def send(): ...\n",
    "zoo_shop_tasks.py": "def send(): ...\n",
    "zoo_shopx/__init__.py": "",
    "zoo_shopx/tasks.py": "def send(): ...\n",
}


@pytest.fixture(autouse=True)
def _shop(tmp_path, monkeypatch):
    for path, text in PACKAGE.items():
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("zoo_sho") or name.startswith("zoo_tools")]:
        del sys.modules[name]


@pytest.fixture
def imported(monkeypatch):
    """The names of the modules that were imported since the test began, with those that were asked for in vain."""
    finder, before = put_first(monkeypatch), set(sys.modules)
    return lambda: sorted((set(sys.modules) - before) | set(finder.asked))


def ref(module, qualname="send", kind="function", member=None):
    return CallableRef(kind=kind, module=module, qualname=qualname, member=member)


OUTSIDE = [
    "zoo_shop2", "zoo_sho", "zoo_shop_tasks", "zoo_shopx", "zoo_shopx.tasks", "zoo_tools", "zoo_tools.secret", "zoo_shop.__main__", "zoo_shop.__init__",
    "zoo_shop.more.__main__", "zoo_shop.__mp_main__", "this", "antigravity", "os", "Zoo_shop", "zoo_Shop.tasks", "x.zoo_shop.tasks", "__main__",
]  # fmt: skip


@pytest.mark.parametrize("module", OUTSIDE)
def test_a_look_alike_of_a_package_is_refused_and_not_imported(module, imported):
    policy = Policy("zoo_shop.*", deferrable=True)
    for kind, member in (
        ("function", None),
        ("class", None),
        ("method", "ship"),
        ("builtin", None),
        ("builtin_method", "append"),
    ):
        with pytest.raises(PolicyViolation):
            policy.load_callable(ref(module, kind=kind, member=member))
    with pytest.raises(PolicyViolation):
        policy.load_class(f"{module}:Order")
    assert imported() == []


@pytest.mark.parametrize("module", [*OUTSIDE, "zoo_shop", "zoo_shop.more", "zoo_shop.tasks.more"])
def test_a_module_pattern_is_no_prefix(module, imported):
    with pytest.raises(PolicyViolation):
        Policy("zoo_shop.tasks").load_callable(ref(module))
    assert imported() == []


@pytest.mark.parametrize(("qualname", "kind", "member"), [
    ("run", "function", None), ("system", "builtin", None), ("system", "function", None), ("helper", "function", None), ("Helper", "class", None),
    ("Helper", "classmethod", "make"), ("sp", "function", None), ("sp.run", "function", None), ("Order.popen", "class", None), ("Order", "classmethod", "popen"),
])  # fmt: skip
@pytest.mark.parametrize("pattern", ["zoo_shop.*", "zoo_shop.tasks"])
def test_a_re_export_never_runs(pattern, qualname, kind, member):
    with pytest.raises((UnresolvableCallable, PolicyViolation)):
        Policy(pattern).load_callable(ref("zoo_shop.tasks", qualname, kind, member))
    with pytest.raises((UnresolvableCallable, PolicyViolation)):
        Policy(pattern).load_class(f"zoo_shop.tasks:{f'{qualname}.{member}' if member else qualname}")


def test_a_re_exported_class_with_an_object_of_its_own_never_runs():
    policy = Policy("zoo_shop.*")
    helper = __import__("zoo_tools").Helper()
    with pytest.raises(UnresolvableCallable):
        policy.load_callable(ref("zoo_shop.tasks", "Helper", "method", "help"), helper)
    with pytest.raises(NotDeferrable):
        policy.callable_ref(helper.help)


def test_checking_imports_nothing_even_of_what_is_admitted(imported):
    policy = Policy("zoo_shop.*", moved={"zoo_shop.old:send": "zoo_shop.more.mail:post"})
    policy.check(ref("zoo_shop.tasks"))
    policy.check(ref("zoo_shop.old"))
    policy.check_class_name("zoo_shop.tasks:Order")
    assert imported() == []


def test_the_package_of_a_marked_function_does_not_admit_its_neighbours(imported):
    with pytest.raises(PolicyViolation):
        Policy(deferrable=True).load_class("zoo_tools.secret:Leak")
    assert imported() == []


# --- Keys with limits -----------------------------------------------------------------------------

NOW = 1_000_000
SECRET = bytes(range(100, 150))


def claims(call, **changes):
    shape = {
        "v": 1, "jti": "a" * 32, "iat": NOW, "nbf": NOW, "exp": NOW + 100, "aud": "prod:default:default:/u", "cty": "typed",
        "call": call, "args": [], "kwargs": {},
    }  # fmt: skip
    return shape | changes


def call(module="zoo_shop.tasks", qualname="send", kind="function", **more):
    return {"kind": kind, "module": module, "qualname": qualname, **more}


def stolen(policy, key, **serves):
    """Return a forger with the key's secret and none of its limits, and the verifier that it attacks."""
    forger = Keyring(Key(key.kid, SECRET, pickle=True))
    signer = Signer(forger, policy, limits=Limits())
    ring = Keyring(Key("main", bytes(range(50))), key)
    return signer, Verifier(
        ring, policy, serves=Serves(environment="prod", **serves), limits=Limits(), allow_pickle=True
    )


def limited(**limits):
    return Key("limited", SECRET, "verify_only", **limits)


def attack(policy, key, task):
    signer, verifier = stolen(policy, key)
    return verifier.verify(signer.sign(task), url="/u", now=NOW)


@pytest.mark.parametrize("queue", ["mail", "Default", "default2", "defaul"])
def test_a_stolen_key_signs_for_no_other_queue(queue):
    key = limited(queues=["default"], patterns=["zoo_shop.*"])
    with pytest.raises(CapabilityExceeded, match="queue"):
        attack(Policy("zoo_shop.*"), key, claims(call(), aud=f"prod:{queue}:default:/u"))
    assert attack(Policy("zoo_shop.*"), key, claims(call())).identity.kid == "limited"


@pytest.mark.parametrize(("patterns", "task"), [
    (["zoo_shop.more.*"], call()), (["zoo_shop.tasks:send"], call(qualname="Order", kind="class")), ([], call()), (["zoo_shop.more"], call("zoo_shop.more.mail", "post")),
    ([], call("builtins", "list", "builtin_method", member="append", bound=[])),
])  # fmt: skip
def test_a_stolen_key_names_no_other_callable(patterns, task, imported):
    policy = Policy("zoo_shop.*")
    key = limited(patterns=patterns)
    stolen(policy, key)[1].load()
    before = imported()  # what the key's own exact patterns imported
    with pytest.raises(CapabilityExceeded):
        attack(policy, key, claims(task))
    assert imported() == before


def test_a_stolen_key_does_not_widen_the_policy_and_imports_nothing(imported):
    policy = Policy("zoo_shop.*")
    key = limited(patterns=["zoo_tools.*", "zoo_shop.tasks"])
    with pytest.raises(PolicyViolation):
        attack(policy, key, claims(call("zoo_tools.secret", "leak")))
    gate = policy.restricted(key.patterns)
    with pytest.raises(PolicyViolation):
        gate.load_class("zoo_tools.secret:Leak")
    with pytest.raises(PolicyViolation):
        gate.load_callable(ref("zoo_tools.secret", "leak"))
    assert imported() == []


def test_a_stolen_key_names_no_other_class_or_callable_inside_the_arguments(imported):
    policy = Policy("zoo_shop.*")
    gate = attack(policy, limited(patterns=["zoo_shop.tasks:send"]), claims(call())).gate
    before = imported()
    with pytest.raises(CapabilityExceeded):
        gate.load_class("zoo_shop.tasks:Order")
    with pytest.raises(CapabilityExceeded):
        gate.load_class("zoo_shop.more.mail:Post")  # not imported, though the policy admits it
    with pytest.raises(CapabilityExceeded):
        gate.load_callable(ref("zoo_shop.more.mail", "post"))
    with pytest.raises(CapabilityExceeded):
        gate.check(ref("zoo_shop.more.mail", "post"))
    assert imported() == before
    assert gate.load_callable(ref("zoo_shop.tasks")).__name__ == "send"
    assert gate.load_class("builtins:list") is list


def test_a_stolen_key_reaches_nothing_by_a_moved_name():
    moved = {"zoo_shop.tasks:old": "zoo_shop.more.mail:post"}
    policy = Policy("zoo_shop.*", moved=moved)
    with pytest.raises(CapabilityExceeded):
        attack(policy, limited(patterns=["zoo_shop.tasks"]), claims(call(qualname="old")))
    both = limited(patterns=["zoo_shop.tasks", "zoo_shop.more.mail"])
    assert (
        attack(policy, both, claims(call(qualname="old"))).gate.load_callable(ref("zoo_shop.tasks", "old")).__name__
        == "post"
    )


def test_a_stolen_key_signs_no_pickle():
    with pytest.raises(CapabilityExceeded, match="pickle"):
        attack(Policy("zoo_shop.*"), limited(), claims(call(), cty="pickle"))
    assert attack(Policy("zoo_shop.*"), limited(pickle=True), claims(call(), cty="pickle")).claims["cty"] == "pickle"


def test_a_stolen_key_inherits_no_member_from_outside_its_patterns():
    policy = Policy("tests.zoo.*")
    name = ref("tests.zoo.callables", "Record", "classmethod", "create")
    assert policy.load_callable(name)
    for patterns in (["tests.zoo.callables"], ["tests.zoo.callables:Record"]):
        gate = policy.restricted(patterns)
        gate.check(name)
        with pytest.raises(CapabilityExceeded):
            gate.load_callable(name)


def test_a_limited_active_key_shows_its_limits_at_the_sender():
    from tests.zoo import callables as zoo  # noqa: PLC0415

    gate = Policy("tests.zoo.*").restricted(["tests.zoo.callables:Plain"])
    assert gate.callable_ref(zoo.Plain.build).member == "build"
    assert gate.class_name(zoo.Plain) == "tests.zoo.callables:Plain"
    for ask, obj in ((gate.callable_ref, zoo.function), (gate.class_name, zoo.Child)):
        with pytest.raises(NotDeferrable, match="the active key may not name it") as caught:
            ask(obj)
        assert caught.value.reason == "policy"


def test_a_limited_key_keeps_the_policys_metaclasses():
    gate = Policy("tests.zoo.*", metaclasses=["tests.zoo.callables:Meta"]).restricted(["tests.zoo.*"])
    assert gate.load_class("tests.zoo.callables:WithMeta").__name__ == "WithMeta"


def test_the_patterns_of_a_revoked_key_are_not_read():
    ring = Keyring(Key("main", bytes(range(50))), Key("old", SECRET, "revoked", patterns=["gone.module:f"]))
    verifier = Verifier(ring, Policy("zoo_shop.*"), serves=Serves(environment="prod"), limits=Limits())
    forged = Signer(Keyring(Key("old", SECRET)), Policy(), limits=Limits()).sign(claims(call()))
    with pytest.raises(RejectedTask, match="revoked"):
        verifier.verify(forged, url="/u", now=NOW)


def test_what_took_the_place_of_what_a_key_names_exactly_is_refused(monkeypatch):
    gate = Policy("zoo_shop.*").restricted(["zoo_shop.tasks:Order", "zoo_shop.tasks:send"])
    gate.load()
    tasks = sys.modules["zoo_shop.tasks"]
    assert gate.load_class("zoo_shop.tasks:Order") is tasks.Order
    assert gate.load_callable(ref("zoo_shop.tasks")) is tasks.send

    def send():
        return "evil"

    send.__module__, send.__qualname__ = "zoo_shop.tasks", "send"
    monkeypatch.setattr(tasks, "Order", type("Order", (), {"__module__": "zoo_shop.tasks"}))
    monkeypatch.setattr(tasks, "send", send)
    with pytest.raises(CapabilityExceeded):
        gate.load_class("zoo_shop.tasks:Order")
    with pytest.raises(CapabilityExceeded):
        gate.load_callable(ref("zoo_shop.tasks"))
