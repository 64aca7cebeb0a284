"""All that keeps a call from being encoded: ``defer()`` names it in one message, not one class in each attempt.

The encoder stops at the first refusal. Here it walks again: a class that the policy does not admit is noted, and its
objects are looked into as long as that runs none of its hooks; what is refused for another reason is left out of the next
walk. The trees are thrown away.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final, cast

from safedefer.codecs import inspect_safely
from safedefer.codecs.class_layout import make_plan
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.registry import RegisteredType, TypeRegistry
from safedefer.codecs.shared import CallData, Json, Obstacles, Refusal, Values
from safedefer.errors import NotDeferrable
from safedefer.options import Limits
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND, CallableRef, class_path, reference

#: How often the values are walked: once for each refusal, or class with hooks that the policy does not admit.
_WALKS: Final = 32
#: How many refusals are told, besides the patterns.
_TOLD: Final = 8
_INSTEAD: Final = "pass an id, or the values that the task needs"
#: Stands for the name of a callable that the policy does not admit.
_ANY: Final = reference("function", "safedefer", "defer", None)


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
        limits: Bounds of the encoder.
        registry: Types of third parties.
        encoders: The last three arguments of ``Encoder``.

    Raises:
        RuntimeError: The caller's stack is nearly full, or another thread changes a value meanwhile.
    """
    asked = _AskedGate(gate, registry)
    refusals: dict[str, str] = {}
    met: dict[str, int] = {}
    left_out: dict[int, tuple[object, tuple[str, ...]]] = {}
    for _ in range(_WALKS):
        asked.missing.clear()
        enc = _SurveyingEncoder(cast("Gate", asked), limits, registry, *encoders)
        enc.asked, enc.left_out, enc.around = asked, left_out, []
        at = [""]
        try:
            walk(enc, call, at)
            break
        except Refusal as refusal:
            refusal.trail.append(at[0])
            if not enc.around:
                break
            told = sentence(refusal)
            wanted = refusal.__cause__ if isinstance(refusal.__cause__, NotDeferrable) else None
            if wanted is not None and wanted.reason == "policy":
                left_out[id(enc.around[0][0])] = enc.around[0][0], wanted.missing
                continue
            # A value that was made for this walk is another one in the next: then the one around it is left out.
            met[told] = level = met.get(told, -1) + 1
            culprit, steps = enc.around[min(level, len(enc.around) - 1)]
            for outer, outer_steps in reversed(enc.around[1:]):
                if id(type(outer)) in asked.admitted:
                    # No pattern helps: the object holds what cannot be carried, whatever the policy admits.
                    culprit, steps = outer, outer_steps
                    break
            left_out[id(culprit)] = culprit, ()
            path = "$" + "".join(reversed(refusal.trail[steps:]))
            if culprit is not enc.around[0][0] and level == 0:
                held, kind = told.partition(" cannot be carried")[0], inspect_safely.type_name(type(culprit))
                reason = refusal.why.rpartition("; ")[0]
                told = f"{path} ({kind}) cannot be carried: it holds {held}, and {reason}; {_INSTEAD}"
            refusals.setdefault(path, told)
    hooked = {pattern: None for _, patterns in asked.closed.values() for pattern in patterns}
    missing = tuple(asked.missing)
    return Obstacles(
        missing,
        tuple(pattern for pattern in hooked if pattern in missing),
        dict(islice((asked.refusals | refusals).items(), _TOLD)),
    )


class _AskedGate:
    """Asks the gate, notes what it refuses for want of a pattern, and admits it where nothing of it runs."""

    def __init__(self, gate: Gate, registry: TypeRegistry) -> None:
        self._gate = gate
        self._registry = registry
        self.missing: dict[str, None] = {}
        #: Those of a key: no pattern of the policy helps.
        self.refusals: dict[str, str] = {}
        #: Classes without a pattern whose objects are looked into, and those whose objects are not, with their patterns.
        self.admitted: dict[int, type] = {}
        self.closed: dict[int, tuple[type, tuple[str, ...]]] = {}

    def class_name(self, cls: type) -> str:
        """See ``Gate.class_name``. Raises ``NotDeferrable`` also where to go on would run code of the class."""
        try:
            return self._gate.class_name(cls)
        except NotDeferrable as error:
            self._note(error)
            if self._runs_code(cls):
                self.closed[id(cls)] = cls, error.missing
                raise
            self.admitted[id(cls)] = cls
            return class_path(cls)

    def note_class(self, cls: type) -> None:
        """Ask about a class that is a value itself: nothing of it runs. Raises ``NotDeferrable`` as the gate does."""
        try:
            self._gate.class_name(cls)
        except NotDeferrable as error:
            self._note(error)

    def callable_ref(self, obj: object) -> CallableRef:
        """See ``Gate.callable_ref``."""
        try:
            return self._gate.callable_ref(obj)
        except NotDeferrable as error:
            self._note(error)
            return _ANY

    def _note(self, error: NotDeferrable) -> None:
        if error.reason != "policy":
            raise error
        self.missing |= dict.fromkeys(error.missing)
        if not error.missing:
            self.refusals[str(error)] = str(error)

    def _runs_code(self, cls: type) -> bool:
        """Whether to take an object of the class apart runs a hook of it."""
        if type(self._registry.by_class(cls)) is RegisteredType:
            return True
        try:
            plan = make_plan(cls, self._registry)
        except ValueError:
            return True
        generic = inspect_safely.namespace(cls).get("__pydantic_generic_metadata__")
        if type(generic) is dict and generic.get("parameters"):
            return True  # its classes are made again from its arguments
        hooks = plan.getstate, plan.setstate, plan.newargs, plan.newargs_ex, plan.new
        return any(hook is not None for hook in hooks)


class _SurveyingEncoder(Encoder):
    """Leaves values out, and says around which value a refusal was raised."""

    __slots__ = ("around", "asked", "left_out")

    asked: _AskedGate
    left_out: dict[int, tuple[object, tuple[str, ...]]]
    """By id; with the patterns that it takes to look at them again."""
    around: list[tuple[object, int]]
    """The values around a refusal, innermost first, and the number of steps from each to the place of the refusal."""

    def value(self, value: Any, depth: int) -> Json:
        """See ``Encoder.value``."""
        kind = type(value)
        out = self.left_out.get(id(value)) or self.asked.closed.get(id(kind))
        if out is not None:
            self.asked.missing |= dict.fromkeys(out[1])
            return None
        try:
            if inspect_safely.derives(kind, type):
                return self._class(value)
            return super().value(value, depth)
        except Refusal as refusal:
            self.around.append((value, len(refusal.trail)))
            raise

    def _class(self, cls: type) -> Json:
        # Not by ``name``, which remembers what was admitted: objects of the class are another question.
        try:
            self.asked.note_class(cls)
        except NotDeferrable as error:
            refusal = Refusal(str(error))
            refusal.kind = inspect_safely.type_name(type(cls))
            raise refusal from error
        return None
