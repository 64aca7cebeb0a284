"""The whole path, from a call to its token and from the token to the call, against unsigned and signed pickles.

Run from the repository root, in a virtual environment that also has the peers:

    pip install '.[test]' appengine-python-standard itsdangerous
    python -m tests.benchmarks.bench_path

Ours: reference, policy, signature check, encode, sign; then verify, claims, policy, resolve, decode,
bind, call. Theirs: Google's own ``deferred.serialize`` and ``deferred.run``, which sign nothing, and for
bytes also pickle with ``itsdangerous.Signer``. Rounds are interleaved and the fastest round of each counts:
noise only ever adds time. The figure is the ratio.
"""

import os
import pickle
import sys
import timeit

from tests.benchmarks.bench_codec import Customer, workloads

TARGETS = {"w1 small": 4.0, "w2 typical": 3.75, "w3 rows": 2.5, "w4 bytes": 4.0}


def task(*args, **kwargs):
    """What every workload calls."""


def contestants(args, kwargs):
    """Return, by name, a pair of actions: call to bytes, bytes to call."""
    from google.appengine.ext.deferred import deferred as google
    from itsdangerous import Signer

    import safedefer
    from tests.benchmarks.bench_path import task

    app = safedefer.App(
        keyring=safedefer.Keyring(safedefer.Key("bench", os.urandom(32))),
        policy=safedefer.Policy("tests.benchmarks.bench_path", "tests.benchmarks.bench_codec"),
        queue="memory://",
    )
    signer = Signer(os.urandom(32), digest_method=__import__("hashlib").sha256)

    def unsign(data):
        function, positional, keywords = pickle.loads(signer.unsign(data))
        return function(*positional, **keywords)

    return {
        "safedefer": (lambda: app.serialize(task, *args, **kwargs), app.run),
        "google": (lambda: google.serialize(task, *args, **kwargs), google.run),
        "signed pickle": (lambda: signer.sign(pickle.dumps((task, args, kwargs))), unsign),
    }


def measure(args, kwargs, rounds=25):
    """Return, by name, the fastest time of both halves in microseconds."""
    best = {}
    found = contestants(args, kwargs)
    data = {name: serialize() for name, (serialize, _) in found.items()}
    timers = {
        (name, half): timeit.Timer(action)
        for name, (serialize, run) in found.items()
        for half, action in (("defer", serialize), ("run", lambda run=run, name=name: run(data[name])))
    }
    numbers = {key: max(1, timer.autorange()[0] // 20) for key, timer in timers.items()}
    for _ in range(rounds):
        for key, timer in timers.items():
            best[key] = min(best.get(key, float("inf")), timer.timeit(numbers[key]) / numbers[key])
    return {key: seconds * 1e6 for key, seconds in best.items()}


def main():
    print(
        f"{'':12}{'defer us':>10}{'run us':>10}{'google us':>11}{'ratio':>8}{'signed us':>11}{'ratio':>8}{'target':>8}"
    )
    for name, (args, kwargs) in workloads(Customer).items():
        best = measure(args, kwargs)
        ours = best["safedefer", "defer"] + best["safedefer", "run"]
        google = best["google", "defer"] + best["google", "run"]
        signed = best["signed pickle", "defer"] + best["signed pickle", "run"]
        judged = ours / (signed if name == "w4 bytes" else google)
        verdict = "" if judged <= TARGETS[name] else "  MISSED"
        print(
            f"{name:12}{best['safedefer', 'defer']:10.1f}{best['safedefer', 'run']:10.1f}{google:11.1f}{ours / google:8.2f}"
            f"{signed:11.1f}{ours / signed:8.2f}{TARGETS[name]:8.2f}{verdict}"
        )


if __name__ == "__main__":
    sys.exit(main())
