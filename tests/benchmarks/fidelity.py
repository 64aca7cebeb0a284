"""Ordinary values through serializers of task queues: exact, changed or refused.

Run from the repository root: ``python -m tests.benchmarks.fidelity``. Peers that are not installed are
left out: kombu (Celery's JSON), msgpack, jsonpickle, orjson. Exact means equal, of the same types, with
the same sharing; changed means that the other side gets something else and nobody is told.
"""

import json
import pickle
import re
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from ipaddress import ip_address
from pathlib import PurePosixPath
from uuid import UUID
from zoneinfo import ZoneInfo

from tests.zoo import values as zoo
from tests.zoo.exactly import assert_exact, carry_one


def shared_list():
    inner = [1]
    return [inner, inner]


def shared_in_dict():
    inner = {"a": 1}
    return {"x": inner, "y": [inner]}


def cycle():
    loop = [1]
    loop.append(loop)
    return loop


def tree_with_parents():
    parent = zoo.Chain([])
    parent.next.append(zoo.Chain(parent))
    return parent


VALUES = {
    "int": 42,
    "float": 0.1,
    "str": "naïve 😀",
    "None, True": [None, True],
    "nested list and dict": {"a": [1, {"b": []}]},
    "tuple": (1, 2),
    "dict of tuples": {"a": (1, 2)},
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "int-key dict": {1: "a"},
    "mixed-key dict": {1: "a", "1": "b"},
    "tuple-key dict": {(1, 2): "a"},
    "bytes": b"\x00\xff",
    "bytearray": bytearray(b"x"),
    "int beyond 2**64": 2**70,
    "nan": float("nan"),
    "inf": float("inf"),
    "-0.0": -0.0,
    "complex": 1 + 2j,
    "lone surrogate": "a\ud800",
    "naive datetime": datetime(2026, 1, 1, 12),
    "utc datetime": datetime(2026, 1, 1, tzinfo=UTC),
    "zone datetime, fold": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Paris")),
    "date": date(2026, 1, 1),
    "time": time(1, 2),
    "timedelta": timedelta(days=1, microseconds=1),
    "Decimal": Decimal("1.10"),
    "Fraction": Fraction(1, 3),
    "UUID": UUID(int=5),
    "Path": PurePosixPath("a/b"),
    "IP address": ip_address("10.0.0.1"),
    "range": range(5),
    "pattern": re.compile("a+"),
    "Enum": zoo.Color.RED,
    "IntEnum": zoo.Level.HIGH,
    "StrEnum": zoo.Mode.FAST,
    "Flag": zoo.Perm.R | zoo.Perm.X,
    "namedtuple": zoo.Point(1, 2),
    "dataclass": zoo.Money(Decimal("1.5")),
    "slotted dataclass": zoo.Slotted(1),
    "pydantic model": zoo.FrozenModel(a=2),
    "attrs object": zoo.AttrsSlotted(1),
    "OrderedDict": OrderedDict(b=1, a=2),
    "defaultdict": defaultdict(list, a=[1]),
    "deque": deque([1], 3),
    "Counter": Counter("aab"),
    "str subclass": zoo.MyStr("x"),
    "exception": ValueError("x", 1),
    "function": zoo.top,
    "class": zoo.Order,
    "shared list": shared_list(),
    "shared in dict": shared_in_dict(),
    "cycle": cycle(),
    "tree with parents": tree_with_parents(),
    "dict that looks like a tag": {"$ref": 0},
    "dict that looks like kombu's": {"__type__": "uuid", "__value__": {"hex": "0" * 32}},
    "dict that looks like jsonpickle's": {"py/tuple": [1]},
}


def peers():
    """Return what takes a value to the other side, by name of the library."""
    found = {
        "safedefer": carry_one,
        "pickle": lambda value: pickle.loads(pickle.dumps(value)),
        "json": lambda value: json.loads(json.dumps(value)),
    }

    def offer(name, module, make):
        try:
            found[name] = make(import_module(module))
        except ImportError:
            print(f"{name} is not installed", file=sys.stderr)

    offer("kombu json", "kombu.utils.json", lambda m: lambda value: m.loads(m.dumps(value)))
    offer("msgpack", "msgpack", lambda m: lambda value: m.unpackb(m.packb(value), strict_map_key=False))
    offer("orjson", "orjson", lambda m: lambda value: m.loads(m.dumps(value)))
    offer("jsonpickle", "jsonpickle", lambda m: lambda value: m.decode(m.encode(value)))
    return found


def judge(carry, value):
    """Return exact, changed or refused."""
    try:
        arrived = carry(value)
    except Exception:
        return "refused"
    try:
        assert_exact(value, arrived)
    except Exception:
        return "changed"
    return "exact"


def main():
    libraries = peers()
    totals = {name: Counter() for name in libraries}
    print(f"{'':34}" + "".join(f"{name:>12}" for name in libraries))
    for label, value in VALUES.items():
        verdicts = {name: judge(carry, value) for name, carry in libraries.items()}
        for name, verdict in verdicts.items():
            totals[name][verdict] += 1
        print(f"{label:34}" + "".join(f"{verdict:>12}" for verdict in verdicts.values()))
    for verdict in ("exact", "changed", "refused"):
        print(f"{verdict + f' of {len(VALUES)}':34}" + "".join(f"{totals[name][verdict]:>12}" for name in libraries))
    return totals


if __name__ == "__main__":
    main()
