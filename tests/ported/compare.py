"""Whether values arrived as they were: by type, state and sharing."""

import re
from types import FunctionType, MethodType

from google.cloud import ndb

_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray, type, FunctionType, re.Pattern)


def state(value, seen=None):
    """Return what there is of a value, as types and texts. What is met again is the number of its first place."""
    seen = {} if seen is None else seen
    if isinstance(value, _ATOMS):
        return type(value), value if isinstance(value, type | FunctionType) else repr(value)
    if isinstance(value, ndb.Key):
        return ndb.Key, value.flat(), value.project(), value.namespace(), value._key.database
    if not isinstance(value, tuple | frozenset) and id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if isinstance(value, MethodType):
        return MethodType, value.__func__, state(value.__self__, seen)
    parts = [type(value)]
    if isinstance(value, dict):
        parts.append([(state(key, seen), state(each, seen)) for key, each in value.items()])
    elif isinstance(value, set | frozenset):
        parts.append(sorted((state(each, {}) for each in value), key=repr))
    elif isinstance(value, list | tuple) or hasattr(value, "maxlen"):
        parts.append([state(each, seen) for each in value])
    elif isinstance(value, BaseException):
        parts.append(state(value.args, seen))
    if hasattr(value, "__dict__"):
        # The order in which ndb stored its values says nothing, and keys cache their reference.
        parts.append(
            sorted(((name, state(each, seen)) for name, each in vars(value).items()), key=lambda pair: pair[0])
        )
    if len(parts) == 1:
        parts.append(repr(value))
    return tuple(parts)
