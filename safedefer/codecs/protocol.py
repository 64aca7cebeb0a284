"""The interface of a codec: arguments to JSON and back."""

from __future__ import annotations

from typing import Protocol

from safedefer.codecs.shared import Values
from safedefer.policy_cache import Gate


class Codec(Protocol):
    """Turns the arguments of a call into JSON and back. An ``App`` has one for each ``cty``."""

    def encode(self, call: Values, gate: Gate) -> Values:
        """Return trees of JSON. Raises ``UnencodableArgument``."""
        ...

    def write(self, call: Values, gate: Gate) -> Values:
        """Return trees of JSON, or JSON text that ``claims.write_json`` copies. Raises ``UnencodableArgument``."""
        ...

    def decode(self, call: Values, gate: Gate, text: bytes, canonical: bool = False) -> Values:  # noqa: FBT002  # a keyword costs
        """Return the values. Raises a ``RejectedTask``."""
        ...
