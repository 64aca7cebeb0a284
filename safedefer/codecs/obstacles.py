"""All that keeps a call from being encoded: ``defer()`` names it in one message, not one class in each attempt.

The encoder stops at the first refusal. Here it walks again: a class that the policy does not admit is noted, and its
objects are looked into where that runs none of its code; what is refused for another reason is left out of the next
walk. The trees are thrown away. All walks together look at no more values than a call may hold.
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Mapping
from itertools import chain, islice
from types import BuiltinMethodType, FunctionType, GenericAlias, MethodType, SimpleNamespace
from typing import Any, ClassVar, Final, cast

from safedefer.codecs import inspect_safely
from safedefer.codecs.class_layout import Plan, hash_definers, make_plan
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.registry import RegisteredType, TypeRegistry
from safedefer.codecs.shared import CallData, Json, Obstacles, OverLimit, Refusal, Values
from safedefer.errors import NotDeferrable, PolicyViolation
from safedefer.options import Limits
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, CallableRef, class_path, reference

#: How many refusals are told, besides the patterns. Each takes a walk.
_TOLD: Final = 8
_INSTEAD: Final = "pass an id, or the values that the task needs"
#: Stands for the name of a callable that the policy does not admit.
_ANY: Final = reference("function", "safedefer", "defer", None)
_OF_NAMESPACE: Final[Any] = vars(SimpleNamespace)["__dict__"].__get__
#: Not those of an OrderedDict, which ask its keys for their hash.
_VIEWS: Final[tuple[type, ...]] = (type({}.keys()), type({}.values()), type({}.items()))
_ALIASES: Final = (GenericAlias, type(typing.Iterable[int]))


def walk(enc: Encoder, call: Values, at: list[str]) -> CallData:
    """Return the trees of a call; ``at`` says which part was being written.

    Raises:
        Refusal: A value cannot be carried. Its trail lacks the part.
    """
    bound, args, kwargs = call
    if bound is not UNBOUND:
        at[0] = ".bound"
        bound = enc.value(bound, 1)
    at[0] = ".args"
    trees = enc.sequence(list(args), 1)
    at[0] = ".kwargs"
    return CallData(bound, trees, enc.attributes(kwargs.items(), 1))


def sentence(refusal: Refusal) -> str:
    """Return what is said of a value that cannot be carried: path, type, reason and remedy."""
    kind = f" ({refusal.kind})" if refusal.kind else ""
    return f"{refusal.path}{kind} cannot be carried: {refusal.why}"


def find_obstacles(call: Values, gate: Gate, limits: Limits, registry: TypeRegistry, encoders: Any) -> Obstacles:
    """Return the patterns that the policy lacks for the values of a call, and what else is refused.

    Args:
        call: The values.
        gate: Which refused one of them.
        limits: Bounds of the encoder; ``items`` bounds the values of all walks together.
        registry: Types of third parties.
        encoders: The last three arguments of ``Encoder``.

    Raises:
        RuntimeError: The caller's stack is nearly full, or another thread changes a value meanwhile.
    """
    asked = _AskedGate(gate, registry)
    look = _LookAtCall(gate)
    refusals: dict[str, str] = {}
    levels: dict[str, int] = {}
    while True:
        enc = _SurveyingEncoder(cast("Gate", asked), limits, registry, *encoders)
        enc.begin(asked, look)
        at = [""]
        try:
            walk(enc, call, at)
            break
        except _Spent:
            break
        except Refusal as refusal:
            refusal.trail.append(at[0])
            if isinstance(refusal, OverLimit) or not enc.around:
                refusals.setdefault(refusal.path, sentence(refusal))
                if look.shut or not look.left_out:
                    break
                look.shut = True  # it may be in what is to be passed instead: what is beside that is looked at
                continue
            level = levels[refusal.path] = levels.get(refusal.path, -1) + 1
            # A setting helps what has a metaclass, so a pattern helps what is around it.
            culprit = _culprit(enc.around, {} if _is_of_metaclass(refusal) else asked.admitted, level)
            _cut(asked.missing, culprit.noted)
            _cut(enc.done, culprit.done)
            if level == 0:
                path = "$" + "".join(reversed(refusal.trail[culprit.steps :]))
                refusals.setdefault(path, _told(refusal, path, culprit.value, enc.around[0].value))
            if len(asked.refusals) + len(refusals) >= _TOLD or id(culprit.value) in look.left_out:
                if look.shut:
                    break
                look.shut = True  # as above
            innermost = culprit.value is enc.around[0].value
            instead = _instead(refusal, culprit.value, asked, limits.items) if innermost else {}
            look.left_out[id(culprit.value)] = culprit.value, instead
            look.done |= enc.done
    hooked = {pattern: None for _, patterns in asked.closed.values() for pattern in patterns}
    missing = tuple(asked.missing | asked.beside)
    return Obstacles(
        missing,
        tuple(pattern for pattern in hooked if pattern in missing),
        dict(islice((asked.refusals | refusals).items(), _TOLD)),
    )


def _told(refusal: Refusal, path: str, culprit: object, innermost: object) -> str:
    told = sentence(refusal)
    if culprit is innermost:
        return told
    held, kind = told.partition(" cannot be carried")[0], inspect_safely.type_name(type(culprit))
    reason = refusal.why.rpartition("; ")[0]
    return f"{path} ({kind}) cannot be carried: it holds {held}, and {reason}; {_INSTEAD}"


class _Around(typing.NamedTuple):
    """A value around a refusal."""

    value: object
    steps: int
    """From it to the place of the refusal."""
    noted: int
    """How many patterns were missing when it began."""
    done: int
    """How many values the walk had done with."""


def _culprit(around: list[_Around], admitted: dict[int, type], level: int) -> _Around:
    """Return the value to leave out: the outermost object of a class without a pattern, as no pattern helps what it holds.

    ``level`` says how often the same place was refused before: a hook makes the value anew for each walk, so one further out
    must go.
    """
    held = [i for i, each in enumerate(around) if i and id(type(each.value)) in admitted]
    return around[min((held[-1] if held else 0) + level, len(around) - 1)]


def _cut(ordered: dict[Any, Any], size: int) -> None:
    while len(ordered) > size:
        ordered.popitem()


class _Spent(Exception):
    """The walks have looked at as many values as a call may hold."""


class _LookAtCall:
    """What the walks of one call share."""

    def __init__(self, gate: Gate) -> None:
        self.gate = cast("Gate", _LoadedGate(gate))
        """Which refused the call: what it admits may run."""
        self.names: dict[int, str] = {}
        self.alone: dict[int, bytes] = {}
        self.alone_items = [0]
        self.keep: list[object] = []
        #: By id: values that were refused, with what the message says to pass instead, and those that earlier walks have done with.
        self.left_out: dict[int, tuple[object, Mapping[str, object]]] = {}
        self.done: dict[int, object] = {}
        self.spent = 0
        self.shut = False
        """Whether no more is looked at of what is to be passed instead: it holds too much, or enough is told."""


class _AskedGate:
    """Asks the gate, notes what it refuses for want of a pattern, and admits it where nothing of it runs."""

    def __init__(self, gate: Gate, registry: TypeRegistry) -> None:
        self._gate = gate
        self._registry = registry
        self.missing: dict[str, None] = {}
        #: Patterns that a class lacks besides what its refusal tells: the setting of its metaclass, a base to put right.
        self.beside: dict[str, None] = {}
        #: Those of a key: no pattern of the policy helps.
        self.refusals: dict[str, str] = {}
        #: Classes without a pattern whose objects are looked into, and those whose objects are not, with their patterns.
        self.admitted: dict[int, type] = {}
        self.closed: dict[int, tuple[type, tuple[str, ...]]] = {}

    def class_name(self, cls: type) -> str:
        """See ``Gate.class_name``. Raises ``NotDeferrable`` also where to go on would run code of the class."""
        if _is_unloaded(class_path(cls).partition(":")[0]):
            self.closed[id(cls)] = cls, ()
            raise NotDeferrable("to prove its name imports its module", reason="policy")
        try:
            return self._gate.class_name(cls)
        except NotDeferrable as error:
            self._note(error, cls)
            plan = self._plan(cls)
            if plan is None or _runs_code(plan):
                try:
                    lacking = [self.note_class(each) for each in (() if plan is None else plan.definers)]
                except NotDeferrable:  # no pattern helps the base, and when it is put right the class lacks its own
                    self.beside |= dict.fromkeys(error.missing)
                    raise
                self.closed[id(cls)] = cls, (*error.missing, *chain.from_iterable(lacking))
                raise
            self.admitted[id(cls)] = cls
            return class_path(cls)

    def note_class(self, cls: type) -> tuple[str, ...]:
        """Ask about a class of which nothing runs: a value itself, or a base. Raises ``NotDeferrable`` as the gate does."""
        if _is_unloaded(class_path(cls).partition(":")[0]):
            return ()
        try:
            self._gate.class_name(cls)
        except NotDeferrable as error:
            self._note(error, cls)
            return error.missing
        return ()

    def callable_ref(self, obj: object) -> CallableRef:
        """See ``Gate.callable_ref``."""
        if _imports(obj):
            return _ANY
        try:
            return self._gate.callable_ref(obj)
        except NotDeferrable as error:
            self._note(error)
            return _ANY

    def _note(self, error: NotDeferrable, cls: type | None = None) -> None:
        if error.reason == "metaclass" and cls is not None:
            self._note_beside(cls)
        if error.reason != "policy":
            raise error
        self.missing |= dict.fromkeys(error.missing)
        if not error.missing:
            self.refusals[str(error)] = str(error)

    def attributes(self, value: object) -> Mapping[str, object]:
        """Return the attributes of an object whose metaclass was refused, if to look at them runs no code of its class."""
        plan = None if inspect_safely.derives(type(value), type) else self._plan(type(value))
        if plan is None or plan.state_of is None or _runs_code(plan):
            return {}
        own = plan.state_of(value)
        return {"": {name: each for name, each in own.items() if type(name) is str}} if type(own) is dict else {}

    def _note_beside(self, cls: type) -> None:
        module, _, qualname = class_path(cls).partition(":")
        try:
            self._gate.check(reference("class", module, qualname, None))
        except PolicyViolation:
            self.beside[class_path(cls)] = None

    def _plan(self, cls: type) -> Plan | None:
        """Return the plan of a class; of one whose objects only others' code takes apart, or which cannot travel, none."""
        if type(self._registry.by_class(cls)) is RegisteredType:
            return None
        try:
            return make_plan(cls, self._registry)
        except ValueError:
            return None


def _runs_code(plan: Plan) -> bool:
    """Whether to take an object of a class apart runs a hook of the class, or of one of its bases."""
    generic = inspect_safely.namespace(plan.cls).get("__pydantic_generic_metadata__")
    if type(generic) is dict and generic.get("parameters"):
        return True  # its classes are made again from its arguments
    hooks = plan.getstate, plan.setstate, plan.newargs, plan.newargs_ex, plan.new
    return any(hook is not None for hook in hooks)


def _instead(refusal: Refusal, value: object, asked: _AskedGate, most: int) -> Mapping[str, object]:
    """Return what is to be looked at in place of a value that was refused. Views of more than ``most`` are not looked at."""
    return asked.attributes(value) if _is_of_metaclass(refusal) else refusal.instead or _parts(value, most)


def _is_of_metaclass(refusal: Refusal) -> bool:
    return isinstance(refusal.__cause__, NotDeferrable) and refusal.__cause__.reason == "metaclass"


def _parts(value: object, most: int) -> Mapping[str, object]:
    """Return what the message says to pass in place of a value of a built-in class. Runs none of the caller's code."""
    if type(value) is functools.partial:
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if type(value) is SimpleNamespace:
        return {"": _OF_NAMESPACE(value)}
    if any(type(value) is each for each in _VIEWS) and len(cast("Any", value)) <= most:
        return {"": list(cast("Any", value))}
    return {}


def _is_unloaded(module: object) -> bool:
    """Whether to look a name up would import its module, for a class or function that says another one than its own."""
    return type(module) is str and module != "" and module not in sys.modules


def _imports(obj: object) -> bool:
    """Whether to prove the name of a callable would import a module that it, or the class or object of a method, says."""
    parts = [obj, type(obj)]
    if type(obj) is MethodType:
        parts.append(obj.__func__)
    if type(obj) is MethodType or type(obj) is BuiltinMethodType:
        parts += [obj.__self__, type(obj.__self__)]
    classes = (cast("type", each) for each in parts if inspect_safely.derives(type(each), type))
    functions = (each for each in parts if type(each) is FunctionType)
    return any(_is_unloaded(class_path(each).partition(":")[0]) for each in classes) or any(
        _is_unloaded(each.__module__) for each in functions
    )


class _LoadedGate:
    """The gate that refused the call, for what imports nothing."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def class_name(self, cls: type) -> str:
        """See ``Gate.class_name``."""
        if _imports(cls):
            raise NotDeferrable("to prove its name imports its module", reason="policy")
        return self._gate.class_name(cls)

    def callable_ref(self, obj: object) -> CallableRef:
        """See ``Gate.callable_ref``."""
        if _imports(obj):
            raise NotDeferrable("to prove its name imports its module", reason="policy")
        return self._gate.callable_ref(obj)


class _SurveyingEncoder(Encoder):
    """Leaves values out, and says around which value a refusal was raised."""

    __slots__ = ("around", "asked", "begun", "done", "inside", "look")

    looks_only: ClassVar[bool] = True

    asked: _AskedGate
    look: _LookAtCall
    done: dict[int, object]
    """Values that this walk has done with, by id."""
    begun: set[int]
    """The values around the current one, by id: met again inside themselves, they are not done with."""
    around: list[_Around]
    """The values around a refusal, innermost first."""
    inside: bool
    """Whether what is to be passed instead of a value is looked at."""

    def begin(self, asked: _AskedGate, look: _LookAtCall) -> None:
        """Take what the walks share."""
        self.asked, self.look, self.done, self.begun, self.around, self.inside = asked, look, {}, set(), [], False
        self._alone, self._alone_items, self._keep = look.alone, look.alone_items, look.keep

    def _lone(self) -> Encoder:
        # By the gate that refused the call: the members of its sets come in the order in which it wrote them.
        return self._lone_of(self.look.gate, self.look.names)

    def add(self, items: int) -> None:
        """Count values. Raises ``_Spent`` when all walks have looked at too many.

        That the call holds too many is no obstacle to name here: an exception has more to look at than it has to carry.
        """
        self._items += items
        self.look.spent += items
        if self.look.spent > self.limits.items:
            raise _Spent

    def value(self, value: Any, depth: int) -> Json:
        """See ``Encoder.value``."""
        kind, asked = type(value), self.asked
        if id(value) in self.look.done:
            return None
        if (left := self.look.left_out.get(id(value))) is not None:
            return self._instead(value, left[1], depth)
        if (closed := asked.closed.get(id(kind))) is not None:
            asked.missing |= dict.fromkeys(closed[1])
            return self._note_hash(kind)
        keyed, noted, done = self.keyed, len(asked.missing), len(self.done)
        again = id(value) in self.begun
        self.begun.add(id(value))
        try:
            if inspect_safely.derives(kind, type):
                self._class(value)
            elif any(kind is each for each in _ALIASES):  # typing would ask the classes for their names
                super().value((value.__origin__, value.__args__), depth)
            else:
                super().value(value, depth)
        except Refusal as refusal:
            self.keyed = keyed
            self.open.discard(id(value))
            self.opaque.discard(id(value))
            cause = refusal.__cause__
            if not isinstance(cause, NotDeferrable) or cause.reason != "policy":
                self.around.append(_Around(value, len(refusal.trail), noted, done))
                raise
            # Else the pattern is noted, and nothing more of the object is looked at.
            self._note_hash(kind)
        if not again:
            self.begun.discard(id(value))
            self.done[id(value)] = value
        return None

    def _instead(self, value: object, parts: Mapping[str, object], depth: int) -> None:
        """Look at what is to be passed in place of a value that was refused: once in a walk, wherever the value is."""
        if id(value) in self.begun or self.look.shut:
            return
        self.begun.add(id(value))
        inside, self.inside = self.inside, True
        before = self.look.spent, self.keyed, set(self.open), set(self.opaque)
        for at, each in parts.items():
            try:
                self.value(each, depth + 1)
            except Refusal as refusal:
                refusal.trail.append(at)
                raise
            except _Spent:
                if inside:
                    raise
                # What is beside the value is looked at all the same.
                self.look.shut = True
                self.look.spent, self.keyed, self.open, self.opaque = before
                break
        self.inside = inside

    def _note_hash(self, kind: type) -> None:
        """Ask about the bases of a class whose objects are not looked into, for one that is a key or a member of a set."""
        if self.keyed and id(kind) in self.asked.closed:
            for definer in hash_definers(kind):
                self.asked.note_class(definer)

    def name_definer(self, cls: type) -> None:
        """See ``Encoder.name_definer``. Its own objects may be looked into all the same: they do without the hook."""
        self.name(cls)
        if id(cls) in self.asked.admitted:
            self.asked.closed[id(cls)] = cls, (class_path(cls),)
            raise Refusal("a hook of it would run") from NotDeferrable("a hook of it would run", reason="policy")

    def _class(self, cls: type) -> None:
        # Not by ``name``, which remembers what was admitted: objects of the class are another question.
        try:
            self.asked.note_class(cls)
        except NotDeferrable as error:
            refusal = Refusal(str(error))
            refusal.kind = inspect_safely.type_name(type(cls))
            raise refusal from error
