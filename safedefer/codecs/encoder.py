"""The walk that turns values into trees of JSON. The modules of ``tags`` encode the types that need a tag."""

from __future__ import annotations

import contextlib
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Final, Self, TypeAlias

from safedefer.claims import write_json
from safedefer.codecs.inspect_safely import type_name
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.shared import SAFE_INT, Json, OverLimit, Refusal, is_text, step
from safedefer.errors import NotDeferrable
from safedefer.options import Limits
from safedefer.policy_cache import Gate

Handler: TypeAlias = "Callable[[Encoder, Any, int], Json]"

#: Stands for the number of an object that is the state of another value, and so cannot be a value too.
_STATE: Final = -1
#: Greater than number and id of every object.
_NOTHING_OPEN: Final = (2**63, 0)


class Encoder:
    """The state of encoding one call.

    Args:
        gate: Names classes and callables.
        limits: Bounds of depth, items and digits.
        registry: Types of third parties.
        handlers: Functions that encode values, by exact type. The metaclass of each type is ``type`` or ``ABCMeta``.
        fallback: Encodes all other values.
        scalars: Those of the handlers whose values hold nothing that is shared: nothing is counted for them.
    """

    __slots__ = (
        "_alone",
        "_alone_items",
        "_count",
        "_deepest",
        "_depth",
        "_fallback",
        "_handlers",
        "_hashing",
        "_items",
        "_keep",
        "_names",
        "_numbers",
        "_reached",
        "_scalars",
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

    looks_only: ClassVar[bool] = False
    """Whether the trees are thrown away: then classes that the gate refused are passed too, and none of their code may run."""

    def __init__(
        self,
        gate: Gate,
        limits: Limits,
        registry: TypeRegistry,
        handlers: dict[type, Handler],
        fallback: Handler,
        scalars: frozenset[Handler] = frozenset(),
    ) -> None:
        self.gate: Gate = gate
        self.limits: Limits = limits
        self.registry: TypeRegistry = registry
        self._handlers = handlers
        self._scalars = scalars
        self._fallback = fallback
        self._items = 0
        self._count = 0
        # The numbers of counted objects, by id. _keep keeps them alive, so that no other object gets the id.
        self._numbers: dict[int, int] = {}
        #: For each finished object, by number: the values below it, the levels of them, and number and id of the outermost
        #: object of ``open`` that a ``$ref`` below it names.
        self._unfolded: dict[int, tuple[int, int, tuple[int, int]]] = {}
        #: Number and id of the outermost object of ``open`` that a ``$ref`` names since the enclosing value began.
        self._reached = _NOTHING_OPEN
        #: The depth of the current value, and of the deepest value since the enclosing one began.
        self._depth = self._deepest = 0
        self._keep: list[object] = []
        #: The texts of set members, by id.
        self._alone: dict[int, bytes] = {}
        #: The number of values in members that were written by themselves.
        self._alone_items = [0]
        #: Ids of objects that the decoder can make only after the values inside them.
        self.opaque: set[int] = set()
        #: Ids of unfinished objects with a hash that their class computes.
        self.open: set[int] = set()
        #: How many set members and dict keys enclose the value.
        self.keyed: int = 0
        self.patterns: int = 0
        #: Characters in the ranges of patterns.
        self.folded: int = 0
        # Names of the classes that the gate admitted, by id.
        self._names: dict[int, str] = {}
        #: Classes whose ``__hash__`` or ``__eq__`` objects outside keys inherit, by id.
        self._hashing: dict[int, type] = {}

    def value(self, value: Any, depth: int) -> Json:
        """Return the tree of one value, ``depth`` values deep.

        Raises:
            Refusal: The value cannot be carried.
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
            raise OverLimit(f"values nest deeper than {self.limits.depth}; pass a flatter value, or an id")
        handler = self._handlers.get(kind) if (meta := type(kind)) is type or meta is ABCMeta else None
        try:
            if handler is not None and handler in self._scalars:
                return handler(self, value, depth)
            items, deepest, reached = self._items, self._deepest, self._reached
            self._depth = self._deepest = depth
            self._reached = _NOTHING_OPEN
            tree = (handler or self._fallback)(self, value, depth)
        except Refusal as refusal:
            refusal.kind = refusal.kind or type_name(kind)
            raise
        number = self._numbers.get(id(value), _STATE)
        if number != _STATE and number not in self._unfolded:
            self._unfolded[number] = self._items - items, self._deepest - depth, self._reached
        # Not with max() and min(): a call costs more than the test, and most values are no cycles.
        if deepest > self._deepest:  # noqa: PLR1730
            self._deepest = deepest
        if reached is not _NOTHING_OPEN and reached < self._reached:
            self._reached = reached
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
                # The conditions of `value` again: most members are plain, and a call costs more than the test.
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
            Refusal: A name is not text, or begins with ``$``.
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
        """Return the tree of a set member or dict key, which the decoder hashes."""
        self.keyed += 1
        tree = self.value(value, depth)
        self.keyed -= 1
        return tree

    def alone(self, value: object, depth: int) -> bytes:
        """Return the text of a set member as it is written by itself, by which the members of equal sets are ordered.

        A member that cannot be written has none; encoding it says why. Neither has one whose set is inside it: members
        of a set that contains itself come in the order that the process has.
        """
        text = self._alone.get(id(value))
        if text is None:
            self._alone[id(value)] = b""
            self._keep.append(value)
            with contextlib.suppress(Refusal):
                self._alone[id(value)] = write_json(self._lone().key(value, depth))
            text = self._alone[id(value)]
        return text

    def _lone(self) -> Encoder:
        return self._lone_of(self.gate, self._names)

    def _lone_of(self, gate: Gate, names: dict[int, str]) -> Encoder:
        lone = _LoneEncoder(gate, self.limits, self.registry, self._handlers, self._fallback, self._scalars)
        return lone.share(names, self._keep, self._alone, self._alone_items)

    def add(self, items: int) -> None:
        """Count values. Raises ``Refusal`` over the limit."""
        self._items += items
        if self._items > self.limits.items:
            raise OverLimit(
                f"the call holds more than {self.limits.items} values, shared ones counted wherever they are; "
                "pass an id, or defer in parts"
            )

    # --- Sharing ---

    def enter(self, value: object) -> Json | None:
        """Count a mutable container or object. Return its ``$ref`` if it was met before, else None.

        The values below it count each time: code that walks the arguments walks them each time.

        Raises:
            Refusal: The object contains itself where it cannot, or there are too many values or levels.
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
        if self.keyed:
            # The hash of an object hashes what is below it, and that may be of any class so far.
            for definer in self._hashing.values():
                self.name(definer)
        # An enclosing object is unfinished: a cycle.
        unfinished = (number, id(value)) if id(value) in self.open else _NOTHING_OPEN
        items, levels, reached = self._unfolded.get(number, (0, 0, unfinished))
        if self.keyed and reached[1] in self.open:
            raise Refusal(
                "a set member or dict key contains itself or an object around it, and its hash would run too early; "
                "break the cycle"
            )
        self._reached = min(reached, self._reached)
        self.add(items)
        self._deepest = max(self._deepest, self._depth + levels)
        if self._deepest > self.limits.depth:
            raise OverLimit(f"values nest deeper than {self.limits.depth}; pass a flatter value, or an id")
        return {"$ref": number}

    def own_state(self, *states: object) -> None:
        """Note the parts of a value (its ``__dict__``) that are not values themselves.

        Raises:
            Refusal: A part is a value of the call too, or two objects share it.
        """
        for state in states:
            if id(state) in self._numbers:
                raise Refusal("its state is another value of the call too, and would arrive as a copy; pass a copy")
            self._numbers[id(state)] = _STATE
            self._keep.append(state)

    def hold(self, value: object) -> None:
        """Keep a temporary value alive, so that no other object gets its id."""
        self._keep.append(value)

    # --- Policy ---

    def name(self, cls: type) -> str:
        """Return the name of a class that the gate admits.

        Raises:
            Refusal: The gate does not admit it.
        """
        name = self._names.get(id(cls))
        if name is None:
            try:
                name = self.gate.class_name(cls)
            except NotDeferrable as error:
                fact, _, remedy = str(error).rpartition("; ")
                opens = error.reason in {"policy", "metaclass"}  # a library's object needs more than that to be carried
                raise Refusal(f"{fact}; pass an id, or {remedy}" if opens else str(error)) from error
            self._names[id(cls)] = name
            self._keep.append(cls)
        return name

    def name_definer(self, cls: type) -> None:
        """Ask for a class whose hook runs, for an object of a class derived from it. Raises ``Refusal`` as ``name`` does."""
        self.name(cls)

    def note_hash(self, definers: Iterable[type]) -> None:
        """Ask the gate about the classes from which a class inherits ``__hash__`` or ``__eq__``, as the decoder does."""
        for definer in definers:
            if self.keyed:
                self.name(definer)
            else:
                self._hashing[id(definer)] = definer


class _LoneEncoder(Encoder):
    """Encodes set members by themselves. Those of one call may hold as many values as the call, together."""

    __slots__ = ()

    def share(self, names: dict[int, str], keep: list[object], alone: dict[int, bytes], alone_items: list[int]) -> Self:
        """Use what the encoder of the call knows of classes and set members."""
        self._names, self._keep, self._alone, self._alone_items = names, keep, alone, alone_items
        return self

    def add(self, items: int) -> None:
        """Count values of all set members. Raises ``Refusal`` over the limit."""
        super().add(items)
        self._alone_items[0] += items
        if self._alone_items[0] > self.limits.items:
            raise OverLimit("too many values are in members of sets")
