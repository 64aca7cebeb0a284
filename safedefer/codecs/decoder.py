"""The walk that turns trees of JSON into values. The modules of ``tags`` decode the payloads of tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypeAlias, cast

from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.shared import SAFE_INT, Json, Refusal, step
from safedefer.errors import NotDeferrable, PolicyViolation
from safedefer.options import Limits
from safedefer.policy_cache import Gate

Handler: TypeAlias = "Callable[[Decoder, Any, int], object]"

#: Stands for an object that has a number and is not made yet.
_PENDING: Final = object()
#: Greater than the number of every object.
_NOTHING_OPEN: Final = 2**63


class Decoder:
    """The state of decoding one call.

    Args:
        gate: Finds classes and callables.
        limits: Bounds of depth, items and digits.
        registry: Types of third parties.
        handlers: Functions that decode payloads, by tag.
        fallback: Decodes the payloads of all other tags.
        scalars: Those of the handlers whose values hold nothing that is shared: nothing is counted for them.
        has_refs: Whether there may be a ``$ref``. If not, what is below each object is not counted: 4 % of a typical run.
    """

    __slots__ = (
        "_admitted",
        "_counts",
        "_deepest",
        "_fallback",
        "_handlers",
        "_hashing",
        "_items",
        "_reached",
        "_scalars",
        "_shared",
        "_unfolded",
        "folded",
        "gate",
        "generics",
        "keyed",
        "limits",
        "open",
        "patterns",
        "registry",
    )

    def __init__(
        self,
        gate: Gate,
        limits: Limits,
        registry: TypeRegistry,
        handlers: dict[str, Handler],
        fallback: Callable[[Decoder, str, Any, int], object],
        scalars: Mapping[str, Handler] = MappingProxyType({}),
        *,
        has_refs: bool = True,
    ) -> None:
        self._counts = has_refs
        self.gate: Gate = gate
        self.limits: Limits = limits
        self.registry: TypeRegistry = registry
        self._handlers = handlers
        self._scalars = scalars
        self._fallback = fallback
        self._items = 0
        self._shared: list[object] = []
        #: For each finished object, by number: the values below it, the levels of them, and the outermost object of ``open``
        #: that a ``$ref`` below it named.
        self._unfolded: dict[int, tuple[int, int, int]] = {}
        #: The depth of the deepest value since the enclosing one began.
        self._deepest = 0
        #: The outermost object of ``open`` that a ``$ref`` named since the enclosing value began.
        self._reached = _NOTHING_OPEN
        #: Numbers of unfinished objects with a hash that their class computes.
        self.open: set[int] = set()
        #: How many set members and dict keys enclose the value.
        self.keyed: int = 0
        self.patterns: int = 0
        #: Generic models that were given new arguments.
        self.generics: int = 0
        #: Characters in the ranges of patterns.
        self.folded: int = 0
        self._admitted: set[int] = set()
        #: Classes whose ``__hash__`` or ``__eq__`` objects outside keys inherit, by id.
        self._hashing: dict[int, type] = {}

    def value(self, tree: Json, depth: int) -> Any:  # noqa: C901 - one branch a type
        """Return the value of one tree, ``depth`` values deep.

        Raises:
            Refusal: The tree is malformed, or over a limit.
        """
        kind = type(tree)
        if kind is str or tree is None or kind is bool:
            return tree
        if kind is int:
            if not -SAFE_INT <= tree <= SAFE_INT:
                raise Refusal("an integer beyond 2**53-1 is written as $int")
            return tree
        if kind is float:
            if tree - tree != 0.0:
                raise Refusal("a number is too large for a float; infinities are written as $float")
            return tree
        if depth > self.limits.depth:
            raise Refusal(f"values nest deeper than {self.limits.depth}")
        if kind is not list and kind is not dict:
            raise Refusal("this is no JSON value")
        if kind is dict and len(tree) == 1:
            (tag,) = tree
            if (handler := self._scalars.get(tag)) is not None:
                return handler(self, tree[tag], depth)
        if not self._counts:
            return self._compound(tree, depth)
        number, items, deepest, reached = len(self._shared), self._items, self._deepest, self._reached
        self._deepest, self._reached = depth, _NOTHING_OPEN
        value = self._compound(tree, depth)
        # If the tag itself has no number, this is the number of a value inside it, which is finished already.
        if len(self._shared) > number and number not in self._unfolded:
            self._unfolded[number] = self._items - items, self._deepest - depth, self._reached
        self._deepest, self._reached = max(deepest, self._deepest), min(reached, self._reached)
        return value

    def _compound(self, tree: Any, depth: int) -> object:
        if type(tree) is list:
            array: list[object] = []
            self._shared.append(array)
            self.fill(array, tree, depth + 1)
            return array
        if len(tree) == 1:
            (tag,) = tree
            if tag[:1] == "$":
                handler = self._handlers.get(tag)
                if handler is not None:
                    return handler(self, tree[tag], depth)
                return self._fallback(self, tag, tree[tag], depth)
        out: dict[str, object] = {}
        self._shared.append(out)
        self.members(out, tree, depth + 1)
        return out

    def fill(self, out: list[object], trees: Sequence[Json], depth: int) -> None:
        """Append the values of the members of an array."""
        self.add(len(trees))
        start = len(out)
        try:
            for tree in trees:
                kind = type(tree)
                # The conditions of `value` again: most members are plain, and a call costs more than the test.
                plain = (
                    kind is str
                    or (kind is int and -SAFE_INT <= tree <= SAFE_INT)
                    or (kind is float and tree - tree == 0.0)
                    or tree is None
                    or kind is bool
                )
                out.append(tree if plain else self.value(tree, depth))
        except Refusal as refusal:
            refusal.trail.append(f"[{len(out) - start}]")
            raise

    def members(self, out: dict[str, object], trees: dict[str, Json], depth: int) -> None:
        """Add the values of the members of an object, none of which may be a tag."""
        self.add(len(trees))
        name = ""
        try:
            for name, tree in trees.items():
                if name[:1] == "$":
                    raise Refusal("a tag stands alone in its object")  # noqa: TRY301 - the path is added below
                kind = type(tree)
                plain = kind is str or (kind is int and -SAFE_INT <= tree <= SAFE_INT) or tree is None or kind is bool
                out[name] = tree if plain else self.value(tree, depth)
        except Refusal as refusal:
            refusal.trail.append(step(name))
            raise

    def items(self, payload: Json, depth: int) -> list[object]:
        """Return the values of a payload that is an array of values."""
        out: list[object] = []
        self.fill(out, array(payload), depth)
        return out

    def key(self, tree: Json, depth: int) -> Any:
        """Return the value of a set member or dict key."""
        self.keyed += 1
        value = self.value(tree, depth)
        self.keyed -= 1
        return value

    def text(self, tree: Json, depth: int) -> str:
        """Return the value of a part of a payload that must be text, plain or ``$str``."""
        value = self.value(tree, depth) if type(tree) is dict and "$str" in tree else tree
        if type(value) is not str:
            raise Refusal("here must be a string")
        return value

    def add(self, items: int) -> None:
        """Count values. Raises ``Refusal`` over the limit."""
        self._items += items
        if self._items > self.limits.items:
            raise Refusal(f"there are more than {self.limits.items} values, shared ones counted wherever they are")

    # --- Sharing ---

    def share(self, value: object) -> int:
        """Give the next number to a mutable container or object, and return it."""
        self._shared.append(value)
        return len(self._shared) - 1

    def reserve(self) -> int:
        """Return the next number, for an object that can be made only later."""
        return self.share(_PENDING)

    def settle(self, number: int, value: object) -> None:
        """Set the object of a reserved number."""
        self._shared[number] = value

    def shared(self, number: Json, depth: int) -> object:
        """Return the object of a number. The values below it count again: code that walks the arguments walks them again.

        Raises:
            Refusal: No object has the number yet, its hash would run too early, or there are too many values or levels.
        """
        if type(number) is not int or not 0 <= number < len(self._shared) or self._shared[number] is _PENDING:
            raise Refusal("$ref is the number of an earlier value")
        if not self._counts:
            raise Refusal("here must be no $ref: nobody counted what is below the earlier values")
        # An enclosing object is unfinished: a cycle.
        items, levels, reached = self._unfolded.get(number, (0, 0, number if number in self.open else _NOTHING_OPEN))
        if self.keyed and reached in self.open:
            raise Refusal("a set member or dict key contains itself, or an object around it that is not finished")
        self._reached = min(reached, self._reached)
        self.add(items)
        self._deepest = max(self._deepest, depth + levels)
        if self._deepest > self.limits.depth:
            raise Refusal(f"values nest deeper than {self.limits.depth}")
        if self.keyed:
            # The hash of an object hashes what is below it, and that may be of any class so far.
            for definer in self._hashing.values():
                self.admit(definer)
        return self._shared[number]

    # --- Policy ---

    def admit(self, cls: type) -> None:
        """Ask the gate about a class whose code is about to run, though the token does not name it.

        Raises:
            PolicyViolation: The gate does not admit the class.
        """
        if id(cls) in self._admitted:
            return
        try:
            self.gate.class_name(cls)
        except NotDeferrable as error:
            raise PolicyViolation(f"a class inherits from one that may not run: {error}") from error
        self._admitted.add(id(cls))

    def note_hash(self, definers: Iterable[type]) -> None:
        """Ask the gate about the classes from which a class inherits ``__hash__`` or ``__eq__``, if its objects are hashed now.

        Outside set members and dict keys they are noted, for ``$ref``.
        """
        for definer in definers:
            if self.keyed:
                self.admit(definer)
            else:
                self._hashing[id(definer)] = definer


def check_callee(gate: Gate, obj: object) -> None:
    """Ask the gate about a value that somebody will call, as of the callable of a task.

    Raises:
        PolicyViolation: The policy, or the key, does not admit it.
    """
    try:
        gate.callable_ref(obj)
    except NotDeferrable as error:
        raise PolicyViolation(f"a value inside the arguments may not be called: {error}") from error


# --- Shapes of payloads ---------------------------------------------------------------------------


def array(payload: Json, *, least: int = 0, most: int | None = None) -> list[Json]:
    """Return the payload, an array of the right length. Raises ``Refusal``."""
    if type(payload) is not list or len(payload) < least or (most is not None and len(payload) > most):
        raise Refusal("here must be an array of the right length")
    return payload


def record(payload: Json) -> dict[str, Json]:
    """Return the payload, an object. Raises ``Refusal``."""
    if type(payload) is not dict:
        raise Refusal("here must be an object")
    return cast("dict[str, Json]", payload)


def integer(payload: Json, least: int, most: int) -> int:
    """Return the payload, an integer in the range. Raises ``Refusal``."""
    if type(payload) is not int or not least <= payload <= most:
        raise Refusal("here must be an integer of the right range")
    return payload


def string(payload: Json) -> str:
    """Return the payload, a plain string. Raises ``Refusal``."""
    if type(payload) is not str:
        raise Refusal("here must be a string")
    return payload
