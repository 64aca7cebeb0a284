"""Target: arguments that a holder of a key wrote, through the typed codec."""

from contextlib import suppress

import jiter

from fuzz import fuzz_claims
from fuzz.audit import nothing_happens
from fuzz.common import POLICY
from fuzz.harness import main
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import RejectedTask, UnencodableArgument
from safedefer.refs import UNBOUND

CODEC = TypedCodec()


def one_input(data: bytes) -> None:
    """Decode a JSON value as an argument; what arrives can be sent again, or is refused again."""
    try:
        tree = jiter.from_json(data, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError:
        return
    with nothing_happens():
        try:
            values = CODEC.decode(CallData(UNBOUND, [tree], {}), POLICY, text=data)
        except RejectedTask:
            return
        with suppress(UnencodableArgument):
            CODEC.encode(values, POLICY)


def seeds() -> list[bytes]:
    """Return the arguments of the vectors."""
    found = []
    for payload in fuzz_claims.seeds():
        start, end = payload.find(b'"args":['), payload.find(b'],"kwargs"')
        if 0 <= start < end - 8:
            found.append(payload[start + 8 : end])
    return found


if __name__ == "__main__":
    main("typed", one_input, seeds())
