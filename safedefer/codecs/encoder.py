"""The walk that turns values into trees of JSON. Tag families add what they know by type."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from safedefer.claims import Limits
from safedefer.codecs.inspect_safely import type_name
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.shared import SAFE_INT, Json, Refusal, is_text, step
from safedefer.errors import NotDeferrable
from safedefer.policy import Gate

Handler: TypeAlias = "Callable[[Encoder, Any, int], Json]"

#: A number that stands for "the state of another value", which cannot be a value too.
_STATE: Final = -1


class Encoder:
    """The state of encoding one call.

    Args:
        gate: Names classes and callables.
        limits: Bounds.
        registry: Types of third parties.
        handlers: What encodes values, by exact type; types whose metaclass is ``type`` only.
        fallback: What encodes all others.
    """

    __slots__ = (
        "_count",
        "_deepest",
        "_depth",
        "_fallback",
        "_handlers",
        "_items",
        "_keep",
        "_names",
        "_numbers",
        "_unfolded",
        "folded",
        "gate",
        "keyed",
        "limits",
        "opaque",
        "open",
        "patterns",
        "registry",
    )

    def __init__(
        self, gate: Gate, limits: Limits, registry: TypeRegistry, handlers: dict[type, Handler], fallback: Handler
    ) -> None:
        self.gate = gate
        self.limits = limits
        self.registry = registry
        self._handlers = handlers
        self._fallback = fallback
        self._items = 0
        self._count = 0
        # What was counted, by id; kept alive so that an id is never another object's.
        self._numbers: dict[int, int] = {}
        #: By number, the values below what is finished, and the levels of them.
        self._unfolded: dict[int, tuple[int, int]] = {}
        #: The depth of the value that is encoded, and of the deepest one since the enclosing one began.
        self._depth = self._deepest = 0
        self._keep: list[object] = []
        #: Ids of objects that do not exist on the other side before what is inside them does.
        self.opaque: set[int] = set()
        #: Ids of unfinished objects whose hash their class computes.
        self.open: set[int] = set()
        #: How many set members and dict keys enclose the value.
        self.keyed = 0
        self.patterns = 0
        #: Characters in the ranges of case-insensitive patterns.
        self.folded = 0
        # Names of classes that the gate admitted, by id of the class.
        self._names: dict[int, str] = {}

    def value(self, value: Any, depth: int) -> Json:
        """Return the tree of one value, ``depth`` values deep.

        Raises:
            Refusal: It cannot be carried.
        """
        kind = type(value)
        if (
            value is None
            or kind is bool
            or (kind is str and is_text(value))
            or (kind is int and -SAFE_INT <= value <= SAFE_INT)
            or (kind is float and value - value == 0.0)  # neither NaN nor infinite
        ):
            return value
        if depth > self.limits.depth:
            raise Refusal(f"values nest deeper than {self.limits.depth}; pass a flatter value, or an id")
        handler = self._handlers.get(kind) if (meta := type(kind)) is type or meta is ABCMeta else None
        items, deepest = self._items, self._deepest
        self._depth = self._deepest = depth
        try:
            tree = (handler or self._fallback)(self, value, depth)
        except Refusal as refusal:
            refusal.kind = refusal.kind or type_name(kind)
            raise
        number = self._numbers.get(id(value), _STATE)
        if number != _STATE and number not in self._unfolded:
            self._unfolded[number] = self._items - items, self._deepest - depth
        self._deepest = max(deepest, self._deepest)
        return tree

    def sequence(self, values: Sequence[Any], depth: int) -> list[Json]:
        """Return the trees of the members of a list or tuple."""
        self.add(len(values))
        out: list[Json] = list(values)
        i = -1
        try:
            for value in values:
                i += 1
                kind = type(value)
                # The conditions of `value`: most members are plain, and a call costs more than the question.
                if not (
                    (kind is str and value.isascii())
                    or (kind is int and -SAFE_INT <= value <= SAFE_INT)
                    or (kind is float and value - value == 0.0)
                    or value is None
                    or kind is bool
                ):
                    out[i] = self.value(value, depth)
        except Refusal as refusal:
            refusal.trail.append(f"[{i}]")
            raise
        return out

    def attributes(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> dict[str, Json]:
        """Return a JSON object of names to trees: keyword arguments, attributes, fields.

        Raises:
            Refusal: A name is no plain text, or begins with ``$``.
        """
        out: dict[str, Json] = {}
        name: Any = None
        try:
            for name, value in pairs:
                if type(name) is not str or name[:1] == "$" or not (name.isascii() or is_text(name)):
                    raise Refusal(  # noqa: TRY301 - the path is added below
                        "an attribute or keyword begins with '$', is no plain text or not exactly a str; rename it"
                    )
                kind = type(value)
                plain = (
                    (kind is str and value.isascii())
                    or (kind is int and -SAFE_INT <= value <= SAFE_INT)
                    or value is None
                    or kind is bool
                )
                out[name] = value if plain else self.value(value, depth)
        except Refusal as refusal:
            refusal.trail.append(step(name))
            raise
        self.add(len(out))
        return out

    def key(self, value: Any, depth: int) -> Json:
        """Return the tree of what is hashed on the other side: a set member or a dict key."""
        self.keyed += 1
        tree = self.value(value, depth)
        self.keyed -= 1
        return tree

    def add(self, items: int) -> None:
        """Count values. Raises ``Refusal`` when there are too many."""
        self._items += items
        if self._items > self.limits.items:
            raise Refusal(
                f"the call holds more than {self.limits.items} values, shared ones counted wherever they are; "
                "pass an id, or defer in parts"
            )

    # --- Sharing ---

    def enter(self, value: object) -> Json | None:
        """Count a mutable container or object; return the ``$ref`` if it was met before.

        What is below it counts each time that it is met: whoever walks the values walks it again.

        Raises:
            Refusal: It was met as part of what must exist before it, or there are too many values or levels.
        """
        number = self._numbers.get(id(value))
        if number is None:
            self._numbers[id(value)] = self._count
            self._count += 1
            self._keep.append(value)
            return None
        if number == _STATE:
            raise Refusal("this is the state of another value of the call, and would arrive as a copy; pass a copy")
        if id(value) in self.opaque:
            raise Refusal("the value contains itself in what it is made from; break the cycle, or pass an id")
        if self.keyed and id(value) in self.open:
            raise Refusal("a set member or dict key contains itself, and its hash would run too early; break the cycle")
        if self.keyed:
            self.check_hash(type(value))
        items, levels = self._unfolded.get(number, (0, 0))  # what encloses the value has not ended: a cycle
        self.add(items)
        self._deepest = max(self._deepest, self._depth + levels)
        if self._deepest > self.limits.depth:
            raise Refusal(f"values nest deeper than {self.limits.depth}; pass a flatter value, or an id")
        return {"$ref": number}

    def own_state(self, *states: object) -> None:
        """Note parts of a value (its ``__dict__``) that are not values themselves.

        Raises:
            Refusal: The call has one of them as a value too, or two objects share it.
        """
        for state in states:
            if id(state) in self._numbers:
                raise Refusal("its state is another value of the call too, and would arrive as a copy; pass a copy")
            self._numbers[id(state)] = _STATE
            self._keep.append(state)

    def hold(self, value: object) -> None:
        """Keep a value that was made only now, so that its id is never another's."""
        self._keep.append(value)

    # --- Policy ---

    def name(self, cls: type) -> str:
        """Return the name of a class that the gate admits.

        Raises:
            Refusal: It does not.
        """
        name = self._names.get(id(cls))
        if name is None:
            try:
                name = self.gate.class_name(cls)
            except NotDeferrable as error:
                raise Refusal(str(error)) from error
            self._names[id(cls)] = name
            self._keep.append(cls)
        return name

    def check_hash(self, cls: type) -> None:
        """Ask the gate about the classes whose ``__hash__`` or ``__eq__`` objects of a class inherit."""
        plan = self.registry.plans.get(id(cls))
        if plan is not None:
            for definer in plan.hash_definers:
                self.name(definer)
