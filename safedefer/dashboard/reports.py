"""What processes say of themselves, put together: this process's own words, and the notices that others left in the store.

Notices are hints, which nobody signed: they are shown as text, few of each kind, and nothing is done by what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from safedefer.observe.notices import WRITING, Notices
from safedefer.observe.troubles import DownTarget, ProcessReport, Refused, Rejected, StoreTrouble
from safedefer.queues.base import NOTICE_SECONDS, Notice

SILENT_SECONDS = 4.0
"""A process that has not said for longer that it lives is silent: it says so every two seconds."""
#: Of each kind this many are shown, so that nobody fills a page by rows in the store.
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What is known of all processes."""

    down: list[tuple[DownTarget, str]] = field(default_factory=list)
    """Each with the process that says so."""
    troubles: list[tuple[StoreTrouble, str]] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    silent: list[ProcessReport] = field(default_factory=list)
    """Processes that no longer say that they live, and did not say that they end."""
    alive: list[ProcessReport] = field(default_factory=list)
    writes: StoreTrouble | None = None
    """Why this process cannot write the store."""
    unreadable: int = 0
    """Notices that are none of ours."""

    def takes(self, queue: str) -> bool:
        """Whether a process says that it takes tasks of a queue."""
        return any(each.takes and (each.queues is None or queue in each.queues) for each in self.alive)


def put_together(notices: Sequence[Notice], own: Notices, *, now: float) -> Reported:
    """Return what all processes say.

    Args:
        notices: Those of the store.
        own: The notices of this process, which are known without the store.
        now: When the notices were read, in seconds since the epoch.
    """
    reports, unreadable = [own.report()], 0
    for notice in notices:
        if notice.process == own.process:
            continue
        report = ProcessReport.read(notice, now=now)
        if report is None:
            unreadable += 1
        elif now - report.at <= NOTICE_SECONDS:
            reports.append(report)
    alive = [each for each in reports if each.beats and not each.ended and now - each.at <= SILENT_SECONDS]
    silent = [each for each in reports if each.beats and not each.ended and now - each.at > SILENT_SECONDS]
    current = [each for each in reports if each not in silent]
    return Reported(
        down=[(each, report.process) for report in current for each in report.down][:_SHOWN],
        troubles=[
            (each, report.process)
            for report in current
            for each in report.troubles
            if report.process != own.process or each.doing != WRITING  # `writes` says that
        ][:_SHOWN],
        refused=_refused(reports),
        rejected=_rejected(reports),
        # One that was replaced needs no word.
        silent=[each for each in silent if not _is_replaced(each, alive)][:_SHOWN],
        alive=alive,
        writes=own.failure,
        unreadable=unreadable,
    )


def _is_replaced(silent: ProcessReport, alive: Sequence[ProcessReport]) -> bool:
    command, _, machine = silent.process.partition(" on ")
    return any(
        each.command == silent.command and each.process.partition(" on ")[2] == machine and each.since > silent.since
        for each in alive
        if command
    )


def _refused(reports: Sequence[ProcessReport]) -> list[Refused]:
    found: dict[str, Refused] = {}
    for report in reports:
        for each in report.refused:
            known = found.get(each.reason, Refused(each.reason, 0, 0.0))
            found[each.reason] = Refused(each.reason, known.times + each.times, max(known.last, each.last))
    return sorted(found.values(), key=lambda each: -each.times)[:_SHOWN]


def _rejected(reports: Sequence[ProcessReport]) -> list[Rejected]:
    found: dict[tuple[str, str], Rejected] = {}
    for report in reports:
        for each in report.rejected:
            key = (each.reason, each.callable)
            known = found.get(key, Rejected(*key, 0, 0.0))
            found[key] = Rejected(*key, known.times + each.times, max(known.last, each.last))
    return sorted(found.values(), key=lambda each: -each.times)[:_SHOWN]
