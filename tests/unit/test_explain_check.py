"""``safedefer explain`` and ``safedefer check``: the policy and the proof of references, asked without running anything."""

import json
import secrets
import sys
import time
from importlib import import_module
from types import ModuleType

import apsw
import pytest
from click.testing import CliRunner

from safedefer import App, Key, Keyring, KeyState, NotDeferrable, Policy, deferrable
from safedefer.cli.check import Checking
from safedefer.cli.references import prove, stand_in
from safedefer.cli.root import main
from safedefer.errors import PolicyViolation, UnresolvableCallable
from safedefer.queues.base import Settlement, Verdict
from safedefer.refs import UNBOUND, reference
from tests import sample_tasks
from tests.unit.apps import make_app

SECRETS = {name: secrets.token_bytes(32) for name in ("k1", "old", "mail")}


def ring(**limits):
    """Return a ring of an active key, one that verifies, and one with limits."""
    return Keyring(
        Key("k1", SECRETS["k1"], KeyState.ACTIVE),
        Key("old", SECRETS["old"], KeyState.REVOKED),
        Key("mail", SECRETS["mail"], KeyState.VERIFY_ONLY, **limits),
    )


@pytest.fixture
def use(monkeypatch):
    """Return a function that makes the App of the commands."""

    def make(**changes):
        app = make_app(**changes)
        monkeypatch.setattr("safedefer.cli.explain.load_app", lambda _: app)
        monkeypatch.setattr("safedefer.cli.check.load_app_to_look", lambda _: app)
        return app

    return make


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """Return a function that deploys a module ``shop_code``, not imported yet."""

    def deploy(text, name="shop_code"):
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield deploy
    for name in ("shop_code", "shop_other"):
        sys.modules.pop(name, None)


def run(*words, code=0):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code, done.output
    return done.output


CODE = """
class Mailer:
    def send(self, to): ...
    @classmethod
    def make(cls, n): ...
    @staticmethod
    def still(): ...
    def __call__(self): ...
class Loud(Mailer):
    def __new__(cls): raise RuntimeError("made")
    def __init__(self): raise RuntimeError("made")
    def __setstate__(self, state): raise RuntimeError("made")
    def shout(self): ...
class Child(dict):
    def grow(self): ...
class Gone:
    def __del__(self): raise RuntimeError("gone")
    def go(self): ...
def send(to): ...
def more(): yield
"""


@pytest.mark.parametrize(("name", "kind"), [
    ("send", "function"), ("Mailer", "class"), ("Mailer.send", "method"), ("Mailer.make", "classmethod"),
    ("Loud.shout", "method"), ("Loud.send", "method"), ("Child.grow", "method"), ("Gone.go", "method"),
])  # fmt: skip
def test_what_may_be_deferred_is_explained_with_its_pattern(use, shop, name, kind):
    shop(CODE)
    use(policy=Policy("shop_code", "builtins:len"))
    text = run("explain", f"shop_code:{name}")
    assert text.startswith(f"shop_code:{name} may be deferred")
    assert f"a {kind}, by the pattern shop_code\n" in text
    document = json.loads(run("explain", f"shop_code:{name}", "--json"))
    assert (document["deferrable"], document["kind"], document["patterns"]) == (True, kind, ["shop_code"])


@pytest.mark.parametrize("name", ["more", "Mailer.still", "nothing", "Mailer.nothing"])
def test_what_may_not_be_deferred_has_the_reason_that_defer_gives(use, shop, name):
    shop(CODE)
    app = use(policy=Policy("shop_code"))
    text = run("explain", f"shop_code:{name}", code=1)
    import shop_code

    found = shop_code
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        assert "deploy" in text
    else:
        with pytest.raises(NotDeferrable) as refused:
            app.defer(found)
        assert str(refused.value).partition(";")[0] in text
        assert json.loads(run("explain", f"shop_code:{name}", "--json", code=1))["reason"] == refused.value.reason


@pytest.mark.parametrize(
    ("name", "found"), [("os:system", "a known gadget"), ("time:time", "a built-in needs an exact pattern")]
)
def test_what_the_policy_does_not_admit_has_the_text_of_defer(use, name, found):
    app = use()
    text = run("explain", name, code=1)
    module, _, member = name.partition(":")
    with pytest.raises(NotDeferrable) as refused:
        app.defer(getattr(import_module(module), member), *["true"] * (member == "system"))
    assert str(refused.value) in text
    assert found in text


def test_a_module_that_no_pattern_admits_is_not_imported(use, shop):
    shop("raise SystemExit('imported')", "shop_other")
    use()
    text = run("explain", "shop_other:f", code=1)
    assert "shop_other:f may not run: no pattern admits it; add 'shop_other:f' or its module to the policy" in text
    assert "no pattern admits it" in run("explain", "shop_other:C.m", code=1)
    assert "shop_other" not in sys.modules


def test_a_mark_counts_where_the_policy_counts_marks(use, monkeypatch):
    module = ModuleType("shop_code")
    exec("def f(): ...", module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "shop_code", module)
    deferrable(module.f)
    use(policy=Policy(deferrable=True))
    assert "by its mark, @deferrable" in run("explain", "shop_code:f")


def test_keys_say_what_they_may_sign(use):
    use(keyring=ring(patterns=["tests.sample_tasks:keywords"], queues=["mail"]))
    text = run("explain", "tests.sample_tasks:add")
    assert "key k1 (active) may sign it\n" in text
    assert "key mail (verify_only) may not name it" in text
    assert "old" not in text
    assert "key mail (verify_only) may sign it, for the queues mail only" in run(
        "explain", "tests.sample_tasks:keywords"
    )
    use(keyring=Keyring(Key("k1", SECRETS["k1"], KeyState.ACTIVE, patterns=["builtins:len"])))
    assert "the active key may not name it" in run("explain", "tests.sample_tasks:add", code=1)


@pytest.mark.parametrize(
    "name", ["", "a", "a:", ":b", "a.b", "a:b:c", "a:\u0430", "a:<lambda>", "a:b\n", "x" * 256 + ":y"]
)
def test_what_is_no_name_is_said(use, name):
    use()
    assert "is not module:name" in run("explain", name, code=1)


# --- References -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "qualname", "member"), [
    ("method", "Loud", "shout"), ("instance", "Loud", None), ("instance", "Mailer", None), ("method", "Child", "grow"),
    ("classmethod", "Mailer", "make"), ("function", "send", None), ("class", "Mailer", None), ("method", "Gone", "go"),
])  # fmt: skip
def test_a_reference_is_proved_without_an_object_that_the_class_made(shop, kind, qualname, member):
    shop(CODE)
    prove(Policy("shop_code"), reference(kind, "shop_code", qualname, member))


@pytest.mark.parametrize(("kind", "qualname", "member", "error"), [
    ("method", "Mailer", "nothing", UnresolvableCallable), ("method", "Mailer", "make", UnresolvableCallable),
    ("method", "send", "x", UnresolvableCallable), ("instance", "Child", None, UnresolvableCallable),
    ("method", "Nothing", "x", UnresolvableCallable), ("function", "Mailer", None, UnresolvableCallable),
    ("method", "Child", "update", UnresolvableCallable), ("builtin_method", "Child", "update", PolicyViolation),
])  # fmt: skip
def test_a_reference_to_something_else_is_refused(shop, kind, qualname, member, error):
    shop(CODE)
    with pytest.raises(error):
        prove(Policy("shop_code"), reference(kind, "shop_code", qualname, member))


def test_a_method_that_is_inherited_from_elsewhere_is_refused(shop):
    shop("class Base:\n    def m(self): ...\n", "shop_other")
    shop("from shop_other import Base\nclass Mine(Base): ...\n")
    ref = reference("method", "shop_code", "Mine", "m")
    with pytest.raises(PolicyViolation, match="inherited from shop_other:Base"):
        prove(Policy("shop_code"), ref)
    prove(Policy("shop_code", "shop_other:Base.m"), ref)


@pytest.mark.parametrize("member", ["append", "fromkeys"])
def test_built_in_methods_are_proved(member):
    owner = {"append": "list", "fromkeys": "dict"}[member]
    prove(Policy(f"builtins:{owner}.{member}"), reference("builtin_method", "builtins", owner, member))


def test_there_is_no_object_of_a_class_whose_code_would_run_or_that_needs_arguments():
    import abc
    import datetime

    class Abstract(abc.ABC):
        @abc.abstractmethod
        def m(self): ...

    class Watched:
        def __del__(self):
            raise RuntimeError

    assert stand_in(Abstract) is stand_in(Watched) is stand_in(datetime.date) is UNBOUND
    assert type(stand_in(int)) is int


# --- check ------------------------------------------------------------------------------------------------------------


def test_what_is_queued_and_resolves_passes(use, tmp_path):
    app = use(queue=f"sqlite:///{tmp_path}/q.db")
    app.defer(sample_tasks.add, 1)
    app.options(countdown=3600).defer(sample_tasks.keywords, text="x" * 20_000)
    assert run("check") == "4 patterns and 2 tasks: all resolve here\n"
    assert run("check", "--json") == ""
    app.close()


def test_what_a_new_deployment_lacks_fails_with_a_count_and_what_to_do(use, shop):
    shop(CODE)
    app = use(policy=Policy("shop_code", "tests.sample_tasks"))
    import shop_code

    for n in range(4):
        app.options(queue="mail" if n else "default").defer(shop_code.send, n)
    app.defer(shop_code.Mailer().send, "x")
    app.defer(sample_tasks.add, 1)
    lease = app.queue.lease(owner="w", limit=1, seconds=60.0, now=time.time())[0]
    app.queue.settle_many([(lease, Settlement(verdict=Verdict.DEAD, reason="why"))], now=time.time())
    shop("class Mailer: ...\n")
    found = {each["name"]: each for each in map(json.loads, run("check", "--json", code=1).splitlines())}
    assert set(found) == {"shop_code:send", "shop_code:Mailer.send"}
    assert (found["shop_code:send"]["tasks"], found["shop_code:send"]["states"]) == (4, {"waiting": 3, "dead": 1})
    assert found["shop_code:send"]["reason"] == "unresolvable-callable"
    text = run("check", code=1)
    assert "shop_code:send  4 tasks (3 waiting, 1 dead)  unresolvable-callable: " in text
    assert "map the old name with Policy(moved=...)" in text
    assert text.endswith("2 patterns and 6 tasks: 2 names that cannot be found or may not run\n")
    assert "3 tasks (3 waiting)" in run("check", "--queue", "mail", code=1)


def test_a_policy_that_admits_less_fails_and_imports_nothing_of_it(use, shop):
    shop(CODE)
    keys = ring()
    app = use(keyring=keys, policy=Policy("shop_code"), queue="memory://")
    import shop_code

    app.defer(shop_code.send, 1)
    shop("raise SystemExit('imported')")
    use(keyring=keys, queue=app.queue)
    assert "shop_code:send  1 task (1 waiting)  policy-violation" in run("check", code=1)
    assert "shop_code" not in sys.modules


def test_a_reference_beyond_the_patterns_of_its_key_is_not_imported(use, shop):
    """A stolen key that may name one function must not have a deployment import a module of the policy's packages."""
    shop(CODE)
    thief = App(
        keyring=Keyring(Key("mail", SECRETS["mail"], KeyState.ACTIVE)), policy=Policy("shop_code"), queue="memory://", environment="test",
    )  # fmt: skip
    import shop_code

    thief.defer(shop_code.send, 1)
    shop("raise SystemExit('imported')")
    keys = ring(patterns=["tests.sample_tasks:add"])
    use(keyring=keys, policy=Policy("tests.sample_tasks", "shop_code:send"), queue=thief.queue)
    monkey = Checking(make_app(keyring=keys, policy=Policy("tests.*", "shop_code"), queue=thief.queue))
    for _, view in thief.queue.live_tasks():
        monkey.task(view)
    assert [(each.name, each.reason) for each in monkey.problems] == [("shop_code:send", "capability-exceeded")]
    assert "shop_code" not in sys.modules


def test_a_row_that_nobody_signed_blocks_no_deployment_and_imports_nothing(use, shop, tmp_path):
    shop("raise SystemExit('imported')")
    app = use(queue=f"sqlite:///{tmp_path}/q.db", policy=Policy("shop_code:f", "tests.sample_tasks"))
    app = use(queue=f"sqlite:///{tmp_path}/q.db")
    app.defer(sample_tasks.add, 1)
    with apsw.Connection(app.queue.file.path) as connection:
        connection.execute("UPDATE safedefer_tasks SET callable_name = 'shop_code:f', token = ?", (b"a.b.c",))
    connection.close()
    text = run("check")
    assert "not looked at, since their tokens do not verify here: 1 malformed-token" in text
    assert "shop_code" not in sys.modules
    app.close()


def test_every_pattern_is_checked_by_itself(use):
    patterns = (
        "tests.sample_tasks",
        "no_such_module_of_mine",
        "no_such_package.*",
        "tests.sample_tasks:no_such",
        "tests.*",
    )
    app = use(policy=Policy(*patterns), keyring=ring(patterns=["tests.sample_tasks:no_such_either"]))
    found = {each["name"]: each["what"] for each in map(json.loads, run("check", "--json", code=1).splitlines())}
    assert found == {
        "no_such_module_of_mine": "pattern", "no_such_package.*": "pattern", "tests.sample_tasks:no_such": "pattern", "mail": "key",
    }  # fmt: skip
    assert "names nothing here; correct it, or deploy what it names" in run("check", code=1)
    assert app.policy.patterns == patterns


def test_moved_names_are_followed(use, shop):
    shop("def new(): ...")
    use(policy=Policy("shop_code:old", "shop_code", moved={"shop_code:old": "shop_code:new"}))
    assert "all resolve here" in run("check")


def test_what_is_told_apart_is_bounded(use, monkeypatch):
    monkeypatch.setattr("safedefer.cli.check._MOST", 3)
    app = use(policy=Policy("tests.zoo.values", "tests.sample_tasks"))
    for call in (
        sample_tasks.keywords,
        sample_tasks.thread_name,
        sample_tasks.keep_context,
        sample_tasks.fail,
        sample_tasks.permanent,
    ):
        app.defer(call)
    strict = make_app(keyring=app.keyring, policy=Policy("builtins:len"), queue=app.queue)
    checking = Checking(strict)
    for _, view in app.queue.live_tasks():
        checking.task(view)
    assert len(checking.problems) == 4
    assert checking.problems[-1].name == "(others)"
    assert sum(each.states.total() for each in checking.problems) == checking.tasks == 5
