"""What is wrong, in sentences for somebody who knows none of the code: what it is, how much, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from safedefer.dashboard.queue_rows import MINUTES, QueueRow, duration
from safedefer.dashboard.reports import Reported
from safedefer.observe.notices import LATE_SECONDS as UNTAKEN_SECONDS


class Alarm(NamedTuple):
    """Something that is wrong."""

    title: str
    text: str
    """The facts, in sentences. May hold names that others chose."""
    page: str
    """The page that says more; empty: none does."""
    link: str = ""
    """What there is on that page."""
    queue: str = ""
    remedy: str = ""
    """What to do, in words of ours alone; commands and options stand between backticks."""


_SYSTEM: Final = ("system", "Show the system page")


class Meaning(NamedTuple):
    """What a reason stands for."""

    title: str
    text: str
    remedy: str


_SOURCE: Final = "See where these requests come from."
REFUSALS: Final[Mapping[str, Meaning]] = {
    "revoked-key": Meaning(
        "Somebody uses a revoked key.", "A thief of it, or a process that was not given the new one.", _SOURCE
    ),
    "unknown-key": Meaning(
        "Somebody uses an unknown key.", "A foreign one, or a new one that the handler was not given.", _SOURCE
    ),
    "bad-signature": Meaning(
        "Somebody sends forged tasks.", "Changed on the way, or signed with another secret of the same key id.", _SOURCE
    ),
    "capability-exceeded": Meaning(
        "Somebody uses a key beyond its limits.",
        "The key may not sign this queue or callable: it was stolen, or its limits are too narrow.",
        _SOURCE,
    ),
    "wrong-audience": Meaning(
        "Somebody sends tasks of another place.",
        "Of another environment, queue, target or URL: a copied token, or a wrong setting.",
        _SOURCE,
    ),
    "replayed-task": Meaning("Somebody sends another task under a known id.", "", _SOURCE),
    "malformed-token": Meaning(
        "Somebody sends what is no task.", "A probe, or a client that is not safedefer's.", _SOURCE
    ),
}
"""What refusals mean, by their reason."""
_OTHER_REFUSAL: Final = Meaning("Requests are refused.", "Somebody sends what is no task of ours.", _SOURCE)
REJECTIONS: Final[Mapping[str, Meaning]] = {
    "unresolvable-callable": Meaning(
        "Code is missing here.",
        "The code that runs here does not have it.",
        "Deploy the version that has it, or map the name by `Policy(moved=...)`.",
    ),
    "policy-violation": Meaning("A policy does not name a task.", "", "Deploy the policy that names it."),
    "invalid-arguments": Meaning(
        "Arguments cannot be read here.",
        "Another version of the code wrote them.",
        "Deploy the version that reads them.",
    ),
    "invalid-claims": Meaning(
        "Tasks cannot be read here.", "Another version of safedefer wrote them.", "Deploy the version that reads them."
    ),
}
"""What a rejection means, by its reason."""
_OTHER_REJECTION: Final = Meaning("Tasks need another version.", "", "Deploy the version that they were made for.")


def alarms(rows: Sequence[QueueRow], outbox: int | None, reported: Reported, *, now: float) -> list[Alarm]:
    """Return what is wrong, the gravest first."""
    return [
        *_of_the_store(reported, now),
        *_of_processes(rows, reported, now),
        *_of_requests(reported, now),
        *(alarm for row in rows for alarm in _of_a_queue(row, reported)),
        *_of_the_outbox(outbox),
    ]


def _of_the_store(reported: Reported, now: float) -> list[Alarm]:
    found = []
    if reported.writes is not None:
        text = f"No task can be stored or ended, for {duration(now - reported.writes.since)}: {reported.writes.text}."
        found.append(Alarm(_cause(reported.writes.text, "The store takes no writes."), text, *_SYSTEM))
    for trouble, process in reported.troubles:
        text = f"{trouble.doing.capitalize()} fails in the process {process}, for {duration(now - trouble.since)}: {trouble.text}."
        found.append(Alarm(_cause(trouble.text, "The store refuses a process."), text, *_SYSTEM))
    return found


def _cause(text: str, title: str) -> str:
    """Return the cause as the title where it is the commonest one, which needs no reading on."""
    return "A disk is full." if "disk is full" in text else title


def _of_processes(rows: Sequence[QueueRow], reported: Reported, now: float) -> list[Alarm]:
    found = []
    for target, _ in reported.down:
        text = (
            f"The handler {target.name} takes no connection, for {duration(now - target.since)} ({target.reason}). Its "
            "tasks wait, and lose no attempt."
        )
        found.append(
            Alarm("A handler is down.", text, *_SYSTEM, remedy="Start it: `safedefer serve`, or your web server.")
        )
    for silent in reported.silent:
        text = (
            f"The process {silent.process} has said nothing for {duration(now - silent.at)}: it was killed, hangs, or cannot write "
            "the store."
        )
        found.append(Alarm("A process is silent.", text, *_SYSTEM, remedy="Look at its log, and start it again."))
    for row in rows:
        if row.untaken > UNTAKEN_SECONDS and not row.paused and not reported.takes(row.name):
            text = f"{_wait(row)} in the queue {row.name}, due for {duration(row.untaken)}, and no process takes them."
            remedy = "Start `safedefer run` or `safedefer dispatch`; if one runs, look at its log."
            found.append(Alarm("Nobody takes tasks.", text, "tasks", "Show waiting tasks", row.name, remedy))
    return found


def _of_requests(reported: Reported, now: float) -> list[Alarm]:
    found = []
    for each in reported.refused:
        meaning = REFUSALS.get(each.reason, _OTHER_REFUSAL)
        text = (
            f"{_times(each.times, 'request')} refused in the last {MINUTES} min ({each.reason}), the last one "
            f"{duration(now - each.last)} ago. {meaning.text}"
        )
        found.append(Alarm(meaning.title, text.rstrip(), *_SYSTEM, remedy=meaning.remedy))
    for rejected in reported.rejected:
        meaning = REJECTIONS.get(rejected.reason, _OTHER_REJECTION)
        text = (
            f"{rejected.callable} was turned away {_times(rejected.times, 'time')} in the last {MINUTES} min "
            f"({rejected.reason}), and is tried again. {meaning.text}"
        )
        found.append(Alarm(meaning.title, text.rstrip(), "tasks", "Show waiting tasks", remedy=meaning.remedy))
    return found


def _of_a_queue(row: QueueRow, reported: Reported) -> list[Alarm]:
    found = []
    show = ("tasks", "Show waiting tasks", row.name)
    if row.paused and row.waiting:
        text = f"The queue {row.name} is paused: {_wait(row)}, the oldest for {duration(row.lag)}."
        found.append(Alarm("A queue is paused.", text, "queues", "Show queues", remedy="Resume it when it may go on."))
    elif row.untaken > UNTAKEN_SECONDS and reported.takes(row.name):
        text = f"The queue {row.name} is {duration(max(row.lag, row.untaken))} behind: {_wait(row)}, {row.running} run."
        remedy = "More tasks come than are run: add worker processes (`--processes`), or raise `--concurrency`."
        if not row.running:
            remedy = "Processes are up, and nothing runs: look at their log."
        if reported.down:
            remedy = "Start the handler that is down; if that does not help, add worker processes (`--processes`)."
        found.append(Alarm("A queue falls behind.", text, *show, remedy))
    elif row.is_late and row.untaken <= UNTAKEN_SECONDS:
        why = "its limits hold it back" if row.is_limited else "its oldest task waits for its next try"
        text = f"The queue {row.name} is {duration(row.lag)} behind: {_wait(row)}, {row.running} run; {why}."
        found.append(Alarm("A queue is behind.", text, *show))
    if row.died:
        text = (
            f"{row.died} died in the queue {row.name} in the last {MINUTES} min ({_times(row.dead, 'dead letter')} in all). "
            "They are not tried again by themselves."
        )
        remedy = "Mend what they failed at, and run them again from that page."
        found.append(Alarm("Tasks died.", text, "dead", "Show dead letters", row.name, remedy))
    return found


def _of_the_outbox(outbox: int | None) -> list[Alarm]:
    if outbox is not None:
        return []
    return [Alarm("An outbox cannot be read.", "Transactional tasks may be waiting in it.", *_SYSTEM)]


def _wait(row: QueueRow) -> str:
    return f"{row.waiting} task{'' if row.waiting == 1 else 's'} wait{'s' if row.waiting == 1 else ''}"


def _times(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
