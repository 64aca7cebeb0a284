"""The walk that turns trees of JSON into values. Tag families add what they know by tag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, cast

from safedefer.claims import Limits
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.shared import SAFE_INT, Json, Refusal, step
from safedefer.errors import NotDeferrable, PolicyViolation
from safedefer.policy import Gate

Handler: TypeAlias = "Callable[[Decoder, Any, int], object]"

#: Holds the number of an object that does not exist yet.
_PENDING: Final = object()


class Decoder:
    """The state of decoding one call.

    Args:
        gate: Finds classes and callables.
        limits: Bounds.
        registry: Types of third parties.
        handlers: What decodes the payload of each tag.
        fallback: What decodes ``(tag, payload)`` of all others.
    """

    __slots__ = (
        "_admitted",
        "_deepest",
        "_fallback",
        "_handlers",
        "_items",
        "_shared",
        "_unfolded",
        "folded",
        "gate",
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
    ) -> None:
        self.gate = gate
        self.limits = limits
        self.registry = registry
        self._handlers = handlers
        self._fallback = fallback
        self._items = 0
        self._shared: list[object] = []
        #: By number, the values below what is finished, and the levels of them.
        self._unfolded: dict[int, tuple[int, int]] = {}
        #: The depth of the deepest value since the enclosing one began.
        self._deepest = 0
        #: Numbers of unfinished objects whose hash their class computes.
        self.open: set[int] = set()
        #: How many set members and dict keys enclose the value.
        self.keyed = 0
        self.patterns = 0
        #: Characters in the ranges of case-insensitive patterns.
        self.folded = 0
        self._admitted: set[int] = set()

    def value(self, tree: Json, depth: int) -> Any:
        """Return the value of one tree, ``depth`` values deep.

        Raises:
            Refusal: It is malformed.
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
        number, items, deepest = len(self._shared), self._items, self._deepest
        self._deepest = depth
        if kind is list:
            value: Any = []
            self._shared.append(value)
            self.fill(value, tree, depth + 1)
        else:
            value = self._object(tree, depth)
        # Of a tag that is not shared itself the number is that of what is inside it, which has ended before.
        if len(self._shared) > number and number not in self._unfolded:
            self._unfolded[number] = self._items - items, self._deepest - depth
        self._deepest = max(deepest, self._deepest)
        return value

    def _object(self, tree: dict[str, Json], depth: int) -> object:
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
                # The conditions of `value`: most members are plain, and a call costs more than the question.
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
        """Return the value of a payload's part that must be text, plain or ``$str``."""
        value = self.value(tree, depth) if type(tree) is dict and "$str" in tree else tree
        if type(value) is not str:
            raise Refusal("here must be a string")
        return value

    def add(self, items: int) -> None:
        """Count values. Raises ``Refusal`` when there are too many."""
        self._items += items
        if self._items > self.limits.items:
            raise Refusal(f"there are more than {self.limits.items} values, shared ones counted wherever they are")

    # --- Sharing ---

    def share(self, value: object) -> int:
        """Give the next number to a mutable container or object, and return it."""
        self._shared.append(value)
        return len(self._shared) - 1

    def reserve(self) -> int:
        """Take the next number for an object that cannot be made yet."""
        return self.share(_PENDING)

    def settle(self, number: int, value: object) -> None:
        """Say which object has a number that was reserved."""
        self._shared[number] = value

    def shared(self, number: Json, depth: int) -> object:
        """Return what has a number, and count all that is below it once more: whoever walks it walks that again.

        Raises:
            Refusal: Nothing has it yet, its hash would be computed too early, or there are too many values or levels.
        """
        if type(number) is not int or not 0 <= number < len(self._shared) or self._shared[number] is _PENDING:
            raise Refusal("$ref is the number of an earlier value")
        if self.keyed and number in self.open:
            raise Refusal("a set member or dict key contains itself")
        items, levels = self._unfolded.get(number, (0, 0))  # what encloses the reference has not ended: a cycle
        self.add(items)
        self._deepest = max(self._deepest, depth + levels)
        if self._deepest > self.limits.depth:
            raise Refusal(f"values nest deeper than {self.limits.depth}")
        value = self._shared[number]
        if self.keyed:
            self.check_hash(type(value))
        return value

    # --- Policy ---

    def admit(self, cls: type) -> None:
        """Ask the gate about a class whose code is about to run though no name in the token says so.

        Raises:
            PolicyViolation: The gate does not admit it.
        """
        if id(cls) in self._admitted:
            return
        try:
            self.gate.class_name(cls)
        except NotDeferrable as error:
            raise PolicyViolation(f"a class inherits from one that may not run: {error}") from error
        self._admitted.add(id(cls))

    def check_hash(self, cls: type) -> None:
        """Ask the gate about the classes whose ``__hash__`` or ``__eq__`` objects of a class inherit."""
        plan = self.registry.plans.get(id(cls))
        if plan is not None:
            for definer in plan.hash_definers:
                self.admit(definer)


# --- Shapes of payloads ---------------------------------------------------------------------------


def array(payload: Json, *, least: int = 0, most: int | None = None) -> list[Json]:
    """Return the payload, an array of a length. Raises ``Refusal``."""
    if type(payload) is not list or len(payload) < least or (most is not None and len(payload) > most):
        raise Refusal("here must be an array of the right length")
    return payload


def record(payload: Json) -> dict[str, Json]:
    """Return the payload, an object. Raises ``Refusal``."""
    if type(payload) is not dict:
        raise Refusal("here must be an object")
    return cast("dict[str, Json]", payload)


def integer(payload: Json, least: int, most: int) -> int:
    """Return the payload, an integer of a range. Raises ``Refusal``."""
    if type(payload) is not int or not least <= payload <= most:
        raise Refusal("here must be an integer of the right range")
    return payload


def string(payload: Json) -> str:
    """Return the payload, a plain string. Raises ``Refusal``."""
    if type(payload) is not str:
        raise Refusal("here must be a string")
    return payload
