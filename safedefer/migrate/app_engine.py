"""A bridge for tasks in flight: App Engine's pickled tasks, read without ``pickle`` under the policy, and deferred anew.

For the days of a move. Whoever can hand it bytes can call what the policy admits, with arguments of their choice, as the holder of a
key can: give it nothing but bodies that come from App Engine's own queue.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from datetime import time as clock_time
from decimal import Decimal
from types import FunctionType, MethodType
from typing import Any, Final, NamedTuple, cast
from uuid import UUID, SafeUUID

from safedefer.app import App
from safedefer.codecs.class_layout import make_plan
from safedefer.codecs.registry import TypeRegistry
from safedefer.errors import ConfigurationError
from safedefer.migrate.opcodes import Interpreter, RawText, refuse
from safedefer.options import Task
from safedefer.policy_cache import Gate
from safedefer.refs import find, find_member, reference

__all__ = ["AppEngineBridge", "PickledCall"]

_MOST_DAYS: Final = 92
_OWNER_AND_MEMBER: Final = 2
_MOST_NODES: Final = 1_000
_MOST_COPIED: Final = 2_000_000
#: Smaller integers have hashes of their own.
_MOST_KEY: Final = 2**61 - 1
_TEXTS: Final = frozenset({str, bytes})
_SIZED: Final = frozenset({str, bytes, bytearray, RawText, list, tuple, set, frozenset, dict, OrderedDict})
_DEFERRED: Final = frozenset({"google.appengine.ext.deferred.deferred", "google.appengine.ext.deferred"})
_RENAMED: Final = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_ATOMS: Final = frozenset({str, bytes, int, float, bool, type(None), date, datetime, clock_time, timedelta, UUID})
_UUID_INT: Final = cast("Any", vars(UUID)["int"])
_UUID_SAFE: Final = cast("Any", vars(UUID)["is_safe"])


class PickledCall(NamedTuple):
    """What a body would call. Not called."""

    callable: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class AppEngineBridge:
    """Reads bodies that App Engine's ``deferred`` wrote, and defers what they call.

    Args:
        app: Its policy, within the limits of its active key, says which functions and classes a body may name. It signs the new task.
        until: Nothing is read from this time on, aware, at most 92 days ahead.
        clock: Seconds since the epoch.

    Raises:
        ConfigurationError: ``until`` is naive, or too far ahead.
    """

    def __init__(self, app: App, *, until: datetime, clock: Callable[[], float] = time.time) -> None:
        if not isinstance(until, datetime) or until.utcoffset() is None:
            raise ConfigurationError(
                "until is a datetime with a time zone; write datetime(2027, 1, 31, tzinfo=timezone.utc)"
            )
        if until.timestamp() > clock() + _MOST_DAYS * 86_400:
            raise ConfigurationError(f"a bridge is for the days of a move: until is at most {_MOST_DAYS} days ahead")
        self._app = app
        self._until = until.timestamp()
        self._clock = clock

    def read(self, body: bytes) -> PickledCall:
        """Return what a body would call; calls nothing, and runs no code of a class.

        Raises:
            ConfigurationError: The time is over.
            InvalidArguments: It is malformed, too large, or has what is not read.
            PolicyViolation: The policy admits no callable or class of that name.
            UnresolvableCallable: It is not here, or is something else.
        """
        if self._clock() >= self._until:
            raise ConfigurationError("the time of this bridge is over; take it out, or make one with a later until")
        self._app.policy.load()
        active = self._app.keyring.active
        gate: Gate = self._app.policy if active.patterns is None else self._app.policy.restricted(active.patterns)
        makers = _TaskMakers(gate)
        found = Interpreter(body, makers).read()
        if type(found) is not tuple or [type(each) for each in found[1:]] != [tuple, dict]:
            raise refuse("it is no task: (callable, args, kwargs)")
        callee, args, kwargs = found
        if any(type(name) is not str for name in kwargs):
            raise refuse("a keyword is no text")
        if type(callee) is _Global and callee.module in _DEFERRED:
            if callee.name != "invoke_member":
                raise refuse(f"{callee.name} is App Engine's own; of an oversize task, give the data of its entity")
            if len(args) < _OWNER_AND_MEMBER:
                raise refuse("invoke_member has no object and no name")
            function, args = makers.member(*args[:_OWNER_AND_MEMBER]), args[_OWNER_AND_MEMBER:]
        else:
            function = makers.function(callee)
        return PickledCall(function, makers.resolved(args), makers.resolved(kwargs))

    def defer(self, body: bytes, **options: Any) -> Task:
        """Defer what a body calls: signed, by the App.

        Args:
            body: As App Engine stored it.
            options: Those of ``App.options``. ``name``, the name that App Engine gave the task, has one that is delivered twice
                deferred once.

        Returns:
            The new task.

        Raises:
            Error: As ``read`` and ``App.defer``.
        """
        call = self.read(body)
        return self._app.options(**options).defer(call.callable, *call.args, **call.kwargs)


class _Global(NamedTuple):
    """A name in a pickle, looked up where it is used."""

    module: str
    name: str


class _TaskMakers:
    """What a task's pickle may name, make and fill."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._registry = TypeRegistry()
        self._odd_keys = 0
        self._spent = 0
        self._states: dict[int, tuple[object, Callable[[str, Any], None]]] = {}

    def _spend(self, *values: Any) -> None:
        """Bound what is copied: a value of the memo is there many times for two bytes each."""
        self._spent += sum(len(each) for each in values if type(each) in _SIZED)
        if self._spent > _MOST_COPIED:
            raise refuse("it copies over 2,000,000 bytes or items; pass an id in the new code")

    def name(self, module: str, name: str) -> _Global:
        """Return a name. Nothing is imported."""
        return _Global(_RENAMED.get(module, module), name)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """Make a value of a type that tasks had, or an empty object; by functions that stand here."""
        if type(function) is not _Global:
            raise refuse("it calls what it made; defer the task anew")
        self._spend(*arguments)
        if function in {_Global("copyreg", "_reconstructor"), _Global("copyreg", "__newobj__")}:
            rest = arguments[1:]
            # Not by a look-up in a set, which would hash what stands there.
            by_object = [type(each) for each in rest] == [_Global, type(None)] and rest[0] == _Global(
                "builtins", "object"
            )
            if not arguments or (rest and not by_object):
                raise refuse("it constructs an object by another's type")
            return self.new(arguments[0], ())
        make = _MAKES.get(function)
        if make is None:
            raise refuse(f"it calls {_shown(function)}, which is none of the types that are read; defer the task anew")
        return make(self, *arguments)

    def new(self, cls: Any, arguments: tuple[Any, ...]) -> Any:
        """Make an empty object of an admitted class, by ``object.__new__``: no code of the class runs."""
        if type(cls) is not _Global or arguments:
            raise refuse("an object is constructed with arguments; defer the task anew")
        if cls == _Global("uuid", "UUID"):
            made: Any = object.__new__(UUID)
            _UUID_SAFE.__set__(made, SafeUUID.unknown)
            self._states[id(made)] = made, lambda name, value: self._uuid(made, name, value)
            return made
        found = self._gate.load_class(f"{cls.module}:{cls.name}")
        try:
            plan = make_plan(found, self._registry)
        except ValueError as error:
            raise refuse(f"objects of {_shown(cls)} cannot be carried: {error}") from error
        hooks = (plan.getstate, plan.setstate, plan.newargs, plan.newargs_ex, plan.new)
        if plan.base is not object or any(hooks) or plan.tag not in _TAGS:
            raise refuse(f"objects of {_shown(cls)} have a state of their own; defer the task anew")
        value: Any = object.__new__(found)
        own = plan.state_of(value) if plan.state_of is not None else None

        def store(name: str, each: Any) -> None:
            if name in plan.functions:
                raise refuse(f"an attribute hides the function {name} of its class")
            slot = plan.slots.get(name)
            if slot is not None:
                slot.__set__(value, each)
            elif type(own) is dict:
                own[name] = each
            else:
                raise refuse(f"objects of {_shown(cls)} have no such attribute")

        self._states[id(value)] = value, store
        return value

    def build(self, value: Any, state: Any) -> None:
        """Set the attributes of an object that ``new`` made."""
        _, store = self._states.get(id(value), (None, None))
        halves: tuple[Any, ...] = state if type(state) is tuple and len(state) == 2 else (state, None)  # noqa: PLR2004  # __dict__ and slots
        if store is None or any(each is not None and type(each) is not dict for each in halves):
            raise refuse("a state is no dict, or that of another value")
        self._spend(*halves)
        for half in halves:
            for name, each in (half or {}).items():
                if type(name) is not str:
                    raise refuse("the name of an attribute is no text")
                store(name, each)

    def key(self, value: Any) -> Any:
        """Return a value that is hashed by C code alone, in bounded time."""
        # Their hashes are their own; those of others can be made to collide, or take long.
        if type(value) not in _TEXTS and not (type(value) is int and -_MOST_KEY < value < _MOST_KEY):
            self._odd_keys += 1
            if self._odd_keys > _MOST_NODES:
                raise refuse("it has over 1,000 keys that are neither texts nor small integers")
        pending, nodes = [value], 0
        while pending:
            each = pending.pop()
            nodes += 1
            if nodes > _MOST_NODES:
                raise refuse("a key is too large")
            if type(each) is tuple or type(each) is frozenset:
                pending += each
            elif type(each) not in _ATOMS:
                raise refuse("a key of a dict or a member of a set is no plain value")
        return value

    @staticmethod
    def _uuid(made: Any, name: str, value: Any) -> None:
        if name == "int" and type(value) is int and 0 <= value < 1 << 128:
            _UUID_INT.__set__(made, value)
        elif name != "is_safe":
            raise refuse("a UUID has another state")

    # --- What is called ---

    def function(self, callee: Any) -> Callable[..., object]:
        """Return an admitted callable. A name is asked before its module is imported."""
        if type(callee) is not _Global:
            if id(callee) not in self._states:
                raise refuse("its callable is no callable")
            return cast("Callable[..., object]", callee)  # an object with __call__: defer() proves it
        ref = self._gate.check(_reference("function", *callee, None))
        found = find(ref.module, ref.qualname)
        self._gate.load_callable(self._gate.callable_ref(found))
        return cast("Callable[..., object]", found)

    def member(self, owner: Any, member: Any) -> Callable[..., object]:
        """Return a method of an object, or a class method of a class, as the class defines it."""
        if type(member) is not str:
            raise refuse("the name of a method is no text")
        if type(owner) is _Global:
            cls = self._gate.load_class(f"{owner.module}:{owner.name}")
            _, raw = find_member(cls, member)
            if type(raw) is not classmethod:
                raise refuse(f"{member!a} is no class method")
            return cast("Callable[..., object]", MethodType(raw.__func__, cls))
        if id(owner) not in self._states:
            raise refuse("a method of a built-in value is not read")
        _, raw = find_member(type(owner), member)
        if type(raw) is not FunctionType:
            raise refuse(f"{member!a} is no method")
        return MethodType(raw, owner)

    def resolved(self, value: Any) -> Any:
        """Return arguments in which no name and no unreadable text is left, in containers of any depth, each looked at once."""
        pending: list[Any] = [value]
        seen: set[int] = set()
        while pending:
            each = pending.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if type(each) is RawText:
                raise refuse("a text of Python 2 is no UTF-8; decode it where the task was deferred")
            if type(each) is _Global:
                raise refuse(f"{_shown(each)} is an argument; defer the task anew")
            if type(each) in {list, tuple, set, frozenset}:
                pending += each
            elif type(each) in {dict, OrderedDict}:
                pending += [*each, *each.values()]
            elif id(each) in self._states and type(each) is not UUID:
                pending += _attributes(each, make_plan(type(each), self._registry))
        return value


_TAGS: Final = frozenset({"$object", "$dataclass"})


def _attributes(value: object, plan: Any) -> list[Any]:
    own = plan.state_of(value) if plan.state_of is not None else {}
    held = []
    for slot in plan.slots.values():
        try:
            held.append(slot.__get__(value))
        except AttributeError:
            continue
    return [*own.values(), *held]


def _reference(kind: Any, module: str, name: str, member: str | None) -> Any:
    try:
        return reference(kind, module, name, member)
    except ValueError as error:
        raise refuse("its callable has no name that is one") from error


def _shown(name: _Global) -> str:
    return ascii(f"{name.module}.{name.name}"[:200])


# --- Values of known types ------------------------------------------------------------------------


def _raw(state: Any) -> bytes:
    """Return the bytes of a state, which Python 2 wrote as text."""
    if type(state) is RawText or type(state) is bytes:
        return bytes(state)
    if type(state) is str:
        return state.encode()
    raise refuse("the state of a time is malformed")


def _plain(*values: Any) -> tuple[Any, ...]:
    if any(type(each) not in {int, float, str, bool} for each in values):
        raise refuse("a value is made of no plain ones")
    return values


def _members(makers: _TaskMakers, values: Any = ()) -> list[Any]:
    if type(values) not in {list, tuple, set}:
        raise refuse("a set is made of no list")
    return [makers.key(each) for each in values]


def _decimal(_: _TaskMakers, text: Any) -> Decimal:
    if type(text) is not str or len(text) > 4_300:  # noqa: PLR2004  # as integers
        raise refuse("a Decimal is made of no text")
    return Decimal(text)


def _encoded(_: _TaskMakers, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or type(encoding) is not str or encoding not in {"latin1", "latin-1"}:
        raise refuse("bytes are made of no text")
    return text.encode("latin-1")


def _bytearray(_: _TaskMakers, data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    return bytearray(_encoded(_, data, encoding) if type(data) is str else _raw(data))


def _ordered(makers: _TaskMakers, pairs: Any = ()) -> OrderedDict[Any, Any]:
    if type(pairs) not in {list, tuple} or any(type(each) not in {list, tuple} or len(each) != 2 for each in pairs):  # noqa: PLR2004
        raise refuse("an OrderedDict is made of no pairs")
    return OrderedDict((makers.key(name), value) for name, value in pairs)


def _time(cls: Callable[..., Any]) -> Callable[..., Any]:
    def make(_: _TaskMakers, state: Any, *zone: Any) -> Any:
        if any(type(each) is not timezone for each in zone):
            raise refuse("a time zone is none of datetime.timezone; pass the time in UTC")
        return cls(_raw(state), *zone)

    return make


def _zone(_: _TaskMakers, offset: Any, *name: Any) -> timezone:
    if type(offset) is not timedelta or any(type(each) is not str for each in name):
        raise refuse("a time zone is malformed")
    return timezone(offset, *name)


_MAKES: Final[dict[_Global, Callable[..., Any]]] = {
    _Global("builtins", "set"): lambda makers, *given: set(_members(makers, *given)),
    _Global("builtins", "frozenset"): lambda makers, *given: frozenset(_members(makers, *given)),
    _Global("builtins", "bytearray"): _bytearray,
    _Global("builtins", "bytes"): lambda _: b"",
    _Global("builtins", "complex"): lambda _, real, imag: complex(*_plain(real, imag)),
    _Global("_codecs", "encode"): _encoded,
    _Global("datetime", "datetime"): _time(datetime),
    _Global("datetime", "date"): _time(date),
    _Global("datetime", "time"): _time(clock_time),
    _Global("datetime", "timezone"): _zone,
    _Global("datetime", "timedelta"): lambda _, *parts: timedelta(*_plain(*parts)),
    _Global("decimal", "Decimal"): _decimal,
    _Global("collections", "OrderedDict"): _ordered,
}
