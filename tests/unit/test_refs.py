"""References to callables: what is accepted, what is refused and why, and that nothing of the user's runs."""

import subprocess
import sys
import types
from typing import get_args
from unittest import mock

import pytest
from pydantic import ValidationError

from safedefer.callables.getters import class_mro
from safedefer.errors import NotDeferrable, UnresolvableCallable
from safedefer.policy import Policy
from safedefer.refs import UNBOUND, CallableRef, KindName, bound_object, check_class, class_path, find, find_member
from tests.zoo import callables as zoo

HERE = zoo.HERE
# By label: pytest itself looks closely at the values that it is given.
ACCEPTED = {label: row for label, *row in zoo.ACCEPTED}
REFUSED = {label: row for label, *row in zoo.REFUSED}
accepted = pytest.mark.parametrize("label", ACCEPTED)
refused = pytest.mark.parametrize("label", REFUSED)


@pytest.fixture(autouse=True)
def _nothing_of_the_user_runs():
    zoo.RAN.clear()
    yield
    assert zoo.RAN == []


def ref(kind="function", module=HERE, qualname="function", member=None):
    return CallableRef(kind=kind, module=module, qualname=qualname, member=member)


def same(left, right):
    """Whether two callables are the same: bound ones by what they bind."""
    if type(left) is types.MethodType:
        return type(right) is types.MethodType and left.__self__ is right.__self__ and left.__func__ is right.__func__
    if type(left) in (type(len), type(zoo.re.compile("").match)):
        return type(left) is type(right) and left.__self__ is right.__self__ and left == right
    return left is right


@accepted
def test_a_callable_is_named(label):
    obj, kind, module, qualname, member = ACCEPTED[label]
    assert CallableRef.of(obj).parts == (kind, module, qualname, member)


@accepted
def test_the_name_leads_back_to_the_very_same_callable(label):
    obj, kind, module, qualname, member = ACCEPTED[label]
    found = ref(kind, module, qualname, member).resolve(bound_object(obj))
    assert same(found, obj)


@accepted
def test_what_is_bound_travels_with_the_name(label):
    obj, kind, module, qualname, member = ACCEPTED[label]
    bound = bound_object(obj)
    if kind in {"function", "class", "classmethod", "builtin"}:
        assert bound is UNBOUND
    elif kind == "instance":
        assert bound is obj
    else:
        assert bound is obj.__self__


@accepted
def test_a_name_resolves_under_no_other_kind(label):
    obj, kind, module, qualname, member = ACCEPTED[label]
    for other in get_args(KindName):
        if other == kind:
            continue
        with pytest.raises(UnresolvableCallable):
            ref(other, module, qualname, member).resolve(bound_object(obj))


@accepted
def test_a_bound_object_is_neither_missing_nor_too_many(label):
    obj, kind, module, qualname, member = ACCEPTED[label]
    wrong = UNBOUND if bound_object(obj) is not UNBOUND else zoo.plain
    with pytest.raises(UnresolvableCallable, match="does not lead back"):
        ref(kind, module, qualname, member).resolve(wrong)


@accepted
def test_a_member_is_neither_missing_nor_too_many(label):
    obj, kind, module, qualname, member = ACCEPTED[label]
    wrong = "method" if member is None else None
    with pytest.raises(UnresolvableCallable, match="does not lead back"):
        ref(kind, module, qualname, wrong).resolve(bound_object(obj))


@refused
def test_a_callable_of_no_documented_kind_is_refused_with_its_reason_and_a_remedy(label):
    obj, reason = REFUSED[label]
    with pytest.raises(NotDeferrable) as caught:
        CallableRef.of(obj)
    assert caught.value.reason == reason
    problem, semicolon, remedy = str(caught.value).rpartition("; ")
    assert problem and semicolon and remedy


#: What a token might name of the refused: (kind, qualname, member, bound).
NAMED = {
    "lambda": ("function", "lambda_", None, UNBOUND),
    "renamed lambda": ("function", "renamed_lambda", None, UNBOUND),
    "wrapped lambda": ("function", "wrapped_lambda", None, UNBOUND),
    "nested function under a module's name": ("function", "nested", None, UNBOUND),
    "nested class": ("class", "Plain.Nested", None, UNBOUND),
    "local class under a module's name": ("class", "Local", None, UNBOUND),
    "object of a nested class": ("instance", "Plain.Nested", None, zoo.Plain.Nested()),
    "method of a nested class": ("method", "Plain.Nested", "method", zoo.Plain.Nested()),
    "class method of a nested class": ("classmethod", "Plain.Nested", "build", UNBOUND),
    "static method as function": ("function", "Plain.static", None, UNBOUND),
    "static method as method": ("method", "Plain", "static", zoo.plain),
    "static method as class method": ("classmethod", "Plain", "static", UNBOUND),
    "static override": ("method", "Child", "becomes_static", zoo.child),
    "method without its object": ("function", "Plain.method", None, UNBOUND),
    "method with an object of a subclass": ("method", "Plain", "method", zoo.child),
    "method with an object of another class": ("method", "Plain", "method", zoo.calling),
    "method with a class for an object": ("method", "Plain", "method", zoo.Plain),
    "instance of a subclass": ("instance", "CallableBase", None, zoo.InheritedCalling()),
    "instance that is a class": ("instance", "Calling", None, zoo.Calling),
    "instance that is not callable": ("instance", "Plain", None, zoo.plain),
    "lru_cache object": ("function", "cached", None, UNBOUND),
    "lru_cache in a class": ("method", "Plain", "cached", zoo.plain),
    "property": ("method", "Plain", "prop", zoo.plain),
    "partial method": ("method", "Plain", "partial_method", zoo.plain),
    "function hung on a class": ("method", "Plain", "hung", zoo.plain),
    "function hung on a class under its own name": ("method", "Plain", "foreign", zoo.plain),
    "class hung on a class": ("method", "Plain", "Nested", zoo.plain),
    "lambda in a class": ("method", "Plain", "method_lambda", zoo.plain),
    "generator": ("function", "generator", None, UNBOUND),
    "async generator": ("function", "async_generator", None, UNBOUND),
    "generator method": ("method", "Plain", "generator", zoo.plain),
    "metaclass": ("class", "WithMeta", None, UNBOUND),
    "method of a metaclass": ("classmethod", "WithMeta", "meta_method", UNBOUND),
    "re-exported function": ("function", "reexported", None, UNBOUND),
    "re-exported module's class": ("class", "OrderedDict", None, UNBOUND),
    "object of a re-exported class": ("method", "Base", "save", zoo.Base()),
    "class method of a re-exported class": ("classmethod", "Base", "create", UNBOUND),
    "module": ("function", "os", None, UNBOUND),
    "attribute of a module": ("builtin", "os.system", None, UNBOUND),
    "instance as function": ("function", "calling", None, UNBOUND),
    "bound method at the top level": ("function", "plain.method", None, UNBOUND),
    "number": ("function", "RAN", None, UNBOUND),
    "missing name": ("function", "missing", None, UNBOUND),
    "deleted name": ("function", "deleted", None, UNBOUND),
    "missing class": ("method", "Missing", "method", zoo.plain),
    "missing member": ("method", "Plain", "missing", zoo.plain),
    "attribute of a function": ("function", "function.x", None, UNBOUND),
    "member of a function": ("classmethod", "function", "x", UNBOUND),
    "member of a function for an object": ("method", "function", "x", zoo.function),
    "built-in member of a function": ("builtin_method", "function", "x", zoo.function),
    "function of __main__": ("function", "main_function", None, UNBOUND),
    "built-in method on another type's object": ("builtin_method", "MyList", "append", []),
    "built-in method that is written in Python": ("builtin_method", "MyList", "method", zoo.MyList()),
}


@pytest.mark.parametrize("label", NAMED)
def test_a_token_reaches_none_of_the_refused(label):
    kind, qualname, member, bound = NAMED[label]
    with pytest.raises(UnresolvableCallable) as caught:
        ref(kind, HERE, qualname, member).resolve(bound)
    assert "; " in str(caught.value)


def test_a_built_in_class_method_is_bound_to_its_own_class_only():
    name = ref("builtin_method", "builtins", "dict", "fromkeys")
    assert name.resolve(dict) == dict.fromkeys
    for wrong in (zoo.OrderedDict, {}, list):
        with pytest.raises(UnresolvableCallable):
            name.resolve(wrong)


def test_a_built_in_method_is_bound_to_an_object_of_its_own_class_only():
    name = ref("builtin_method", "builtins", "list", "append")
    for wrong in ("x", (), zoo.MyList(), list, None, zoo.Trapped()):
        with pytest.raises(UnresolvableCallable):
            name.resolve(wrong)


def test_a_built_in_static_method_is_refused_in_the_handler_too():
    with pytest.raises(UnresolvableCallable):
        ref("builtin_method", "builtins", "str", "maketrans").resolve("x")


def test_the_message_about_main_names_the_module_to_move_to(monkeypatch):
    with pytest.raises(NotDeferrable, match="a new module beside|such as tasks.py"):
        CallableRef.of(zoo.main_function)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", types.SimpleNamespace(name="shop.run"))
    with pytest.raises(NotDeferrable, match=r"a new module beside shop\.run"):
        CallableRef.of(zoo.main_function)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(NotDeferrable, match=r"such as tasks\.py"):
        CallableRef.of(zoo.main_function)


# --- Names ----------------------------------------------------------------------------------------

BAD_NAMES = [
    "", ".", "a.", ".a", "a..b", "a b", "a-b", "1a", "a.1", "os\0", "os\n", "\nos", "os ", " os", "a:b", "a/b", "..os", "cafe\u0301", "café",
    "ﬁle", "оs", "a\u200bb", "x" * 256, "a\\b", "a.<locals>.b", "<lambda>", "a\u2028", "a\r",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("place", ["module", "qualname", "member"])
def test_a_name_is_ascii_identifiers_and_nothing_after_them(name, place):
    with pytest.raises(ValidationError):
        ref(**{"kind": "method", "member": "m", place: name})


@pytest.mark.parametrize("member", ["__init__", "__call__", "__x", "__", "a.b", "_Plain__x.y"])
def test_a_member_is_one_name_and_no_special_one(member):
    with pytest.raises(ValidationError):
        ref("method", HERE, "Plain", member)


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if len(name) < 256])
def test_look_up_refuses_a_bad_name_before_it_imports(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, zoo)
    with pytest.raises(UnresolvableCallable, match="dotted ASCII"):
        find(name, "function")
    with pytest.raises(UnresolvableCallable, match="dotted ASCII"):
        find(HERE, name)


@pytest.mark.parametrize("kind", ["static", "lambda", "", "Function", None, 1])
def test_there_is_no_other_kind(kind):
    with pytest.raises(ValidationError):
        ref(kind)


def test_a_reference_is_frozen_and_holds_nothing_else():
    name = ref()
    with pytest.raises(ValidationError):
        name.module = "os"
    with pytest.raises(ValidationError):
        CallableRef(kind="function", module="a", qualname="b", extra=1)


def test_a_rejected_name_is_not_quoted():
    with pytest.raises(ValidationError) as caught:
        ref(module="secret secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("member", "text"), [(None, f"{HERE}:Plain"), ("method", f"{HERE}:Plain.method")])
def test_a_reference_reads_as_a_pattern(member, text):
    assert str(ref("method", HERE, "Plain", member)) == text


# --- Modules --------------------------------------------------------------------------------------


def test_a_module_that_answers_any_name_is_read_by_its_dict(monkeypatch):
    module = zoo.GettingModule("zoo_getting")
    monkeypatch.setitem(sys.modules, "zoo_getting", module)
    with pytest.raises(UnresolvableCallable, match="does not exist"):
        find("zoo_getting", "anything")


IMPOSTORS = {"trapped": zoo.Trapped(), "object": zoo.plain, "class": zoo.Plain, "number": 3}


@pytest.mark.parametrize("label", IMPOSTORS)
def test_what_replaced_a_module_is_no_module(label, monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo_impostor", IMPOSTORS[label])
    with pytest.raises(UnresolvableCallable, match="is not a module"):
        find("zoo_impostor", "function")


def test_a_module_that_blocks_its_import_is_unresolvable(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo_blocked", None)
    with pytest.raises(UnresolvableCallable, match="cannot be imported"):
        find("zoo_blocked", "function")


@pytest.mark.parametrize("body", ["raise ValueError('boom')", "import missing_of_missing", "def f(:", "f = 1 / 0"])
def test_a_module_that_fails_to_import_is_unresolvable_and_its_text_is_not_quoted(body, tmp_path, monkeypatch):
    (tmp_path / "zoo_failing.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnresolvableCallable, match="cannot be imported") as caught:
        find("zoo_failing", "f")
    assert "boom" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_module_is_imported_when_a_name_in_it_is_resolved(tmp_path, monkeypatch):
    (tmp_path / "zoo_fresh.py").write_text("def f(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zoo_fresh", raising=False)
    found = ref("function", "zoo_fresh", "f").resolve()
    assert found is sys.modules["zoo_fresh"].f


def test_a_module_that_is_run_under_two_names_has_two_of_each(monkeypatch):
    copy = types.ModuleType("zoo_copy")
    exec("def f(): ...", copy.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "zoo_copy", copy)
    old = copy.f
    exec("def f(): ...", copy.__dict__)  # noqa: S102
    with pytest.raises(NotDeferrable) as caught:
        CallableRef.of(old)
    assert caught.value.reason == "not-found"


# --- Classes --------------------------------------------------------------------------------------


def test_a_nested_class_may_be_a_value_but_no_task():
    assert check_class(zoo.Plain.Nested, nested=True) == (HERE, "Plain.Nested")
    with pytest.raises(NotDeferrable):
        check_class(zoo.Plain.Nested)
    with pytest.raises(NotDeferrable) as caught:
        check_class(zoo.Local, nested=True)
    assert caught.value.reason == "nested-class"


def test_a_metaclass_is_admitted_when_it_is_named():
    assert CallableRef.of(zoo.WithMeta, metaclasses=frozenset({zoo.Meta})).qualname == "WithMeta"
    name = ref("class", HERE, "WithMeta")
    assert name.resolve(metaclasses=frozenset({zoo.Meta})) is zoo.WithMeta
    with pytest.raises(UnresolvableCallable):
        name.resolve()
    zoo.RAN.clear()  # pytest and the set of this test asked for a hash


def test_members_are_found_along_the_mro_as_they_are_written():
    assert find_member(zoo.Child, "static") == (zoo.Plain, zoo.Plain.__dict__["static"])
    assert class_mro(zoo.Child) == (zoo.Child, zoo.Plain, object)
    with pytest.raises(UnresolvableCallable, match="no member"):
        find_member(zoo.Plain, "missing")


@pytest.mark.parametrize("wrapped", [5, len, zoo.Plain()])
def test_a_class_method_of_something_else_than_a_python_function_leads_nowhere(wrapped, monkeypatch):
    monkeypatch.setattr(zoo.Plain, "hung", classmethod(wrapped), raising=False)
    with pytest.raises(UnresolvableCallable, match="does not lead back"):
        ref("classmethod", HERE, "Plain", "hung").resolve()


PATHS = {
    f"{HERE}:Plain": zoo.Plain,
    f"{HERE}:WithMeta": zoo.WithMeta,
    "builtins:int": int,
    "subprocess:Popen": subprocess.Popen,
    ":ModuleIsObject": zoo.ModuleIsObject,
    ":ModuleIsTrapText": zoo.ModuleIsTrapText,
    f"{HERE}:": zoo.TrapClassName,
}


@pytest.mark.parametrize("path", PATHS)
def test_a_class_says_its_path_in_exact_text_or_not_at_all(path):
    assert class_path(PATHS[path]) == path


def test_a_built_in_that_is_found_nowhere_is_refused(monkeypatch):
    monkeypatch.delattr(zoo.math, "sqrt")
    with pytest.raises(NotDeferrable, match="not found by its name"):
        CallableRef.of(SQRT)


SQRT = zoo.math.sqrt


def test_a_built_in_method_is_proved_in_its_class():
    append = [].append
    assert CallableRef.of(append).resolve(append.__self__) == append


def test_a_callable_is_judged_by_its_code_at_the_handler_too(monkeypatch):
    monkeypatch.setattr(zoo, "function", zoo.renamed_lambda)
    with pytest.raises(UnresolvableCallable, match="lambda"):
        ref().resolve()


RENAMES = {
    "__qualname__": "coroutine",
    "__module__": "tests.zoo.decorators",
    "__name__": "<lambda>",
    "__code__": zoo.generator.__code__,
}


@pytest.mark.filterwarnings("ignore:Assigning a code object of non-matching type:DeprecationWarning")  # from 3.13 on
@pytest.mark.parametrize("attribute", RENAMES)
def test_a_function_that_was_admitted_is_judged_again_when_it_has_changed(attribute, monkeypatch):
    policy = Policy(HERE)
    name = policy.callable_ref(zoo.function)
    assert policy.load_callable(name) is zoo.function
    monkeypatch.setattr(zoo.function, attribute, RENAMES[attribute])
    with pytest.raises(NotDeferrable):
        policy.callable_ref(zoo.function)
    with pytest.raises(UnresolvableCallable):
        policy.load_callable(name)


def test_a_function_that_was_admitted_is_looked_up_again(monkeypatch):
    policy = Policy(HERE)
    name, function = policy.callable_ref(zoo.function), zoo.function
    assert policy.load_callable(name) is function
    monkeypatch.setitem(sys.modules, HERE, types.ModuleType(HERE))
    with pytest.raises(UnresolvableCallable):
        policy.load_callable(name)
    with pytest.raises(NotDeferrable):
        policy.callable_ref(function)
    monkeypatch.setitem(sys.modules, HERE, zoo)
    monkeypatch.delattr(zoo, "function")
    with pytest.raises(UnresolvableCallable):
        policy.load_callable(name)
    with pytest.raises(NotDeferrable):
        policy.callable_ref(function)


def test_a_function_that_says_that_it_wraps_itself_is_looked_at_for_a_while_only(monkeypatch):
    monkeypatch.setattr(zoo.function, "__wrapped__", zoo.function, raising=False)
    assert CallableRef.of(zoo.function).qualname == "function"


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        (zoo.Dispatching().go, "is a singledispatchmethod; defer a plain method"),
        (zoo.Dispatching.build, "is a singledispatchmethod; defer a plain method"),
        (zoo.Plain.method, "is a method without its object; defer a plain method of an object"),
        (mock.create_autospec(zoo.function), "a mock has none"),
        (mock.create_autospec(zoo.Plain), "for a mock, what it stands for"),
        (mock.Mock(), "for a mock, what it stands for"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_what_the_object_really_is(obj, said):
    with pytest.raises(NotDeferrable, match=said):
        CallableRef.of(obj)


def test_what_a_singledispatchmethod_gives_is_refused_by_its_class_where_it_is_an_object(monkeypatch):
    given = type("Given", (), {"__call__": lambda self: None})  # from Python 3.14 on, functools has such a class
    monkeypatch.setattr("safedefer.refs._DISPATCHING", given)
    with pytest.raises(NotDeferrable, match="it is a singledispatchmethod; defer a plain method") as caught:
        CallableRef.of(given())
    assert caught.value.reason == "unbound-method"
