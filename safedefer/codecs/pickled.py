"""The pickle codec: an opt-in for arguments that the typed codec refuses. No other module uses pickle.

Unpickling runs the code that the pickle names. So the app must allow pickles, the signing key must be allowed to sign
them, and the call must ask for one. Even then the codec does not trust the pickle:

1. it scans the opcodes first: only those that Python 3.11's own pickler writes, and no bytes after the end;
2. it finds names only by the policy, exactly, and in a fixed table of harmless standard types;
3. it calls only classes while unpickling, with no argument that asks for memory of any size, and changes no class,
   module or function. What it calls to restore an object is of the object's class, never an attribute of the object.

``by_value_runs_code`` lifts 2 and 3: functions may then travel by value, so a holder of a key that may sign pickles
can run any code in the handler.

On the wire all values are in one pickle, so that sharing holds: ``args`` is
``[base64 of the pickle, "3.11", cloudpickle's version]``, ``kwargs`` is ``{}``, and ``bound``, if the
call has one, is ``{"$pickle": 0}``. The pickle is of ``((bound,) or (), args, kwargs)``.

Over 450 lines, since what is written, scanned and read is one rule of what a pickle may do.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import sys
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Final, cast
from uuid import UUID, SafeUUID
from zoneinfo import ZoneInfo

import cloudpickle  # type: ignore[import-untyped]

from safedefer.codecs.decoder import check_callee
from safedefer.codecs.inspect_safely import derives, dict_getter, lookup
from safedefer.codecs.shared import CallData, Refusal, Values
from safedefer.codecs.tags.exceptions import BUILTIN_EXCEPTIONS, check_offsets, imports_when_shown
from safedefer.codecs.zones import has_zone, is_key
from safedefer.errors import InvalidArguments, RejectedTask, UnencodableArgument, UnresolvableCallable
from safedefer.gadgets import HARMLESS_TYPES
from safedefer.options import Limits
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, reference

_PROTOCOL: Final = 5
_PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
_BOUND: Final = {"$pickle": 0}

# Classes that pickles of the standard library name or call, and that no argument makes harmful.
_HARMLESS: Final[dict[tuple[str, str], Any]] = {
    ("builtins", "Ellipsis"): ...,
    ("builtins", "object"): object,
    **{
        (cls.__module__, cls.__qualname__): cls
        for cls in (
            *(Counter, OrderedDict, defaultdict, deque),
            *(date, datetime, time, timedelta, timezone),
            *(Decimal, Fraction, UUID, SafeUUID, ZoneInfo),
            *(PosixPath, PurePosixPath, PureWindowsPath, WindowsPath),
            *(IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network),
            *HARMLESS_TYPES,
            *BUILTIN_EXCEPTIONS,
        )
        if cls is not type(None)
    },
}

# The only built-in types that pickles call; others would make an object of any size.
_CALLED: Final = (complex, range, slice)

# Every opcode that protocol 5 writes without out-of-band buffers, extensions and persistent ids.
_OPCODES: Final = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
        *("STACK_GLOBAL", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"),
    ]
)
# One opcode for the value, one for its memo, and those that end containers.
_OPCODES_PER_ITEM: Final = 4
# These opcodes put their operands into the object below them.
_FILLING: Final = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")


# A few bytes of a token make one, and to iterate it fills the memory.
_BOUNDLESS: Final = frozenset(map(id, (range, IPv4Network, IPv6Network)))


class PickledCodec:
    """Carries values as a pickle whose names go through the policy.

    Args:
        limits: ``token_bytes`` bounds the pickle, ``items`` its opcodes, ``depth`` its nesting.
        by_value_runs_code: Whether functions may travel by value. A holder of a key that may sign pickles can then run
            any code.
    """

    content_type: Final = "pickle"

    def __init__(self, *, limits: Limits = Limits(), by_value_runs_code: bool = False) -> None:  # noqa: B008 - frozen
        self._limits = limits
        self._by_value = by_value_runs_code

    def encode(self, call: Values, gate: Gate) -> Values:
        """Return the call as one pickle.

        Raises:
            UnencodableArgument: A value cannot be pickled, or the gate does not admit a class or function.
        """
        owner, positional, named = call
        bound = () if owner is UNBOUND else (owner,)
        out = io.BytesIO()
        pickler = _ByValue(out, _PROTOCOL) if self._by_value else _ByReference(out, gate)
        try:
            pickler.dump((bound, tuple(positional), dict(named)))
            data = out.getvalue()
            _scan(data, self._limits)
        except _Refused as error:
            raise UnencodableArgument(f"$: {error}; pass an id, or less at once") from error
        except Exception as error:
            raise UnencodableArgument(f"$ cannot be pickled: {error}; pass an id, or register the type") from error
        text = b2a_base64(data, newline=False).decode("ascii")
        return CallData(UNBOUND if not bound else dict(_BOUND), [text, _PYTHON, cloudpickle.__version__], {})

    def write(self, call: Values, gate: Gate) -> Values:
        """As ``encode``; the ``Codec`` protocol has both."""
        return self.encode(call, gate)

    def decode(self, call: Values, gate: Gate, text: bytes, canonical: bool = False) -> Values:  # noqa: ARG002, FBT002 - as above
        """Return the values of a pickle.

        Raises:
            InvalidArguments: It is malformed, over a limit, or does something that is forbidden here.
            UnresolvableCallable: Another version of Python or cloudpickle wrote it.
            RejectedTask: The gate does not admit or find a class or function that it names.
        """
        data = self._open(call)
        try:
            _scan(data, self._limits)
            # By value, the pickle may run code: the operator has set two switches for that.
            reader = pickle.Unpickler(io.BytesIO(data)) if self._by_value else _Reader(data, gate)  # noqa: S301
            values = reader.load()
        except RejectedTask:
            raise
        except _Refused as error:
            raise InvalidArguments(f"$: {error}; do not sign pickles that are not of this library") from error
        except Exception as error:
            raise InvalidArguments(
                "$: the pickle cannot be loaded; deploy the code that the task was made for", skew=True
            ) from error
        if type(values) is not tuple or list(map(type, values)) != [tuple, tuple, dict]:
            raise InvalidArguments("$: the pickle holds no call; do not sign pickles that are not of this library")
        bound, args, kwargs = values
        if len(bound) != (call[0] is not UNBOUND) or not all(type(name) is str for name in kwargs):
            raise InvalidArguments("$: the pickle holds another call; do not sign pickles that are not of this library")
        return CallData(bound[0] if bound else UNBOUND, args, kwargs)

    def _open(self, call: Values) -> bytes:
        bound, args, kwargs = call
        if len(args) != 3 or not all(type(each) is str for each in args) or kwargs:  # noqa: PLR2004
            raise InvalidArguments("$: pickled arguments are [base64, Python, cloudpickle]; see schema/README.md")
        if bound is not UNBOUND and not (type(bound) is dict and bound == _BOUND and type(bound["$pickle"]) is int):
            raise InvalidArguments(
                '$.bound: beside pickled arguments it is {"$pickle": 0}; see schema/README.md', path="$.bound"
            )
        text, python, cloud = args
        if (python, cloud) != (_PYTHON, cloudpickle.__version__):
            raise UnresolvableCallable(
                f"the arguments were pickled by another Python or cloudpickle than {_PYTHON} and "
                f"{cloudpickle.__version__}; run both ends on the same versions"
            )
        try:
            data = a2b_base64(text, strict_mode=True)
        except (Base64Error, ValueError):
            raise InvalidArguments("$: the pickle is not canonical base64; see schema/README.md") from None
        if b2a_base64(data, newline=False).decode("ascii") != text:
            raise InvalidArguments("$: the pickle is not canonical base64; see schema/README.md")
        return data


class _Refused(Exception):
    """The pickle does something that is forbidden."""


# --- Writing --------------------------------------------------------------------------------------


class _ByReference(cloudpickle.Pickler):  # type: ignore[misc, name-defined, unused-ignore]
    """Writes functions and classes by name only, and only those that the gate admits."""

    def __init__(self, file: io.BytesIO, gate: Gate) -> None:
        super().__init__(file, _PROTOCOL)
        self._gate = gate

    def reducer_override(self, obj: object) -> Any:
        """Ask the gate about every function and class, including those that reducers return."""
        kind = type(obj)
        if imports_when_shown(obj):
            raise _Refused(
                "an ImportError with a name_from makes a traceback import what its name says; set it to None"
            )
        _check_error(obj)
        if any(obj is known for known in _HARMLESS.values()):
            return NotImplemented
        if kind is ZoneInfo:
            # Its own reducer asks for getattr(ZoneInfo, "_unpickle").
            zone = cast("ZoneInfo", obj)
            return (ZoneInfo, (zone.key,)) if ZoneInfo(zone.key) is zone else NotImplemented
        if derives(kind, type):
            self._gate.class_name(cast("type", obj))
            self._gate.callable_ref(obj)
        elif kind is FunctionType or kind is BuiltinFunctionType:
            self._gate.callable_ref(obj)
        return NotImplemented


class _ByValue(cloudpickle.Pickler):  # type: ignore[misc, name-defined, unused-ignore]
    """Writes functions and classes without an importable name by value, with their code."""


# --- Reading --------------------------------------------------------------------------------------


def _scan(data: bytes, limits: Limits) -> None:
    """Read the opcodes without running them.

    Raises:
        _Refused: An opcode is not one of this library's pickles, there are too many, they nest too deep, or
            bytes follow the last.
    """
    if len(data) > limits.token_bytes:
        raise _Refused(f"the pickle is longer than {limits.token_bytes} bytes")
    count = end = 0
    stack, marks, memo = [0], [0], 0
    try:
        for op, arg, position in pickletools.genops(data):
            count += 1
            end = cast("int", position) + 1
            if op.name not in _OPCODES:
                raise _Refused(f"the pickle uses the opcode {op.name}")
            if count > limits.items * _OPCODES_PER_ITEM:
                raise _Refused(f"the pickle holds more than {limits.items} values")
            memo += op.name == "MEMOIZE"
            if op.name in {"BINGET", "LONG_BINGET"} and cast("int", arg) >= memo:
                raise _Refused("the pickle reads a memo entry that it never wrote")
            _step(op, stack, marks)
            if stack[-1] > limits.depth:
                raise _Refused(f"the pickle nests deeper than {limits.depth}")
    except (ValueError, IndexError) as error:
        raise _Refused("the pickle is cut short or malformed") from error
    if end != len(data):
        raise _Refused("bytes follow the pickle's end")


def _step(op: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> None:
    """Apply an opcode to a stack of depths. Raises ``IndexError`` if it reads below the bottom."""
    name = op.name
    if name == "MARK":
        marks.append(len(stack))
        return
    needs = len(op.stack_before)
    if pickletools.markobject in op.stack_before:
        start = marks.pop() if len(marks) > 1 else 0
        if start == 0:
            raise IndexError(name)
        below = op.stack_before.index(pickletools.markobject)
        taken = stack[start:]
        base = stack[start - below] if below else 0
        del stack[start - below :]
    else:
        if needs > len(stack) - marks[-1]:
            raise IndexError(name)
        taken = stack[len(stack) - needs + (name in _FILLING) :] if needs else []
        base = stack[len(stack) - needs] if needs and name in _FILLING else 0
        if needs:
            del stack[len(stack) - needs :]
    inner = 1 + max(taken, default=0)
    stack.extend(max(base, inner) if name in _FILLING else inner for _ in op.stack_after)


def _check_error(value: object) -> None:
    """Refuse a ``UnicodeError`` whose text would be read from outside its object."""
    if derives(type(value), UnicodeError):
        try:
            check_offsets(cast("UnicodeError", value))
        except Refusal as refusal:
            raise _Refused(refusal.why) from None


def _check_method(target: object, *names: str) -> None:
    """Refuse an object of which an attribute would be called that a pickle may have set: in its ``__dict__``, or a slot."""
    kind = type(target)
    getter = dict_getter(kind)
    own = getter(target) if getter is not None else ()
    for name in names:
        if name in own or ((found := lookup(kind, name)) is not None and type(found[1]) is MemberDescriptorType):
            raise _Refused(f"the pickle has the {name} of an object called, which is no method of its class")


def _check_state(target: object, state: Any) -> None:
    """Refuse a state that is more than names and values, unless the class restores it by a method of its own.

    Raises:
        _Refused: It is, names the class of the object, or holds arguments of an exception that may be of any size.
    """
    found = lookup(type(target), "__setstate__")
    if found is not None and found[0] is not BaseException:
        return
    own, slots = state if type(state) is tuple and len(state) == 2 else (state, None)  # noqa: PLR2004
    for part in (own, slots):
        if part is None:
            continue
        if type(part) is not dict or "__class__" in part:
            raise _Refused("the pickle gives an object a state that is not a dict of its attributes")
        if found is not None and type(part.get("args", ())) is not tuple:
            raise _Refused("the pickle gives an exception arguments that are not a tuple")


# The unpickler in Python of the standard library: the one in C has no hook before it calls or changes an object.
_Unpickler: Final[Any] = pickle._Unpickler  # type: ignore[attr-defined, unused-ignore] # noqa: SLF001


class _Reader(_Unpickler):  # type: ignore[misc]
    """Unpickles names that the policy admits, with a check before each opcode that calls or changes an object."""

    dispatch: Final[dict[int, Any]] = dict(_Unpickler.dispatch)

    def __init__(self, data: bytes, gate: Gate) -> None:
        super().__init__(io.BytesIO(data))
        self._gate = gate
        # The classes that were named, by id; the memo and their modules keep them alive.
        self._callees: dict[int, object] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the object of exactly this name.

        Raises:
            RejectedTask: The policy does not admit the name, or no object has it.
        """
        found = _HARMLESS.get((module, name))
        if found is None:
            found = self._find(module, name)
        if derives(type(found), type) and (found not in HARMLESS_TYPES or found in _CALLED):
            self._callees[id(found)] = found
        return found

    def _find(self, module: str, name: str) -> object:
        if (
            type(module) is not str
            or type(name) is not str
            or _MODULE.fullmatch(module) is None
            or _NAME.fullmatch(name) is None
        ):
            raise _Refused("the pickle names something that is not at the top level of a module")
        try:
            self._gate.load_class(f"{module}:{name}")
        except UnresolvableCallable:
            return self._gate.load_callable(reference("function", module, name, None))
        # The pickle may call a class: the gate judges it like the callable of the task.
        return self._gate.load_callable(reference("class", module, name, None))

    def _check_call(self, func: object, args: object) -> None:
        if id(func) not in self._callees or type(args) is not tuple:
            raise _Refused("the pickle calls what is neither a class nor known to be harmless")
        kinds = set(map(id, map(type, args)))
        sized = derives(cast("type", func), bytes) or derives(cast("type", func), bytearray)
        # bytes(10**12), tuple(range(10**12)) and Fraction("1e999999999") take no room in a token, and all in the process.
        if (
            not kinds.isdisjoint(_BOUNDLESS)
            or (sized and id(int) in kinds)
            or (func is Fraction and kinds != {id(int)})
        ):
            raise _Refused("the pickle makes an object from a number or range that may be of any size")
        if func is ZoneInfo and not (len(args) == 1 and type(args[0]) is str and is_key(args[0]) and has_zone(args[0])):
            raise _Refused("the time zone is not in this machine's database")
        if (
            func is defaultdict
            and args
            and args[0] is not None
            and not (type(args[0]) is type and args[0] in HARMLESS_TYPES)
        ):
            check_callee(self._gate, args[0])

    def _check_target(self, target: object) -> None:
        kind = type(target)
        if derives(kind, type) or derives(kind, ModuleType) or kind in (FunctionType, BuiltinFunctionType, MethodType):
            raise _Refused("the pickle changes a class, a module or a function")
        if derives(kind, Enum):
            raise _Refused("the pickle changes a member of an enum, which the whole process shares")

    def load_reduce(self) -> None:
        """REDUCE: call with arguments."""
        self._check_call(*self.stack[-2:])
        super().load_reduce()
        _check_error(self.stack[-1])

    def load_newobj(self) -> None:
        """NEWOBJ: ``cls.__new__(cls, *args)``."""
        self._check_call(*self.stack[-2:])
        super().load_newobj()
        _check_error(self.stack[-1])

    def load_newobj_ex(self) -> None:
        """NEWOBJ_EX: ``cls.__new__(cls, *args, **kwargs)``."""
        self._check_call(*self.stack[-3:-1])
        super().load_newobj_ex()
        _check_error(self.stack[-1])

    def load_build(self) -> None:
        """BUILD: set the state of an object."""
        target, state = self.stack[-2:]
        self._check_target(target)
        _check_method(target, "__setstate__")
        _check_state(target, state)
        super().load_build()
        _check_error(target)
        if imports_when_shown(self.stack[-1]):
            raise _Refused("an ImportError with a name_from makes a traceback import what its name says")

    def load_append(self) -> None:
        """APPEND: to a list, or an object that is like one."""
        self._check_target(self.stack[-2])
        _check_method(self.stack[-2], "append")
        super().load_append()

    def load_appends(self) -> None:
        """APPENDS: to a list, or an object that is like one."""
        self._check_target(self.metastack[-1][-1])
        _check_method(self.metastack[-1][-1], "extend", "append")
        super().load_appends()

    def load_setitem(self) -> None:
        """SETITEM: of a dict, or an object that is like one."""
        self._check_target(self.stack[-3])
        super().load_setitem()

    def load_setitems(self) -> None:
        """SETITEMS: of a dict, or an object that is like one."""
        self._check_target(self.metastack[-1][-1])
        super().load_setitems()

    def load_additems(self) -> None:
        """ADDITEMS: to a set, or an object that is like one."""
        self._check_target(self.metastack[-1][-1])
        _check_method(self.metastack[-1][-1], "add")
        super().load_additems()


_OVERRIDES: Final[dict[bytes, Callable[[_Reader], None]]] = {
    pickle.REDUCE: _Reader.load_reduce,
    pickle.NEWOBJ: _Reader.load_newobj,
    pickle.NEWOBJ_EX: _Reader.load_newobj_ex,
    pickle.BUILD: _Reader.load_build,
    pickle.APPEND: _Reader.load_append,
    pickle.APPENDS: _Reader.load_appends,
    pickle.SETITEM: _Reader.load_setitem,
    pickle.SETITEMS: _Reader.load_setitems,
    pickle.ADDITEMS: _Reader.load_additems,
}
_Reader.dispatch.update({code[0]: load for code, load in _OVERRIDES.items()})
