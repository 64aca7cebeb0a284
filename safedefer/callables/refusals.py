"""Sentences of ``refs`` and ``policy``: the reason, the problem and the remedy of each refusal of a callable or class.

Decides nothing about trust: every function is called when the refusal is certain, and returns the error to raise. The slug
of a reason is stable.
"""

from __future__ import annotations

import sys
from functools import partial, singledispatchmethod
from types import MethodWrapperType
from typing import Final

from safedefer.errors import NotDeferrable, PolicyViolation
from safedefer.gadgets import is_gadget, is_standard_library


def _error(reason: str, problem: str, remedy: str) -> NotDeferrable:
    return NotDeferrable(f"{problem}; {remedy}", reason=reason)


# --- Classes --------------------------------------------------------------------------------------


def local_class(qualname: str) -> NotDeferrable:
    """Refuse a class defined inside a function."""
    return _error("nested-class", f"{qualname} is defined inside a function", "move it to the top level of a module")


def nested_class(qualname: str) -> NotDeferrable:
    """Refuse a class defined inside a class, as what a task calls."""
    return _error("nested-class", f"{qualname} is a nested class", "move it to the top level of a module")


def metaclass(qualname: str, name: str, hook: str) -> NotDeferrable:
    """Refuse a class whose metaclass ``name`` defines ``hook``."""
    remedy = f"name it in Policy(metaclasses=['{name}']) or SAFEDEFER_METACLASSES={name} if that is safe"
    problem = f"{qualname} has the metaclass {name}, which defines {hook}"
    return _error("metaclass", problem, f"{remedy}, or defer a function")


def makes_class(qualname: str) -> NotDeferrable:
    """Refuse a metaclass or the functional API of an enum."""
    return _error("unsupported", f"to call {qualname} makes a class", "defer a function that makes it")


# --- Functions ------------------------------------------------------------------------------------


def nested_function() -> NotDeferrable:
    """Refuse a function defined inside another."""
    return _error(
        "nested-function", "a nested function cannot be found by name", "move it to the top level of a module"
    )


def special_function(qualname: str) -> NotDeferrable:
    """Refuse a function of a module that Python calls itself."""
    problem = f"{qualname} is a special function, which Python calls itself"
    return _error("dunder", problem, "give it another name")


def lambda_function() -> NotDeferrable:
    """Refuse a lambda."""
    return _error("lambda", "a lambda cannot be found by name", "write it as a function at the top level of a module")


def generator() -> NotDeferrable:
    """Refuse a generator function."""
    return _error("generator", "calling a generator function runs nothing", "defer a function that exhausts it")


def unbound_method(qualname: str, kind: type | None) -> NotDeferrable:
    """Refuse a function with a class in its name; ``kind`` is the type of what the class has under it, if it has."""
    if kind is staticmethod:
        problem = f"{qualname} is a static method"
        return _error("static-method", problem, "make it a function at the top level of a module")
    what = "a singledispatchmethod" if kind is singledispatchmethod else "a method without its object"
    return _error("unbound-method", f"{qualname} is {what}", "defer a plain method of an object: obj.method")


# --- Methods and members --------------------------------------------------------------------------


def wrapped_method() -> NotDeferrable:
    """Refuse a bound method of something else than a Python function."""
    problem = "the method wraps something that is not a Python function"
    return _error("unsupported", problem, "defer a plain method")


def overridden_classmethod(qualname: str, member: str) -> NotDeferrable:
    """Refuse a class method that is not the one that its class has by its name."""
    remedy = "defer the class method through the class that it is bound to, not through super() or a metaclass"
    return _error("overridden", f"{qualname}.{member} is not this class method", remedy)


def other_member(qualname: str, member: str, raw: object) -> NotDeferrable:
    """Refuse a method whose class has ``raw`` under its name."""
    if type(raw) is staticmethod:
        problem = f"{qualname}.{member} is a static method"
        return _error("static-method", problem, "make it a function at the top level")
    problem = f"{qualname}.{member} is something else than this method"
    return _error("overridden", problem, "defer the method through the object's own class, not through super()")


def missing_member(qualname: str, member: str) -> NotDeferrable:
    """Refuse a method whose class has nothing under its name."""
    problem = f"{qualname} has no member of the method's own name, {member}"
    remedy = "define the method in the class under its own name (decorators need functools.wraps)"
    return _error("not-found", problem, remedy)


def special_method(member: str) -> NotDeferrable:
    """Refuse a method that Python calls itself."""
    return _error("dunder", f"{member} is a special method", "defer the object itself, or a function")


def mangled_member(member: str) -> NotDeferrable:
    """Refuse a member whose name is mangled or not ASCII."""
    problem = f"{member!a} is name-mangled or not ASCII"
    return _error("name", problem, "give the method one leading underscore at most")


def long_member(most: int) -> NotDeferrable:
    """Refuse a member whose name is over ``most`` characters."""
    return _error("name", f"a name is over {most} characters", "give the method a shorter name")


def foreign_member(member: str, module: str, qualname: str) -> NotDeferrable:
    """Refuse a function that hangs on a class and says the name of another place."""
    problem = f"{member} is {qualname!a} of {module!a}, hung on a class"
    return _error("foreign-member", problem, "defer that function, or define the method in the class")


# --- Built-ins and objects ------------------------------------------------------------------------


def missing_builtin(name: str, qualname: str) -> NotDeferrable:
    """Refuse a built-in function that no module has under its name."""
    if "." in qualname:  # such as str.maketrans
        problem = f"the built-in {name} is a static method"
        return _error("static-method", problem, "defer a function that calls it")
    return _error("not-found", f"the built-in {name} is not found by its name", "defer a function that calls it")


def bound_task() -> NotDeferrable:
    """Refuse a Celery task whose function takes the task."""
    problem = "the function of this Celery task takes the task (bind=True, or run of a class), which no worker of safedefer has"
    remedy = "write it as a function of a module without self; ask safedefer.current_task() for what self said"
    return _error("unsupported", problem, remedy)


def not_callable(cls: type, qualname: str, *, has_call: bool) -> NotDeferrable:
    """Refuse an object of a class without a ``__call__`` written in Python; ``has_call`` tells whether it has another."""
    if cls is partial:
        problem = "functools.partial objects are not carried"
        return _error("partial", problem, "pass the arguments to defer() instead")
    if cls is staticmethod or cls is classmethod:
        problem = f"a raw {qualname} object cannot be called by name"
        return _error("descriptor", problem, "defer it through its class")
    if cls is MethodWrapperType:
        return _error("dunder", "special methods are not carried", "defer a function that uses the operator")
    if not has_call:
        problem = f"an object of {qualname} is not callable"
        return _error("not-callable", problem, "pass a function and its arguments")
    problem = f"an object of {qualname} is callable, but not through a __call__ written in Python"
    return _error("unsupported", problem, "defer a function at the top level of a module")


# --- Names ----------------------------------------------------------------------------------------


def not_ascii(module: str, qualname: str) -> NotDeferrable:
    """Refuse a name that is not dotted ASCII."""
    problem = f"{qualname!a} in {module!a} is not an ASCII name"
    return _error("name", problem, "give both ASCII names (class IntPage(Page[int])); a mock has none")


def long_name(most: int) -> NotDeferrable:
    """Refuse a module or object whose name is over ``most`` characters."""
    return _error("name", f"a name is over {most} characters", "give module and object shorter names")


def main_module(module: str, qualname: str) -> NotDeferrable:
    """Refuse what lives in a module that is another file in every process."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = getattr(spec, "name", None)
    home = f", such as a new module beside {name}" if name else ", such as tasks.py, and import it from there"
    problem = f"{qualname} lives in {module}, and the process that runs the task has another {module}"
    return _error("main-module", problem, f"move it to a module that can be imported{home}")


def found_otherwise(module: str, qualname: str) -> NotDeferrable:
    """Refuse what its own name does not lead to."""
    problem = f"looking up {module}:{qualname} gives something else"
    remedy = "defer the object where it is defined; for a mock, what it stands for; for what a decorator left, call register_wrapper"
    return _error("not-found", problem, remedy)


# --- Policy ---------------------------------------------------------------------------------------


def not_admitted(ref: str, why: str) -> PolicyViolation:
    """Refuse a reference that the policy does not admit."""
    return PolicyViolation(f"{ref} may not run: {why}; {_remedy(ref, why)} if it should")


def class_not_admitted(name: str) -> NotDeferrable:
    """Refuse a class of an argument that the policy does not admit."""
    return NotDeferrable(f"the class {name} is not admitted; {_remedy(name)}", reason="policy", missing=(name,))


def foreign_construction(ref: str, name: str) -> PolicyViolation:
    """Refuse to call a class whose construction is that of the class ``name``."""
    return PolicyViolation(
        f"{ref} may not run: its construction is that of {name}, which is not admitted; "
        f"add '{name}.__init__' or '{ref}' to the policy if that may run on the arguments of a task"
    )


def builtin_method(ref: str, name: str) -> PolicyViolation:
    """Refuse a built-in method that no exact pattern names."""
    return PolicyViolation(
        f"{ref} may not run: it is a built-in method, which needs an exact pattern; "
        f"add '{name}' to the policy if it may run on the arguments of a task"
    )


#: Why a name is refused that an added pattern would admit.
NO_PATTERN: Final = "no pattern admits it"


def _remedy(name: str, why: str = "") -> str:
    """Say which patterns would help: none of a module admits built-ins, the standard library or a gadget."""
    module, _, qualname = name.partition(":")
    exact = "exact" in why or is_standard_library(module) or is_gadget(module, qualname)
    return f"add '{name}'{'' if exact else ' or its module'} to the policy"
