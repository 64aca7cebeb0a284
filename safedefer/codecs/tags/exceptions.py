"""The tag ``$exception``: class, args, and further attributes.

Built-in exceptions keep attributes in C (``OSError.filename``, ``ImportError.name``). The encoder makes a second
exception from the same ``args`` and carries the attributes that differ, by name. A traceback holds frames of this
process and is not carried: exceptions with one are refused.
"""

# ruff: noqa: ARG001 - handlers have one signature

from __future__ import annotations

import builtins
from collections.abc import Mapping
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, cast

from safedefer.codecs import inspect_safely
from safedefer.codecs.class_layout import Plan, function_names
from safedefer.codecs.decoder import Decoder, array, record, string
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.object_state import attributes, begin, begin_decoded, planned_class, restore, run
from safedefer.codecs.shared import Json, Refusal, VersionSkew, is_member_name, step

#: Built-in exceptions are values that need no policy.
_BUILTIN: Final[dict[str, type[BaseException]]] = {
    f"builtins:{name}": getattr(builtins, name)
    for name in [
        "BaseException",
        "Exception",
        "ArithmeticError",
        "AssertionError",
        "AttributeError",
        "BaseExceptionGroup",
        "BlockingIOError",
        "BrokenPipeError",
        "BufferError",
        "ChildProcessError",
        "ConnectionAbortedError",
        "ConnectionError",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "EOFError",
        "ExceptionGroup",
        "FileExistsError",
        "FileNotFoundError",
        "FloatingPointError",
        "GeneratorExit",
        "ImportError",
        "IndentationError",
        "IndexError",
        "InterruptedError",
        "IsADirectoryError",
        "KeyError",
        "KeyboardInterrupt",
        "LookupError",
        "MemoryError",
        "ModuleNotFoundError",
        "NameError",
        "NotADirectoryError",
        "NotImplementedError",
        "OSError",
        "OverflowError",
        "PermissionError",
        "ProcessLookupError",
        "RecursionError",
        "ReferenceError",
        "RuntimeError",
        "StopAsyncIteration",
        "StopIteration",
        "SyntaxError",
        "SystemError",
        "SystemExit",
        "TabError",
        "TimeoutError",
        "TypeError",
        "UnboundLocalError",
        "UnicodeDecodeError",
        "UnicodeEncodeError",
        "UnicodeError",
        "UnicodeTranslateError",
        "ValueError",
        "ZeroDivisionError",
        "Warning",
        "BytesWarning",
        "DeprecationWarning",
        "EncodingWarning",
        "FutureWarning",
        "ImportWarning",
        "PendingDeprecationWarning",
        "ResourceWarning",
        "RuntimeWarning",
        "SyntaxWarning",
        "UnicodeWarning",
        "UserWarning",
    ]
}
_NAMES: Final = {id(cls): name for name, cls in _BUILTIN.items()}

# In this order: to set the cause sets the suppression too.
_CHAIN: Final = ("__cause__", "__context__", "__suppress_context__")
_SKIPPED: Final = frozenset({"args", "__traceback__", "__dict__", "__weakref__", *_CHAIN})
_ARGS: Final[Any] = BaseException.__dict__["args"]
_TRACEBACK: Final[Any] = BaseException.__dict__["__traceback__"]
_NAME_FROM: Final = "name_from"
_ATOMS: Final = (str, int, bool, type(None))


def encode_exception(enc: Encoder, value: Any, depth: int, plan: Plan) -> Json:
    """Encode an exception of an admitted class."""
    name = _NAMES.get(id(plan.cls)) or enc.name(plan.cls)
    ref = enc.enter(value)
    if ref is not None:
        return ref
    if _TRACEBACK.__get__(value) is not None:
        raise Refusal(
            "the exception was raised, and a traceback does not travel; "
            "pass a new one of the same arguments, or error.with_traceback(None)",
            instead=_without_traceback(value, plan),
        )
    enc.opaque.add(id(value))
    args = _ARGS.__get__(value)
    try:
        trees = enc.sequence(args, depth + 1)
    except Refusal as refusal:
        refusal.trail.append(".args")
        raise
    enc.opaque.discard(id(value))
    begin(enc, value, plan)
    check_offsets(value)
    # To make a second one takes the args apart, whose classes were refused where the tree is thrown away.
    state = _kept(value, plan) if enc.looks_only else dict(_held(value, plan, args))
    for key, each in attributes(enc, value, plan):
        if type(key) is str and (key in state or key in _members(plan.base) or key in _SKIPPED):
            raise Refusal(f"its __dict__ hides its own attribute {key}; remove it")
        if not is_member_name(key):
            raise Refusal("an attribute begins with '$', is no plain text or not exactly a str; rename it")
        state[key] = each
    _check_imports(plan, state)
    tree = {"$exception": [name, trees, enc.attributes(state.items(), depth + 1)]}
    enc.open.discard(id(value))
    return tree


def _without_traceback(value: BaseException, plan: Plan) -> dict[str, object]:
    """Return what such an exception has of its own, but for what its base keeps in C."""
    own = {} if plan.state_of is None else plan.state_of(value)
    named = {} if id(plan.cls) in _NAMES else {".__class__": plan.cls}
    chain = {f".{name}": BaseException.__dict__[name].__get__(value) for name in _CHAIN[:2]}
    return {**named, ".args": _ARGS.__get__(value), **chain, ".__dict__": own}


def _held(value: BaseException, plan: Plan, args: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Return the attributes that the base keeps in C and does not make from ``args``."""
    try:
        twin = _fresh(plan, args)
    except Refusal:
        raise Refusal("its args are not those that its class takes; pass a new one") from None
    out: list[tuple[str, Any]] = []
    for name, descriptor in _members(plan.base).items():
        held, given = _read(descriptor, value), _read(descriptor, twin)
        if _same(held, given):
            continue
        try:
            descriptor.__set__(twin, held)
            carried = held is not inspect_safely.MISSING and _same(_read(descriptor, twin), held)
        except (TypeError, AttributeError, ValueError):
            carried = False
        if not carried:
            raise Refusal(f"its attribute {name} is not what its args say, and cannot be set; pass a new one")
        out.append((name, held))
    return [*out, *_chain(value)]


def _kept(value: BaseException, plan: Plan) -> dict[str, Any]:
    """Return all attributes that the base keeps in C, whether ``args`` say them or not."""
    kept = {name: _read(descriptor, value) for name, descriptor in _members(plan.base).items()}
    return {name: held for name, held in kept.items() if held is not inspect_safely.MISSING} | dict(_chain(value))


def _chain(value: BaseException) -> list[tuple[str, Any]]:
    chain = ((name, _read(BaseException.__dict__[name], value)) for name in _CHAIN)
    return [(name, held) for name, held in chain if held is not None and held is not False]


def _fresh(plan: Plan, args: tuple[Any, ...]) -> BaseException:
    """Make an exception from its args by the built-in base alone. No ``__new__`` or ``__init__`` of a user's class runs."""
    base: Any = plan.base
    made = run(base.__new__, plan.cls, *args)
    if type(made) is not plan.cls:
        raise VersionSkew("the arguments make an exception of another type")
    run(base.__init__, made, *args)
    if len(kept := _ARGS.__get__(made)) != len(args) or any(a is not b for a, b in zip(kept, args, strict=True)):
        _ARGS.__set__(made, args)  # OSError keeps two of its arguments
    return cast("BaseException", made)


def _members(base: type) -> dict[str, Any]:
    """Return the descriptors of the attributes that a built-in exception keeps in C, by name."""
    return {
        name: each
        for cls in reversed(inspect_safely.mro(base))
        for name, each in inspect_safely.namespace(cls).items()
        if type(each) in (MemberDescriptorType, GetSetDescriptorType) and name not in _SKIPPED and cls is not object
    }


def _read(descriptor: Any, value: object) -> Any:
    try:
        return descriptor.__get__(value)
    except (AttributeError, TypeError):  # TypeError: a UnicodeError whose attributes were never set
        return inspect_safely.MISSING


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and any(type(a) is atom for atom in _ATOMS) and a == b


def decode_exception(dec: Decoder, payload: Json, depth: int) -> object:
    """Decode an exception."""
    name, trees, tree = array(payload, least=3, most=3)
    plan = _builtin_plan(dec, string(name)) or planned_class(dec, name, "$exception")
    number = dec.reserve()
    try:
        args = tuple(dec.items(trees, depth + 1))
    except Refusal as refusal:
        refusal.trail.append(".args")
        raise
    value = _fresh(plan, args)
    dec.settle(number, value)
    begin_decoded(dec, number, plan)
    state = dict(record(tree))
    _check_imports(plan, state)
    members = _members(plan.base)
    for key in [key for key in state if key in members or key in _CHAIN]:
        descriptor = members.get(key) or BaseException.__dict__[key]
        _set(dec, value, key, descriptor, state.pop(key), depth + 1)
    check_offsets(value)
    if not state.keys().isdisjoint(_SKIPPED):
        raise VersionSkew("an exception has no such attribute to set")
    restore(dec, value, plan, state, depth + 1)
    dec.open.discard(number)
    return value


def _check_imports(plan: Plan, state: Mapping[str, object]) -> None:
    # To suggest a spelling, traceback imports the module that an ImportError with a name_from names: whoever logs the
    # exception would import what a holder of a key wrote. Python 3.12 and later; refused everywhere, to be refused alike.
    if issubclass(plan.base, ImportError) and state.get(_NAME_FROM) is not None:
        raise Refusal(f"its {_NAME_FROM} makes a traceback import the module that its name says; set it to None")


def imports_when_shown(value: object) -> bool:
    """Whether ``traceback`` would import a module by its name to show this exception."""
    descriptor = ImportError.__dict__.get(_NAME_FROM)  # None before Python 3.12
    if descriptor is None or not inspect_safely.derives(type(value), ImportError):
        return False
    return descriptor.__get__(value) is not None


def check_offsets(value: BaseException) -> None:
    """Refuse a ``UnicodeError`` whose offsets lie outside its object: ``str()`` of it would read or write there.

    Raises:
        Refusal: They do, or an attribute was never set.
    """
    for cls in (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError):
        if inspect_safely.derives(type(value), cls):
            within, start, end = (_read(cls.__dict__[name], value) for name in ("object", "start", "end"))
            if type(within) not in (bytes, str) or not 0 <= start <= end <= len(within):
                raise Refusal("its start and end lie outside its object; pass an error of the text at hand")


def _set(dec: Decoder, value: object, key: str, descriptor: Any, tree: Json, depth: int) -> None:
    try:
        held = dec.value(tree, depth)
        try:
            descriptor.__set__(value, held)
        except (TypeError, AttributeError, ValueError, OverflowError):
            raise VersionSkew("the exception does not take this") from None
    except Refusal as refusal:
        refusal.trail.append(step(key))
        raise


def _builtin_plan(dec: Decoder, name: str) -> Plan | None:
    cls = _BUILTIN.get(name)
    return None if cls is None else _plan_of(cls)


def _plan_of(cls: type) -> Plan:
    """Return the plan of a built-in exception."""
    plan = _PLANS.get(id(cls))
    if plan is None:
        getter = inspect_safely.dict_getter(cls)
        plan = _PLANS[id(cls)] = Plan(cls, "$exception", cls, getter, functions=function_names(cls))
    return plan


_PLANS: Final[dict[int, Plan]] = {}


def _encode_builtin(enc: Encoder, value: BaseException, depth: int) -> Json:
    return encode_exception(enc, value, depth, _plan_of(type(value)))


#: Built-in exceptions, which need no policy.
BUILTIN_EXCEPTIONS: Final = tuple(_BUILTIN.values())

ENCODERS: Final[dict[type, Any]] = dict.fromkeys(_BUILTIN.values(), _encode_builtin)
