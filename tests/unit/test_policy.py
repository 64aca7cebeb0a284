"""What each pattern admits, and all that it does not."""

import contextlib
import copy
import importlib
import math
import operator
import os
import pickle
import re
import subprocess
import sys
import textwrap
import types
import unittest
from enum import Enum
from http import HTTPStatus

import pydantic
import pytest

from safedefer.errors import ConfigurationError, NotDeferrable, PolicyViolation, UnresolvableCallable
from safedefer.gadgets import (
    GADGET_MODULES,
    GADGETS,
    HARMLESS_TYPES,
    is_gadget,
    is_standard_library,
)
from safedefer.policy import Policy, deferrable
from safedefer.refs import UNBOUND, CallableRef, bound_object
from tests.unit.apps import make_app
from tests.zoo import callables as zoo
from tests.zoo import decorators, far, near

ZOO = "tests.zoo.callables"
FAR, NEAR = far.__name__, near.__name__


def ref(text, kind="function", member=None):
    module, _, qualname = text.partition(":")
    return CallableRef(kind=kind, module=module, qualname=qualname, member=member)


def admits(policy, obj):
    """Whether both ends agree that an object may run; they must agree on which."""
    name = CallableRef.of(obj)
    try:
        policy.callable_ref(obj)
    except NotDeferrable as error:
        assert error.reason == "policy"
        with pytest.raises(PolicyViolation):
            policy.load_callable(name, bound_object(obj))
        return False
    found = policy.load_callable(name, bound_object(obj))
    assert CallableRef.of(found).parts == name.parts
    return True


OWN = {label: obj for label, obj, kind, module, *_ in zoo.ACCEPTED if module == ZOO}


# --- Patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [row[0] for row in zoo.ACCEPTED])
def test_without_a_pattern_nothing_may_run(label):
    obj = {row[0]: row[1] for row in zoo.ACCEPTED}[label]
    assert not admits(Policy(), obj)
    assert not admits(Policy(deferrable=True), obj)


NEEDS_MORE = {
    "instance with inherited __call__",
    "inherited method of another module",
    "inherited class method of another module",
}
INHERITED = NEEDS_MORE | {
    "inherited method",
    "inherited class method",
    "super() method that is not overridden",
    "super() class method that is not overridden",
    "built-in method of a subclass",
}


@pytest.mark.parametrize("pattern", [ZOO, "tests.zoo.*", "tests.*"])
@pytest.mark.parametrize("label", OWN)
def test_a_module_or_package_pattern_admits_what_is_the_modules_own(pattern, label):
    policy = Policy(pattern)
    borrowed = label in NEEDS_MORE and pattern == ZOO
    assert admits(policy, OWN[label]) is not (borrowed or label == "built-in method of a subclass")


@pytest.mark.parametrize(
    "pattern", ["tests.zoo.decorators", "tests", "tests.zoo", "tests.zo.*", "tests.zoo.call.*", f"{ZOO}.more.*"]
)
@pytest.mark.parametrize("label", ["function", "class", "callable instance", "method", "class method"])
def test_a_pattern_of_something_else_does_not(pattern, label):
    assert not admits(Policy(pattern), OWN[label])


@pytest.mark.parametrize("label", OWN)
def test_an_exact_pattern_admits_exactly_that(label):
    name = CallableRef.of(OWN[label])
    policy = Policy(f"{name.module}:{name.qualname}")
    assert admits(policy, OWN[label]) is (label not in INHERITED)
    assert not admits(policy, zoo.closure_free)


def test_an_exact_pattern_of_a_class_admits_its_subclass_not():
    policy = Policy(f"{ZOO}:Plain")
    assert admits(policy, zoo.plain.method)
    assert not admits(policy, zoo.Child)
    assert not admits(policy, zoo.child.overridden)
    assert not admits(policy, zoo.child.method)


def test_an_exact_pattern_of_a_member_admits_no_other_member_and_not_the_class():
    policy = Policy(f"{ZOO}:Plain.build")
    assert admits(policy, zoo.Plain.build)
    assert not admits(policy, zoo.Plain.async_build)
    assert not admits(policy, zoo.Plain)


@pytest.mark.parametrize(
    "pattern",
    ["tests.zoo.decorators:Base.save", f"{ZOO}:Record.save", "tests.zoo.decorators:Base", "tests.zoo.decorators"],
)
def test_an_inherited_member_is_admitted_by_a_pattern_of_its_own_or_of_its_class(pattern):
    record = zoo.Record()
    assert not admits(Policy(ZOO), record.save)
    assert admits(Policy(ZOO, pattern), record.save)


def test_naming_an_inherited_member_of_one_class_admits_it_for_no_other():
    policy = Policy(ZOO, f"{ZOO}:Record.save")
    assert not admits(policy, zoo.Record.create)
    assert not admits(Policy(ZOO, "tests.zoo.decorators:Base.create"), zoo.Record().save)


@pytest.mark.parametrize(
    "member",
    ["parse_raw", "parse_file", "model_construct", "model_validate", "model_dump", "model_rebuild", "copy", "from_orm"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_model_inherits_from_pydantic_is_not_admitted(member):
    policy = Policy("tests.*", f"{ZOO}:Model")
    kind = "classmethod" if isinstance(pydantic.BaseModel.__dict__[member], classmethod) else "method"
    bound = UNBOUND if kind == "classmethod" else zoo.Model()
    with pytest.raises((PolicyViolation, UnresolvableCallable)):
        policy.load_callable(ref(f"{ZOO}:Model", kind, member), bound)


@pytest.mark.parametrize("member", ["parse_raw", "parse_file", "model_construct"])
def test_a_gadget_of_a_class_stays_refused_when_the_class_is_named(member):
    policy = Policy(ZOO, "pydantic.*", "pydantic.main:BaseModel")
    name = ref(f"{ZOO}:Model", "classmethod", member)
    with pytest.raises(PolicyViolation, match="gadget"):
        policy.load_callable(name)
    with pytest.raises(PolicyViolation, match="gadget"):
        policy.check(ref("pydantic.main:BaseModel", "classmethod", member))


def test_a_gadget_of_a_class_is_admitted_when_it_is_named_itself():
    policy = Policy(ZOO, "pydantic.main:BaseModel.model_construct")
    found = policy.load_callable(ref(f"{ZOO}:Model", "classmethod", "model_construct"))
    assert found().number == 1


@pytest.mark.parametrize("pattern", [
    "", "*", "shop.", ".shop", "shop..x", "shop.*.x", "*.shop", "shop*", "shop.**", "shop:*", "shop:", ":f", "shop:f.", "a:b:c", "shop tasks",
    "shop,other", "shop\n", "shop.*\n", "shop:f\n", "shop\0", "é", "shop:é", "shop/tasks", 3, None, b"shop", ("shop",),
])  # fmt: skip
def test_a_malformed_pattern_is_refused(pattern):
    with pytest.raises(ConfigurationError, match="is not a pattern"):
        Policy(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["os", "os.*", "subprocess", "builtins", "builtins.*", "importlib.*", "_operator", "json.decoder", "asyncio.*"],
)
def test_a_part_of_the_standard_library_is_no_pattern(pattern):
    with pytest.raises(ConfigurationError, match="standard library"):
        Policy(pattern)


@pytest.mark.parametrize(
    "pattern", ["__main__", "__mp_main__", "shop.__main__", "shop.__init__", "__main__.*", "shop.__main__.*"]
)
def test_a_module_that_is_another_one_in_every_process_is_no_pattern(pattern):
    with pytest.raises(ConfigurationError, match="another module"):
        Policy(pattern)


@pytest.mark.parametrize("pattern", [
    f"{ZOO}:missing", "missing_of_missing:f", f"{ZOO}:Plain.missing", f"{ZOO}:Missing.method", f"{ZOO}:function.attribute",
])  # fmt: skip
def test_an_exact_pattern_that_names_nothing_is_refused(pattern):
    with pytest.raises(ConfigurationError, match="names nothing"):
        Policy(pattern).load()


@pytest.mark.parametrize(("pattern", "why"), [
    (f"{ZOO}:lambda_", "cannot be deferred"), (f"{ZOO}:cached", "cannot be deferred"), (f"{ZOO}:calling", "an object or its method"),
    (f"{ZOO}:main_function", "cannot be deferred"), (f"{ZOO}:Plain.prop", "no method"), (f"{ZOO}:Plain.static", "no method"),
])  # fmt: skip
def test_an_exact_pattern_of_what_cannot_be_deferred_is_refused(pattern, why):
    with pytest.raises(ConfigurationError, match=why):
        Policy(pattern).load()


def test_an_exact_pattern_may_name_a_built_in_by_any_name_that_leads_to_it():
    for pattern in ("operator:add", "_operator:add"):
        assert admits(Policy(pattern), operator.add)
    assert not admits(Policy("operator:add"), operator.sub)


# --- When exact names are looked up ---------------------------------------------------------------


NAMED_LATE = {
    "function": ('"MODULE:send"', {}),
    "class": ('"MODULE:Order"', {}),
    "member": ('"MODULE:Order.ship"', {}),
    "metaclass": ('"MODULE"', {"metaclasses": '["MODULE:Meta"]'}),
    "old name": ('"MODULE:gone", "MODULE:send"', {"moved": '{"MODULE:gone": "MODULE:send"}'}),
}


@pytest.mark.parametrize("label", NAMED_LATE)
@pytest.mark.parametrize("ask", ["load", "callable_ref", "load_callable"])
def test_the_module_of_an_exact_pattern_may_import_the_one_that_builds_the_policy(label, ask, tmp_path, monkeypatch):
    patterns, options = NAMED_LATE[label]
    tasks, main = f"zoo_late_{ask}_{label.replace(' ', '')}", f"zoo_main_{ask}_{label.replace(' ', '')}"
    given = "".join(f", {name}={value}" for name, value in options.items())
    (tmp_path / f"{main}.py").write_text(
        f"import {tasks}\nfrom safedefer import Policy\npolicy = Policy({patterns}{given})\n".replace("MODULE", tasks)
    )
    (tmp_path / f"{tasks}.py").write_text(
        f"from {main} import policy\ndef send(): ...\nclass Meta(type): ...\n"
        "class Order:\n    @classmethod\n    def ship(cls): ...\nclass Odd(metaclass=Meta): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(tasks)  # it runs first, and is half imported when the policy is built
    obj = {"class": module.Order, "member": module.Order.ship, "metaclass": module.Odd}.get(label, module.send)
    if ask == "load":
        module.policy.load()
    elif ask == "callable_ref":
        assert module.policy.callable_ref(obj)
    else:
        name = CallableRef.of(obj, metaclasses=frozenset({type, module.Meta}))
        assert module.policy.load_callable(name) == obj


def test_what_a_first_use_found_is_what_an_exact_pattern_means_from_then_on(monkeypatch):
    policy = Policy(f"{ZOO}:function")
    assert admits(policy, zoo.function)
    other = types.FunctionType(zoo.function.__code__, vars(zoo), "function")
    monkeypatch.setattr(zoo, "function", other)
    policy.load()
    assert not admits(policy, other)


@pytest.mark.parametrize("pattern", [f"{ZOO}:functoin", "zoo_mistyped:f", f"{ZOO}:Plain.methd"])
def test_a_mistyped_exact_pattern_is_an_error_of_configuration_at_the_first_use(pattern):
    for use in (
        lambda policy: policy.load(),
        lambda policy: policy.callable_ref(zoo.function),
        lambda policy: policy.class_name(zoo.Plain),
        lambda policy: policy.check(ref(f"{ZOO}:function")),
        lambda policy: Policy("tests.*").restricted(policy.patterns).load(),
    ):
        with pytest.raises(ConfigurationError, match="names nothing"):
            use(Policy(pattern))


# --- Built-ins, the standard library, gadgets -----------------------------------------------------


@pytest.mark.parametrize(
    "obj", [len, math.sqrt, os.path.join, subprocess.run, os.system, zoo.OrderedDict], ids=lambda obj: obj.__name__
)
def test_the_standard_library_is_reached_by_exact_patterns_only(obj):
    name = str(CallableRef.of(obj))
    assert not admits(Policy("tests.*", deferrable=True), obj)
    assert admits(Policy(name), obj)


def test_a_built_in_outside_the_standard_library_needs_an_exact_pattern_too():
    name = ref("jiter.jiter:from_json", "builtin")
    with pytest.raises(PolicyViolation, match="built-in"):
        Policy("jiter.*").check(name)


@pytest.mark.parametrize("name", sorted(GADGETS))
def test_no_pattern_of_a_module_and_no_mark_admits_a_gadget(name):
    module, _, qualname = name.partition(":")
    package = module.partition(".")[0]
    patterns = [] if is_standard_library(module) else [module, f"{package}.*"]
    policy = Policy(*patterns, deferrable=True)
    owner, _, member = qualname.rpartition(".")
    forms = [ref(name), ref(name, "class"), ref(name, "builtin"), ref(name, "method", "run")]
    if owner and not member.startswith("__"):
        forms += [ref(f"{module}:{owner}", kind, member) for kind in ("method", "classmethod", "builtin_method")]
    for form in forms:
        with pytest.raises(PolicyViolation):
            policy.check(form)


@pytest.mark.parametrize("module", sorted(GADGET_MODULES))
def test_a_gadget_module_is_one_with_all_below_it(module):
    assert is_gadget(module, "anything")
    assert is_gadget(f"{module}.deep.er", "Any.thing")
    assert not is_gadget(f"{module}x", "anything") or f"{module}x" in GADGET_MODULES


def test_a_typosquat_of_a_gadget_is_none():
    assert not is_gadget("my.subprocess", "run")
    assert not is_gadget("", "eval")


@pytest.mark.parametrize(
    "name",
    [
        "str.format",
        "str.format_map",
        "str.encode",
        "str.translate",
        "str.zfill",
        "str.ljust",
        "bytes.decode",
        "list.sort",
    ],
)
def test_a_built_in_method_that_does_more_than_it_says_needs_an_exact_pattern(name):
    owner, _, member = name.partition(".")
    policy = Policy("tests.*")
    bound = {"str": "x", "bytes": b"x", "list": []}[owner]
    with pytest.raises(PolicyViolation):
        policy.load_callable(ref(f"builtins:{owner}", "builtin_method", member), bound)
    assert admits(Policy(f"builtins:{name}"), getattr(bound, member))


@pytest.mark.parametrize(
    ("bound", "member"), [([], "append"), ("x", "upper"), ({}, "get"), ({1}, "add"), (1, "bit_length")]
)
def test_a_built_in_method_is_admitted_by_its_exact_pattern_alone(bound, member):
    name, obj = type(bound).__name__, getattr(bound, member)
    assert admits(Policy(f"builtins:{name}.{member}"), obj)
    for policy in (Policy(), Policy("tests.*"), Policy(f"builtins:{name}"), Policy("builtins:list.sort")):
        assert not admits(policy, obj)


def test_a_built_in_method_of_an_admitted_subclass_needs_its_pattern():
    items = zoo.MyList()
    for member in ("append", "sort"):
        obj = getattr(items, member)
        assert not admits(Policy(ZOO), obj)
        assert not admits(Policy(f"{ZOO}:MyList"), obj)
        assert not admits(Policy(ZOO, "builtins:list"), obj)
        assert not admits(Policy(f"builtins:list.{member}"), obj)
        assert admits(Policy(ZOO, f"builtins:list.{member}"), obj)
        assert admits(Policy(ZOO, f"{ZOO}:MyList.{member}"), obj)


def test_a_class_of_c_in_an_admitted_package_admits_none_of_its_methods():
    pattern = re.compile("a")
    assert not admits(Policy("tests.*"), pattern.match)
    assert admits(Policy("re:Pattern.match"), pattern.match)
    assert not admits(Policy("re:Pattern.match"), pattern.sub)


@pytest.mark.parametrize("cls", sorted(HARMLESS_TYPES, key=str))
def test_a_harmless_type_is_a_value_and_no_callee(cls):
    policy = Policy("tests.*")
    assert policy.load_class(policy.class_name(cls)) is cls
    with pytest.raises(PolicyViolation):
        policy.check(ref(f"builtins:{cls.__name__}", "class"))


@pytest.mark.parametrize(("of", "patterns"), [
    (lambda: far.Plain, [f"{FAR}:Plain"]), (lambda: far.Point(1, 2).move, [f"{FAR}:Point.move"]), (lambda: [].append, ["builtins:list.append"]),
    (lambda: len, ["builtins:len"]), (lambda: zoo.PopenChild, [f"{ZOO}:PopenChild"]), (lambda: near.Child, [f"{NEAR}:Child"]),
])  # fmt: skip
def test_the_patterns_that_a_refusal_names_admit_the_callable(of, patterns):
    obj = of()
    with pytest.raises(NotDeferrable) as caught:
        Policy().callable_ref(obj)
    assert list(caught.value.missing) == patterns
    assert Policy(*patterns).callable_ref(obj)


def test_either_pattern_that_a_refused_construction_names_admits_it():
    with pytest.raises(NotDeferrable) as caught:
        Policy(NEAR).callable_ref(near.Child)
    assert caught.value.missing == (f"{NEAR}:Child",)
    for pattern in caught.value.missing:
        assert f"'{pattern}'" in str(caught.value)
        assert Policy(NEAR, pattern).callable_ref(near.Child)


def test_a_class_that_is_built_by_a_gadget_is_no_callee():
    class_ = zoo.PopenChild
    assert not admits(Policy(ZOO), class_)
    assert admits(Policy(ZOO, "subprocess:Popen"), class_)
    assert admits(Policy(f"{ZOO}:PopenChild"), class_)
    assert not admits(Policy(ZOO), types.MethodType(subprocess.Popen.kill, class_.__new__(class_)))


def test_an_enum_may_be_called_though_enum_itself_may_not():
    assert admits(Policy(ZOO), zoo.Color)
    ref = CallableRef(kind="class", module="enum", qualname="Enum")
    with pytest.raises(PolicyViolation, match="gadget"):
        Policy(ZOO, deferrable=True).check(ref)
    for policy in (Policy(ZOO), Policy("enum:Enum")):
        with pytest.raises(NotDeferrable, match="makes a class"):
            policy.callable_ref(Enum)


# --- Marks ----------------------------------------------------------------------------------------


def test_a_mark_admits_the_object_and_nothing_near_it():
    policy = Policy(deferrable=True)
    assert admits(policy, zoo.marked)
    assert not admits(policy, zoo.wraps_marked)
    assert not admits(policy, zoo.function)
    assert admits(policy, zoo.MarkedClass)
    assert admits(policy, zoo.MarkedClass().method)
    assert admits(policy, zoo.MarkedClass.build)
    assert not admits(policy, zoo.MarkedChild)
    assert not admits(policy, zoo.MarkedChild().method)
    assert not admits(policy, zoo.MarkedChild.build)


def test_a_mark_counts_only_where_it_is_asked_for():
    assert not admits(Policy("tests.zoo.decorators"), zoo.marked)


def test_a_mark_on_a_base_admits_its_members_of_an_admitted_class():
    assert admits(Policy(f"{ZOO}:MarkedChild", deferrable=True), zoo.MarkedChild().method)
    assert not admits(Policy(f"{ZOO}:MarkedChild"), zoo.MarkedChild().method)


def test_a_mark_on_an_inherited_method_admits_that_one():
    record = zoo.MarkedRecord()
    policy = Policy(ZOO, deferrable=True)
    assert admits(policy, record.marked_method)
    assert admits(policy, zoo.MarkedRecord.marked_build)
    assert not admits(policy, record.save)
    assert not admits(Policy(ZOO), record.marked_method)


def test_a_mark_on_a_gadget_admits_nothing():
    deferrable(subprocess.run)
    deferrable(pydantic.BaseModel.__dict__["model_construct"].__func__)
    deferrable(textwrap.dedent)
    policy = Policy(ZOO, deferrable=True)
    assert not admits(policy, subprocess.run)
    assert not admits(policy, textwrap.dedent)  # no gadget, but the standard library's
    with pytest.raises(PolicyViolation, match="gadget"):
        policy.load_callable(ref(f"{ZOO}:Model", "classmethod", "model_construct"))


@pytest.mark.parametrize("label", ["built-in", "instance", "method", "text"])
def test_a_mark_is_on_functions_and_classes_only(label):
    obj = {"built-in": len, "instance": zoo.calling, "method": zoo.plain.method, "text": "x"}[label]
    with pytest.raises(ConfigurationError, match="marks functions and classes"):
        deferrable(obj)


def test_a_mark_is_no_reason_to_import(tmp_path, monkeypatch):
    (tmp_path / "zoo_marked.py").write_text("import safedefer\n@safedefer.deferrable\ndef f(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    policy = Policy(deferrable=True)
    with pytest.raises(PolicyViolation):
        policy.check(ref("zoo_marked:f"))
    assert "zoo_marked" not in sys.modules
    __import__("zoo_marked")
    assert policy.check(ref("zoo_marked:f"))
    with pytest.raises(PolicyViolation):
        policy.check(ref("zoo_marked:missing"))
    del sys.modules["zoo_marked"]


def test_a_mark_admits_the_nested_class_of_a_marked_one_as_a_value():
    policy = Policy(deferrable=True)
    assert policy.load_class(f"{ZOO}:MarkedClass.Inner") is zoo.MarkedClass.Inner
    with pytest.raises(PolicyViolation):
        policy.load_class(f"{ZOO}:Plain.Nested")


# --- Moved ----------------------------------------------------------------------------------------

MOVED = {
    f"{ZOO}:gone": f"{ZOO}:function",
    f"{ZOO}:Gone": f"{ZOO}:Plain",
    f"{ZOO}:Gone.old_method": f"{ZOO}:Child.method",
    f"{ZOO}:reexported": "subprocess:run",
}


@pytest.mark.parametrize(("old", "new"), [
    (ref(f"{ZOO}:gone"), ref(f"{ZOO}:function")), (ref(f"{ZOO}:Gone", "class"), ref(f"{ZOO}:Plain", "class")),
    (ref(f"{ZOO}:Gone", "classmethod", "build"), ref(f"{ZOO}:Plain", "classmethod", "build")),
    (ref(f"{ZOO}:Gone", "method", "old_method"), ref(f"{ZOO}:Child", "method", "method")),
])  # fmt: skip
def test_a_moved_name_leads_to_the_new_one(old, new):
    policy = Policy(ZOO, moved=MOVED)
    assert policy.check(old).parts == new.parts
    assert policy.check(old).parts == new.parts  # remembered
    if new.kind != "method":
        assert CallableRef.of(policy.load_callable(old)).parts == new.parts


@pytest.mark.parametrize("patterns", [(), (f"{ZOO}:gone",), (f"{ZOO}:function",)])
def test_both_names_must_be_admitted(patterns):
    with pytest.raises(PolicyViolation):
        Policy(*patterns, moved={f"{ZOO}:gone": f"{ZOO}:function"}).check(ref(f"{ZOO}:gone"))


def test_a_move_reaches_no_gadget():
    with pytest.raises(PolicyViolation, match="gadget"):
        Policy(ZOO, moved=MOVED).check(ref(f"{ZOO}:reexported"))


def test_the_old_name_may_be_an_exact_pattern_whether_or_not_it_is_still_there():
    for old in (f"{ZOO}:gone", f"{ZOO}:reexported_function", f"{ZOO}:coroutine"):
        policy = Policy(old, f"{ZOO}:function", moved={old: f"{ZOO}:function"})
        assert policy.load_callable(ref(old)) is zoo.function


def test_a_class_inside_the_arguments_moves_too():
    policy = Policy(ZOO, moved=MOVED)
    assert policy.load_class(f"{ZOO}:Gone") is zoo.Plain
    with pytest.raises(PolicyViolation):
        Policy(f"{ZOO}:Gone", moved=MOVED).load_class(f"{ZOO}:Gone")


def test_what_has_moved_is_not_deferred_under_its_old_name():
    policy = Policy(ZOO, moved={f"{ZOO}:coroutine": f"{ZOO}:function", f"{ZOO}:Plain": f"{ZOO}:Child"})
    for ask, obj in (
        (policy.callable_ref, zoo.coroutine),
        (policy.class_name, zoo.Plain),
        (policy.callable_ref, zoo.plain.method),
    ):
        with pytest.raises(NotDeferrable) as caught:
            ask(obj)
        assert caught.value.reason == "moved"


@pytest.mark.parametrize("target", [f"{ZOO}:function", f"{ZOO}:Plain.__init__", f"{ZOO}:Plain.__x"])
def test_a_method_that_moved_to_no_method_is_refused(target):
    policy = Policy(ZOO, moved={f"{ZOO}:Gone.method": target})
    with pytest.raises(PolicyViolation, match="moved maps a method to something that is none"):
        policy.check(ref(f"{ZOO}:Gone", "method", "method"))


def test_a_refusal_of_what_has_moved_keeps_its_own_reason():
    """The pattern of the old name admits nothing, and would be no remedy."""
    old = Policy(ZOO, moved={f"{ZOO}:function": "tests.zoo.other_still:function"})
    with pytest.raises(NotDeferrable, match="^tests.zoo.other_still:function may not run: no pattern admits it"):
        old.callable_ref(zoo.function)
    method = Policy(ZOO, moved={f"{ZOO}:Plain.method": f"{ZOO}:function"})
    with pytest.raises(NotDeferrable, match="moved maps a method to something that is none"):
        method.callable_ref(zoo.Plain().method)


@pytest.mark.parametrize(
    "moved",
    [{"a": "b:c"}, {"a:b": "c"}, {"a:b": "c:d", "c:d": "e:f"}, {"a:b": "a:b"}, {"a:b\n": "c:d"}, {"a.*": "b.*"}],
)
def test_a_move_is_one_step_between_two_names(moved):
    with pytest.raises(ConfigurationError, match="moved"):
        Policy(moved=moved)


# --- Metaclasses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("metaclass", [zoo.Meta, f"{ZOO}:Meta"], ids=["class", "name"])
def test_a_metaclass_is_admitted_by_naming_it(metaclass):
    policy = Policy(ZOO, metaclasses=[metaclass])
    assert policy.load_callable(ref(f"{ZOO}:WithMeta", "class")) is zoo.WithMeta
    assert policy.load_class(f"{ZOO}:WithMeta") is zoo.WithMeta
    for without in (Policy(ZOO), Policy(f"{ZOO}:WithMeta")):
        with pytest.raises(UnresolvableCallable, match="metaclass"):
            without.load_callable(ref(f"{ZOO}:WithMeta", "class"))
        with pytest.raises(UnresolvableCallable, match="metaclass"):
            without.load_class(f"{ZOO}:WithMeta")
        with pytest.raises(NotDeferrable, match="metaclass"):
            without.class_name(zoo.WithMeta)


@pytest.mark.parametrize("metaclass", ["Meta", f"{ZOO}:missing", f"{ZOO}:Plain", zoo.Plain, 3], ids=str)
def test_what_is_no_metaclass_is_refused(metaclass):
    with pytest.raises(ConfigurationError, match="metaclass"):
        Policy(metaclasses=[metaclass]).load()


# --- Classes inside arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "subprocess:Popen", "os:system", f"{ZOO}", f"{ZOO}:", ":Plain", "", f"{ZOO}:Plain:x", f"{ZOO}:Pla\nin", f"{ZOO}:Plain\0", f"{ZOO}\0:Plain",
    f"{ZOO}:" + "a." * 100_000 + "a", "a." * 100_000 + "a:b", f"{ZOO}:{'a' * 1000}", "builtins:object", "builtins:type", "builtins:complex.x",
])  # fmt: skip
def test_a_class_name_outside_the_patterns_is_refused_whatever_its_shape(name):
    with pytest.raises(PolicyViolation) as caught:
        Policy(f"{ZOO}:Child").load_class(name)
    assert len(str(caught.value)) < 800
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize("name", ["function", "RAN", "missing", "plain", "OrderedDict", "Local", "os", "Plain.method"])
def test_an_admitted_name_that_leads_to_no_class_of_that_name_is_unresolvable(name):
    with pytest.raises(UnresolvableCallable):
        Policy(ZOO).load_class(f"{ZOO}:{name}")


def test_a_gadget_is_no_value_either_unless_it_is_named():
    with pytest.raises(PolicyViolation):
        Policy("pydantic.*").load_class("pydantic.types:ImportString")
    with pytest.raises(NotDeferrable):
        Policy("pydantic.*").class_name(pydantic.types.ImportString)
    assert (
        Policy("pydantic.types:ImportString").load_class("pydantic.types:ImportString") is pydantic.types.ImportString
    )


def test_a_class_outside_the_patterns_is_refused_at_the_sender():
    with pytest.raises(NotDeferrable, match="not admitted") as caught:
        Policy(f"{ZOO}:Child").class_name(zoo.Plain)
    assert caught.value.reason == "policy"
    with pytest.raises(NotDeferrable, match="not admitted"):
        Policy("tests.*").class_name(subprocess.Popen)


def test_a_nested_class_is_a_value_with_its_outer_class():
    name = f"{ZOO}:Plain.Nested"
    for policy in (Policy(ZOO), Policy(f"{ZOO}:Plain"), Policy(name)):
        assert policy.class_name(zoo.Plain.Nested) == name
        assert policy.load_class(name) is zoo.Plain.Nested
    with pytest.raises(PolicyViolation):
        Policy(f"{ZOO}:Child").load_class(name)


# --- After the policy was built -------------------------------------------------------------------


def test_what_took_the_place_of_an_exact_object_is_refused(monkeypatch):
    policy = Policy(f"{ZOO}:function", f"{ZOO}:Plain", f"{ZOO}:Child.overridden")
    policy.load()

    def function():
        return "evil"

    function.__module__, function.__qualname__ = ZOO, "function"
    monkeypatch.setattr(zoo, "function", function)
    assert not admits(policy, function)
    evil = type("Plain", (zoo.Plain,), {"__module__": ZOO, "Nested": zoo.Plain.Nested})
    monkeypatch.setattr(zoo, "Plain", evil)
    assert not admits(policy, evil)
    assert not admits(policy, evil.build)
    with pytest.raises(PolicyViolation, match="named when the policy was loaded"):
        policy.load_class(f"{ZOO}:Plain")
    with pytest.raises(PolicyViolation, match="named when the policy was loaded"):
        policy.load_class(f"{ZOO}:Plain.Nested")
    with pytest.raises(NotDeferrable, match="named when the policy was loaded"):
        policy.class_name(evil)


def test_a_member_that_took_the_place_of_an_exact_one_is_refused(monkeypatch):
    policy = Policy(f"{ZOO}:Child.overridden", f"{ZOO}:Child")
    policy.load()

    def overridden(self):
        return "evil"

    overridden.__module__, overridden.__qualname__ = ZOO, "Child.overridden"
    monkeypatch.setattr(zoo.Child, "overridden", overridden)
    assert not admits(policy, zoo.child.overridden)


def test_a_function_hung_on_an_admitted_class_later_is_refused(monkeypatch):
    monkeypatch.setattr(zoo.Plain, "kill", os.kill, raising=False)
    monkeypatch.setattr(zoo.Plain, "run", subprocess.run, raising=False)
    for member in ("kill", "run"):
        with pytest.raises(UnresolvableCallable):
            Policy(ZOO, "subprocess:run").load_callable(ref(f"{ZOO}:Plain", "method", member), zoo.plain)


def test_a_base_that_claims_an_admitted_name_is_not_the_class_of_that_name():
    liar = type("Plain", (), {"__module__": ZOO, "steal": zoo.steal})
    child = type("Liar", (liar,), {"__module__": ZOO})
    zoo.Liar = child
    try:
        assert not admits(Policy(ZOO), child().steal)
        assert admits(Policy(ZOO, f"{ZOO}:Liar.steal"), child().steal)
    finally:
        del zoo.Liar


def test_a_base_that_took_the_place_of_an_exact_one_lends_no_member(monkeypatch):
    base = type("Base", (), {"__module__": "tests.zoo.decorators"})

    def save(self):
        return "evil"

    save.__module__, save.__qualname__ = "tests.zoo.decorators", "Base.save"
    base.save = save
    record = type("Record", (base,), {"__module__": ZOO})
    policy = Policy(ZOO, "tests.zoo.decorators:Base")
    policy.load()
    monkeypatch.setattr(decorators, "Base", base)
    monkeypatch.setattr(zoo, "Record", record)
    assert not admits(policy, record().save)


def test_a_policy_is_immutable():
    policy = Policy(ZOO)
    for change in (
        lambda: setattr(policy, "_modules", frozenset({"os"})),
        lambda: setattr(policy, "patterns", ()),
        lambda: delattr(policy, "_modules"),
        lambda: policy._moved.update(a="b"),
        lambda: policy._exact.update(a="b"),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()
    for clone in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            clone(policy)
    assert policy.patterns == (ZOO,)


def test_a_policy_shows_its_patterns():
    assert repr(Policy("shop.*", deferrable=True)) == "Policy('shop.*', deferrable=True)"
    assert repr(Policy()) == "Policy()"


# --- Loading --------------------------------------------------------------------------------------


def test_loading_imports_what_is_named_and_no_package(tmp_path, monkeypatch):
    package = tmp_path / "zoo_loading"
    package.mkdir()
    for name in ("__init__", "tasks", "other"):
        (package / f"{name}.py").write_text("def f(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    Policy("zoo_loading.tasks", "zoo_loading.*").load()
    assert "zoo_loading.tasks" in sys.modules
    assert "zoo_loading.other" not in sys.modules


@pytest.mark.parametrize("body", ["raise ImportError('no')", "raise ValueError('no')", "def f(:"])
def test_a_module_that_cannot_be_loaded_stops_the_start(body, tmp_path, monkeypatch):
    (tmp_path / "zoo_unloadable.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        Policy("zoo_unloadable").load()
    with pytest.raises(ConfigurationError, match="cannot be imported"):
        Policy("zoo_absent").load()


def test_a_module_whose_tasks_have_moved_may_be_gone():
    Policy("zoo_absent", ZOO, moved={"zoo_absent:f": f"{ZOO}:function"}).load()


# --- Messages -------------------------------------------------------------------------------------

REMEDIES = [  # what is refused as a callee, and whether its module is offered as a pattern
    (ref("http:HTTPStatus", "class"), False), (ref("textwrap:dedent"), False), (ref("builtins:len", "builtin"), False),
    (ref("os:system", "builtin"), False), (ref("numpy.linalg:solve", "builtin"), False), (ref("pydantic.types:ImportString", "class"), False),
    (ref("shop.tasks:send"), True), (ref("shop.tasks:Order", "method", "ship"), True), (ref("shop:Order", "class"), True),
]  # fmt: skip


@pytest.mark.parametrize(("named", "module_too"), REMEDIES, ids=lambda value: str(value))
def test_a_refusal_offers_only_the_patterns_that_would_help(named, module_too):
    with pytest.raises(PolicyViolation) as caught:
        Policy().check(named)
    assert f"add '{named}'" in str(caught.value)
    assert ("or its module" in str(caught.value)) == module_too
    if module_too:
        assert Policy(named.module).check(named) is named


def test_the_module_of_an_inherited_member_is_not_offered_for_it_is_admitted_already():
    named = f"{ZOO}:Model.model_validate"
    with pytest.raises(NotDeferrable, match=f"add '{named}' to the policy") as caught:
        Policy(ZOO).callable_ref(zoo.Model.model_validate)
    assert "or its module" not in str(caught.value)
    assert Policy(ZOO, named).callable_ref(zoo.Model.model_validate)


@pytest.mark.parametrize(("cls", "module_too"), [(HTTPStatus, False), (zoo.Plain, True)])
def test_the_refusal_of_a_class_inside_the_arguments_does_so_too(cls, module_too):
    with pytest.raises(NotDeferrable) as caught:
        Policy().class_name(cls)
    assert ("or its module" in str(caught.value)) == module_too


def test_a_module_that_raises_at_its_import_is_named_with_the_type_of_the_error(tmp_path, monkeypatch):
    (tmp_path / "asks_for_a_setting.py").write_text('{}["SAFEDEFER_KEYS"]')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"imported: KeyError: 'SAFEDEFER_KEYS'; correct the pattern or the module"
    ):
        Policy("asks_for_a_setting").load()


@pytest.mark.parametrize("label", [row[0] for row in zoo.ACCEPTED])
def test_a_callable_is_admitted_once_its_refusal_was_followed_to_the_letter(label):
    """The pattern that the message quotes, and what the error has for programs, are enough, with its module and without."""
    obj = {row[0]: row[1] for row in zoo.ACCEPTED}[label]
    name = CallableRef.of(obj)
    for before in ((), (name.module,), (f"{name.module}:{name.qualname}",)):
        if any(is_standard_library(pattern) for pattern in before):
            continue
        try:
            policy = Policy(*before)
            policy.callable_ref(obj)
        except NotDeferrable as error:
            quoted = re.findall(r"'([\w.]+:[\w.]+)'", str(error))
            for pattern in {*quoted, *error.missing}:
                assert admits(Policy(*before, pattern), obj), error
            if "or its module" in str(error):
                assert admits(Policy(*before, name.module), obj), error


def test_the_pattern_of_an_object_of_the_standard_library_is_that_of_its_call():
    """Its class alone would not do: another one defines ``__call__``."""
    obj, named = unittest.TestSuite(), "unittest.suite:TestSuite.__call__"
    with pytest.raises(NotDeferrable, match=f"add '{named}' to the policy") as caught:
        Policy().callable_ref(obj)
    assert caught.value.missing == (named,)
    assert admits(Policy(named), obj)


def test_a_module_that_no_pattern_can_name_is_not_offered(tmp_path, monkeypatch):
    (tmp_path / "zoo_package").mkdir()
    (tmp_path / "zoo_package" / "__init__.py").write_text("def f(): pass")
    monkeypatch.syspath_prepend(tmp_path)
    obj = importlib.import_module("zoo_package.__init__").f
    with pytest.raises(NotDeferrable, match="add 'zoo_package.__init__:f' to the policy"):
        Policy().callable_ref(obj)
    assert admits(Policy("zoo_package.__init__:f"), obj)


@pytest.mark.parametrize("label", ["function", "class", "callable instance", "instance with inherited __call__", "method",
    "inherited method", "inherited method of another module", "class method", "inherited class method of another module",
    "built-in", "built-in method", "built-in class method"])  # fmt: skip
def test_a_call_is_taken_once_all_patterns_of_its_refusal_are_added(label):
    """With the object that it is bound to: one attempt says all of them."""
    obj = {row[0]: row[1] for row in zoo.ACCEPTED}[label]
    args = {"built-in": ["text"], "built-in method": [2], "built-in class method": [["key"]]}.get(label, [])
    with contextlib.closing(make_app(policy=Policy())) as app, pytest.raises(NotDeferrable) as caught:
        app.defer(obj, *args)
    patterns = {*re.findall(r"'([\w.]+:[\w.]+)'", str(caught.value)), *caught.value.missing}
    with contextlib.closing(make_app(policy=Policy(*patterns))) as app:
        app.defer(obj, *args)


def test_an_exact_call_of_objects_admits_these_and_no_other_member():
    policy = Policy(f"{ZOO}:InheritedCalling.__call__")
    assert admits(policy, zoo.InheritedCalling())
    assert not admits(policy, zoo.CallableBase())
    assert not admits(policy, zoo.InheritedCalling)
    assert not admits(Policy(f"{ZOO}:CallableBase.__call__"), zoo.InheritedCalling())
