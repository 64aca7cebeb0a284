"""Whether the time of the MAC check tells where a forged MAC first differs: Welch's t-test.

    python -m tests.benchmarks.timing_mac [samples]

Two forged MACs, one wrong in its first character and one in its last, are checked in random order by the same call. Of each
there are many copies, all over the memory: where an object lies is worth some nanoseconds, whatever is in it.
The slowest tenth is dropped from both (interrupts), as dudect does. A comparison that ends early shows a |t| in
the hundreds: the last line is that control. Exits with 1 if |t| is 4.5 or more.
"""

import functools
import random
import statistics
import sys
import time

from safedefer.errors import RejectedTask
from safedefer.token import Token, decode_segment, encode_segment
from tests.adversarial.forge import keyring, mint

LIMIT = 4.5
COPIES = 500


def check(ring, token):
    try:
        ring.verify(token)
    except RejectedTask:
        return
    raise AssertionError("a forged token was accepted")


def naive(expected, given):
    """What must not be done."""
    return all(a == b for a, b in zip(expected, given, strict=True))


def sample(function, pools, count):
    """Return nanoseconds of one function with members of two pools, in random order."""
    source, clock = random.Random(), time.perf_counter_ns
    members = [(which, member) for which, pool in enumerate(pools) for member in pool]
    times = ([], [])
    for _ in range(count):
        # Both kinds come by the same way: two closures differ by nanoseconds, whatever they are given.
        which, member = source.choice(members)
        began = clock()
        function(member)
        times[which].append(clock() - began)
    return times


def welch(first, second):
    """Return Welch's t of the two samples without their slowest tenth."""
    first, second = (sorted(times)[: len(times) * 9 // 10] for times in (first, second))
    spread = statistics.variance(first) / len(first) + statistics.variance(second) / len(second)
    return (statistics.fmean(first) - statistics.fmean(second)) / spread**0.5


def copies(*tokens):
    """Return many copies of each of some tokens, made in random order: every other one would be aligned alike."""
    made = [[] for _ in tokens]
    order = [*range(len(tokens))] * COPIES
    random.shuffle(order)
    for which in order:
        made[which].append(Token.parse(bytes(bytearray(tokens[which])), max_bytes=10_000))
    return made


def main(count):
    good = mint()
    mac = good[-43:]
    early, late = (
        good[:-43] + changed for changed in (_other(mac[0]) + mac[1:], mac[:-2] + _other(mac[-2]) + mac[-1:])
    )
    forged, checked = copies(early, late), functools.partial(check, keyring())
    sample(checked, forged, 20_000)
    t = welch(*sample(checked, forged, count))
    print(f"first or last character: t = {t:+.2f} over {count} samples; limit {LIMIT}")

    header, _, rest = early.partition(b".")
    other = encode_segment(decode_segment(header).replace(b'"kid":"', b'"kid":"x')[: len(decode_segment(header))])
    difference = sample(checked, copies(early, other + b"." + rest), 20_000)
    known, none = (statistics.median(times) for times in difference)
    print(f"a known and an unknown kid: {known:.0f} ns and {none:.0f} ns (medians)")

    control = welch(*sample(functools.partial(naive, mac), [[early[-43:]], [late[-43:]]], 20_000))
    print(f"control, a comparison that ends early: t = {control:+.2f}")
    return abs(t) < LIMIT < abs(control)


def _other(character):
    return b"A" if bytes([character]) != b"A" else b"B"


if __name__ == "__main__":
    sys.exit(0 if main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000) else 1)
