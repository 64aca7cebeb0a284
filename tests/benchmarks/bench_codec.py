"""The codec alone against pickle: encode with its dump, parse with its decode, on four workloads.

Run from the repository root: ``python -m tests.benchmarks.bench_codec``. Rounds of the contestants are
interleaved, and the fastest round counts: noise only ever adds time. Times are in microseconds.
"""

import dataclasses
import os
import pickle
import sys
import timeit
from datetime import UTC, datetime
from decimal import Decimal
from uuid import UUID

import jiter
from pydantic_core import to_json

from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.policy import Policy
from safedefer.refs import UNBOUND

CODEC = TypedCodec()
POLICY = Policy(__name__ if __name__ != "__main__" else "tests.benchmarks.bench_codec")


@dataclasses.dataclass
class Customer:
    id: int
    name: str
    tags: list[str]


def workloads(customer=Customer):
    typical = {
        "user": {"name": "Ann", "roles": ["a", "b"], "active": True},
        "scores": [i * 0.5 for i in range(20)] + [f"item-{i}" for i in range(20)],
    }
    when = datetime(2026, 11, 22, 7, 27, 19, 123456, tzinfo=UTC)
    rows = [{"id": i, "name": f"user-{i}", "score": i / 7, "active": i % 2 == 0, "note": None} for i in range(2000)]
    return {
        "w1 small": (("user-123", 20), {"notify": True}),
        "w2 typical": (
            (
                when,
                UUID("12345678-1234-5678-1234-567812345678"),
                Decimal("19.99"),
                typical,
                customer(7, "Ann", ["x", "y"]),
            ),
            {},
        ),
        "w3 rows": ((rows,), {}),
        "w4 bytes": ((os.urandom(65536),), {}),
    }


def encode(args, kwargs):
    call = CODEC.encode(CallData(UNBOUND, args, kwargs), POLICY)
    return to_json({"args": call.args, "kwargs": call.kwargs})


def decode(text):
    claims = jiter.from_json(text, allow_inf_nan=False, catch_duplicate_keys=True)
    return CODEC.decode(CallData(UNBOUND, claims["args"], claims["kwargs"]), POLICY, text=text)


def fastest(actions, rounds=15):
    """Return the fastest time of each action, in microseconds; rounds interleaved."""
    numbers = {name: max(1, timeit.Timer(action).autorange()[0] // 20) for name, action in actions.items()}
    best = dict.fromkeys(actions, float("inf"))
    for _ in range(rounds):
        for name, action in actions.items():
            best[name] = min(best[name], timeit.timeit(action, number=numbers[name]) / numbers[name])
    return {name: time * 1e6 for name, time in best.items()}


def main():
    from tests.benchmarks.bench_codec import Customer as Importable

    print(
        f"{'':12}{'encode':>10}{'codec':>10}{'dumps':>10}{'ratio':>7}{'decode':>10}{'codec':>10}{'loads':>10}{'ratio':>7}"
    )
    for name, (args, kwargs) in workloads(Importable).items():
        text = encode(args, kwargs)
        data = pickle.dumps((args, kwargs), 2)
        claims = jiter.from_json(text)
        tree = CallData(UNBOUND, claims["args"], claims["kwargs"])
        times = fastest(
            {
                "encode": lambda: encode(args, kwargs),
                "encode only": lambda: CODEC.encode(CallData(UNBOUND, args, kwargs), POLICY),
                "dumps": lambda: pickle.dumps((args, kwargs), 2),
                "decode": lambda: decode(text),
                "decode only": lambda: CODEC.decode(tree, POLICY, text=text),
                "loads": lambda: pickle.loads(data),
            }
        )
        print(
            f"{name:12}{times['encode']:10.1f}{times['encode only']:10.1f}{times['dumps']:10.1f}"
            f"{times['encode'] / times['dumps']:7.2f}{times['decode']:10.1f}{times['decode only']:10.1f}"
            f"{times['loads']:10.1f}{times['decode'] / times['loads']:7.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
