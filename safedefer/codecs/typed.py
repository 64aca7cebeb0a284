"""The typed codec: the values of a call to trees of JSON and back, exactly or not at all.

An argument arrives equal, of the same type and with the same sharing, or ``encode`` raises and names
its path. The codec pickles nothing and flattens nothing. The only code of users that it runs are hooks of classes
that the policy admits. ``schema/README.md`` describes the format for writers in any language.
"""

from __future__ import annotations

from gc import get_referents
from typing import Any, Final

import orjson

from safedefer.claims import SHORT
from safedefer.codecs.decoder import Decoder
from safedefer.codecs.encoder import Encoder
from safedefer.codecs.fast_path import (
    DOLLAR,
    are_few_scalars,
    is_canonical_plain,
    is_plain,
    may_break_limits,
    may_hold_tags,
    written_plainly,
)
from safedefer.codecs.obstacles import find_obstacles, sentence, walk
from safedefer.codecs.registry import REGISTRY, TypeRegistry
from safedefer.codecs.shared import CallData, Json, Obstacles, Refusal, Values, VersionSkew
from safedefer.codecs.tags import containers, exceptions, objects, patterns, scalars, times
from safedefer.errors import InvalidArguments, UnencodableArgument
from safedefer.options import Limits
from safedefer.policy_cache import Gate
from safedefer.refs import UNBOUND

__all__ = ["CallData", "TypedCodec"]

_ENCODERS: Final[dict[type, Any]] = {
    **scalars.ENCODERS,
    **times.ENCODERS,
    **patterns.ENCODERS,
    **containers.ENCODERS,
    **exceptions.ENCODERS,
    **objects.ENCODERS,
}
_DECODERS: Final[dict[str, Any]] = {
    **scalars.DECODERS,
    **times.DECODERS,
    **patterns.DECODERS,
    **containers.DECODERS,
    **objects.DECODERS,
}

# A bytearray is shared, and so counted.
_SCALAR_TAGS: Final = {
    tag: decode for each in (scalars, times, patterns) for tag, decode in each.DECODERS.items() if tag != "$bytearray"
}
_SCALAR_ENCODERS: Final = frozenset(
    encode for each in (scalars, times, patterns) for kind, encode in each.ENCODERS.items() if kind is not bytearray
)

# The parser of the claims allows 200 nested brackets, and the claims take two of them.
_MAX_BRACKETS: Final = 198
_BRACKETS_PER_VALUE: Final = 3


class TypedCodec:
    """Carries values by the tags of the wire format.

    Args:
        limits: ``depth``, ``items`` and ``int_digits``, kept on both ends.
        registry: Types of third parties.
    """

    content_type: Final = "typed"

    def __init__(self, *, limits: Limits = Limits(), registry: TypeRegistry = REGISTRY) -> None:  # noqa: B008 - frozen
        self._limits = limits
        self._registry = registry
        # A value takes at least two bytes of text.
        self._short = min(SHORT, 2 * limits.items)

    def encode(self, call: Values, gate: Gate) -> Values:
        """Return the call as trees of JSON. Plain values are returned without a copy.

        Args:
            call: The values; ``bound`` is ``UNBOUND`` if there is no object.
            gate: Names the classes and callables among the values.

        Returns:
            The trees: exact dict, list, str, int, float, bool and None; ``bound`` may stay ``UNBOUND``.

        Raises:
            UnencodableArgument: A value cannot arrive unchanged. ``path`` names it.
        """
        bound, positional, kwargs = call
        args = list(positional)
        if bound is UNBOUND and are_few_scalars(args, kwargs, self._limits):
            return CallData(UNBOUND, args, kwargs)
        top = [kwargs, *args] if bound is UNBOUND else [kwargs, bound, *args]
        if is_plain(top, self._limits):
            return CallData(bound, args, kwargs)
        return self._walk(call, gate)

    def write(self, call: Values, gate: Gate) -> Values:
        """As ``encode``, for ``write_json``: plain ``args`` and ``kwargs`` may be JSON fragments.

        Raises:
            UnencodableArgument: As ``encode``.
        """
        bound, args, kwargs = call
        if bound is not UNBOUND:
            return self.encode(call, gate)
        if are_few_scalars(args, kwargs, self._limits):
            return call
        texts = written_plainly(list(args), kwargs, self._limits)
        if texts is None:
            return self._walk(call, gate)
        return CallData(UNBOUND, orjson.Fragment(texts[0]), orjson.Fragment(texts[1]))

    def _walk(self, call: Values, gate: Gate) -> Values:
        enc = Encoder(gate, self._limits, self._registry, _ENCODERS, objects.encode_other, _SCALAR_ENCODERS)
        at = [""]
        try:
            out = walk(enc, call, at)
        except Refusal as refusal:
            refusal.trail.append(at[0])
            raise UnencodableArgument(sentence(refusal), path=refusal.path) from (refusal.__cause__ or refusal)
        except (RecursionError, RuntimeError) as error:
            # The caller's stack was nearly full, or another thread changed a value meanwhile.
            raise UnencodableArgument(
                f"{'$' + at[0]}: the values cannot be read now ({type(error).__name__}); "
                "defer from a less deep call, and do not change values meanwhile",
                path="$" + at[0],
            ) from error
        if self._limits.depth * _BRACKETS_PER_VALUE > _MAX_BRACKETS:
            _check_brackets([*out])
        return out

    def obstacles(self, call: Values, gate: Gate) -> Obstacles:
        """Return all that keeps the values of a call from being encoded. Runs no hook of a class that the gate refuses.

        Args:
            call: As for ``encode``.
            gate: As for ``encode``.

        Returns:
            The patterns that the policy lacks, and what else is refused, up to a number.
        """
        return find_obstacles(
            call, gate, self._limits, self._registry, (_ENCODERS, objects.encode_other, _SCALAR_ENCODERS)
        )

    def decode(self, call: Values, gate: Gate, text: bytes, canonical: bool = False) -> Values:  # noqa: FBT002
        """Return the values of trees of JSON.

        Args:
            call: The trees as jiter parsed them, duplicate names refused; ``bound`` may be ``UNBOUND``.
            gate: Finds the classes and callables that the trees name.
            text: The JSON text that the trees were parsed from; it may hold more than these.
            canonical: Whether ``claims.read_claims`` found the text canonical.

        Returns:
            The values. Plain trees are returned without a copy.

        Raises:
            InvalidArguments: A tree is malformed, or over a limit. ``path`` names it.
            RejectedTask: The gate does not admit or find what a tree names.
        """
        bound, trees, named = call
        # The commonest case first, a short text of scalars: the garbage collector sees no referents in them.
        if (
            canonical
            and bound is UNBOUND
            and len(text) <= self._short
            and not get_referents(*trees, *named.values())
            and DOLLAR not in text
        ):
            return call
        if canonical and is_canonical_plain(call, text, self._limits):
            return call
        if not may_hold_tags(text):
            if not may_break_limits(text, self._limits):
                return call
            top = [named, *trees] if bound is UNBOUND else [named, bound, *trees]
            if is_plain(top, self._limits):
                return call
        # Canonical text spells a name in one way.
        refs = not canonical or b'"$ref"' in text
        dec = Decoder(gate, self._limits, self._registry, _DECODERS, objects.decode_other, _SCALAR_TAGS, has_refs=refs)
        at = ""
        try:
            if bound is not UNBOUND:
                at = ".bound"
                bound = dec.value(bound, 1)
            args: list[Any] = []
            kwargs: dict[str, Any] = {}
            at = ".args"
            dec.fill(args, trees, 1)
            at = ".kwargs"
            dec.members(kwargs, named, 1)
        except Refusal as refusal:
            refusal.trail.append(at)
            skew = isinstance(refusal, VersionSkew)
            raise InvalidArguments(f"{refusal.path}: {refusal.why}", path=refusal.path, skew=skew) from (
                refusal.__cause__ or refusal
            )
        except RecursionError as error:
            raise InvalidArguments(f"{'$' + at}: the stack is too deep here", path="$" + at) from error
        return CallData(bound, args, kwargs)


def _check_brackets(trees: list[Json]) -> None:
    """Refuse trees that nest deeper than the parser of the claims reads.

    Raises:
        UnencodableArgument: They do.
    """
    level = trees
    for _ in range(_MAX_BRACKETS):
        inner = [each for each in level if type(each) is list or type(each) is dict]
        if not inner:
            return
        level = [each for tree in inner for each in (tree.values() if type(tree) is dict else tree)]
    raise UnencodableArgument(
        f"$: the values nest deeper than {_MAX_BRACKETS} JSON brackets; pass flatter values, or an id", path="$"
    )
