"""Whether the time of the MAC check tells where a forged MAC first differs: Welch's t-test.

    python -m tests.benchmarks.timing_mac [samples]

Two forged MACs, one wrong in its first character and one in its last, are checked in random order by the same call.
The slowest tenth is dropped from both (interrupts), as dudect does. A comparison that ends early shows a |t| in
the hundreds: the last line is that control. Exits with 1 if |t| is 4.5 or more.
"""

import random
import statistics
import sys
import time

from safedefer.errors import RejectedTask
from safedefer.token import Token
from tests.adversarial.forge import keyring, mint

LIMIT = 4.5


def check(ring, token):
    try:
        ring.verify(token)
    except RejectedTask:
        return
    raise AssertionError("a forged token was accepted")


def naive(expected, given):
    """What must not be done."""
    return all(a == b for a, b in zip(expected, given, strict=True))


def sample(functions, count):
    """Return nanoseconds of each function, called in random order."""
    source, clock = random.Random(1), time.perf_counter_ns
    times = ([], [])
    for _ in range(count):
        which = source.getrandbits(1)
        function = functions[which]
        began = clock()
        function()
        times[which].append(clock() - began)
    return times


def welch(first, second):
    """Return Welch's t of the two samples without their slowest tenth."""
    first, second = (sorted(times)[: len(times) * 9 // 10] for times in (first, second))
    spread = statistics.variance(first) / len(first) + statistics.variance(second) / len(second)
    return (statistics.fmean(first) - statistics.fmean(second)) / spread**0.5


def main(count):
    ring, good = keyring(), mint()
    mac = good[-43:]
    early, late = (
        good[:-43] + changed for changed in (_other(mac[0]) + mac[1:], mac[:-2] + _other(mac[-2]) + mac[-1:])
    )
    tokens = [Token.parse(token, max_bytes=10_000) for token in (early, late)]
    sample([lambda: check(ring, tokens[0]), lambda: check(ring, tokens[1])], 20_000)
    t = welch(*sample([lambda: check(ring, tokens[0]), lambda: check(ring, tokens[1])], count))
    print(f"first or last character: t = {t:+.2f} over {count} samples; limit {LIMIT}")

    unknown = Token.parse(b"x" * len(tokens[0].header) + good[len(tokens[0].header) :], max_bytes=10_000)
    difference = sample([lambda: check(ring, tokens[0]), lambda: check(ring, unknown)], 20_000)
    known, none = (statistics.median(times) for times in difference)
    print(f"a known and an unknown kid: {known:.0f} ns and {none:.0f} ns (medians)")

    control = welch(*sample([lambda: naive(mac, early[-43:]), lambda: naive(mac, late[-43:])], 20_000))
    print(f"control, a comparison that ends early: t = {control:+.2f}")
    return abs(t) < LIMIT < abs(control)


def _other(character):
    return b"A" if bytes([character]) != b"A" else b"B"


if __name__ == "__main__":
    sys.exit(0 if main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000) else 1)
