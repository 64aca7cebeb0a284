"""How many slots one target may hold, so that one that does not answer leaves slots to the others.

It matters only where tasks go to several targets. A target that answers holds three quarters of the slots at most, any
other one half of them; slots that targets hold without answering are taken off before. So a second target that hangs
takes half of what the first one left. Each target may hold one slot in any case: so there is one more for each target that
hangs, and each target that answers finds a slot, however many others hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from safedefer.queues.base import Settlement, Verdict

#: Seconds after its last answer for which a target counts as answering.
ANSWERS_SECONDS: Final = 1.0
#: Seconds between two tasks that are postponed for one target, so that they do not all come back at once.
_SPREAD_SECONDS: Final = 0.01
_MAX_SPREAD: Final = 60.0


def share(slots: int, silent_elsewhere: int, *, answers: bool) -> int:
    """Return the most slots that a target may hold: one at least.

    Args:
        slots: All slots.
        silent_elsewhere: Those that are held by other targets which do not answer.
        answers: Whether the target itself answers.
    """
    left = slots - silent_elsewhere
    return max(1, left * 3 // 4 if answers else left // 2)


class _Target:
    """The deliveries to one target."""

    __slots__ = ("answered", "began", "held", "postponed")

    def __init__(self) -> None:
        self.held = 0
        """Slots."""
        self.began = 0.0
        """When it took the first of them."""
        self.answered = float("-inf")
        """When it last answered."""
        self.postponed = 0
        """Tasks that were postponed since."""


class TargetShares:
    """The slots that each target holds.

    Args:
        slots: All slots.
        clock: Returns seconds that only grow.
    """

    def __init__(self, slots: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = slots
        self._clock = clock
        self._targets: dict[str, _Target] = {}

    def begin(self, address: str) -> None:
        """Note that a delivery takes a slot."""
        target = self._targets.setdefault(address, _Target())
        if not target.held:
            target.began = self._clock()
        target.held += 1

    def end(self, address: str) -> None:
        """Note that a delivery gives its slot back."""
        self._targets[address].held -= 1

    def answered(self, address: str) -> None:
        """Note an answer, whatever it says."""
        target = self._targets.setdefault(address, _Target())
        target.answered = self._clock()
        target.postponed = 0

    def has_room(self, address: str) -> bool:
        """Whether a delivery to this target may take one more slot."""
        target = self._targets.get(address)
        if target is None or not target.held:
            return True
        now = self._clock()
        silent = sum(one.held for one in self._targets.values() if one is not target and not _answers(one, now))
        return target.held < share(self._slots, silent, answers=_answers(target, now))

    @property
    def hung(self) -> int:
        """The number of targets that hold slots and have been silent for longer than one that answers."""
        now = self._clock()
        return sum(
            one.held > 0 and not _answers(one, now) and now - one.began > ANSWERS_SECONDS
            for one in self._targets.values()
        )

    def postpone(self, address: str, *, now: float) -> Settlement | None:
        """Return the settlement of a task for a target without room that has been silent; None: it answers, or may yet."""
        target, moment = self._targets[address], self._clock()
        if _answers(target, moment) or moment - target.began <= ANSWERS_SECONDS:
            return None
        target.postponed += 1
        at = now + ANSWERS_SECONDS + min(target.postponed * _SPREAD_SECONDS, _MAX_SPREAD)
        return Settlement(verdict=Verdict.RETRY, at=at, charged=False, reason="busy")


def _answers(target: _Target, now: float) -> bool:
    return now - target.answered <= ANSWERS_SECONDS
