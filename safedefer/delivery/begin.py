"""How a run begins under a push engine: what the engine, the store and the ledger say of a verified request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from safedefer.concurrency.batches import Batches
from safedefer.concurrency.threads import InThread
from safedefer.ledger import Admission, Execution, PushedCalls
from safedefer.queues.progress import NO_PROGRESS, Progress
from safedefer.queues.push import PushQueue
from safedefer.queues.pushed import cancel_key, progress_key


class PushedRun(NamedTuple):
    """A run, and the headers of the request that asks for it."""

    execution: Execution
    headers: Mapping[str, str]


class FoundRun(NamedTuple):
    """What the store and the engine say of a request whose signature is verified."""

    admission: Admission | None
    """None: the sender is not the engine."""
    progress: Progress = NO_PROGRESS
    cancelled: bool = False
    lost: bool = False
    """Whether the run before this one never ended."""


class PushedBegin:
    """Asks the store for all runs that begin at the same time.

    Args:
        queue: The engine and its store.
        storage: Calls the store in a thread.
        clock: Returns seconds since the epoch.
        seconds: The length of a run's lease.
        give_back: Ends a run that was admitted after its caller was cancelled.
    """

    def __init__(
        self,
        queue: Callable[[], PushQueue],
        storage: InThread,
        *,
        clock: Callable[[], float],
        seconds: float,
        give_back: Callable[[Execution, Admission | None], None],
    ) -> None:
        self._queue = queue
        self._storage = storage
        self._clock = clock
        self._seconds = seconds
        self._end = give_back
        self._batches: Batches[PushedRun, FoundRun] = Batches(self._begin_batch, unclaimed=self._give_back)

    def __call__(self, asked: PushedRun) -> asyncio.Future[FoundRun]:
        """Return what is said of a request; a run that is admitted has begun."""
        return self._batches(asked)

    def _begin_batch(self, asked: Sequence[PushedRun], _gone: bool) -> asyncio.Future[Sequence[FoundRun]]:
        queue = self._queue()
        calls = queue.pushed_calls if getattr(queue.engine, "in_process", False) else None
        if calls is None:
            return self._storage(partial(self._begin_many, asked))
        return asyncio.ensure_future(self._begin_here(queue, calls, asked))

    async def _begin_here(self, queue: PushQueue, calls: PushedCalls, asked: Sequence[PushedRun]) -> Sequence[FoundRun]:
        """Begin in one step, without a thread, the runs of tasks that the ledger does not know. The others take the longer way."""
        found: dict[int, FoundRun] = {}
        engine, runs = queue.engine, [each.execution for each in asked]
        first = [
            number
            for number, each in enumerate(asked)
            if engine.authenticate(each.headers) and not engine.attempt(each.headers).retries
        ]
        keys = [_kept_keys(runs[number]) for number in first]
        begun = await calls.begin_first(
            [runs[number] for number in first],
            keys,
            now=self._clock(),
            lease=self._seconds,
            synced=queue.synced,
        )
        for number, (counted, mark), kept in zip(first, keys, begun, strict=True):
            if kept is not None:
                found[number] = FoundRun(Admission.RUN, Progress.load(kept.get(counted)), mark in kept)
        left = [number for number in range(len(asked)) if number not in found]
        if left:
            try:
                others = await self._storage(partial(self._begin_many, [asked[number] for number in left]))
            except BaseException:
                for number, each in found.items():  # nobody hears that these may run
                    self._give_back(asked[number], each)
                raise
            found.update(zip(left, others, strict=True))
        return [found[number] for number in range(len(asked))]

    def _begin_many(self, asked: Sequence[PushedRun]) -> Sequence[FoundRun]:
        """Ask the engine, the store and the ledger, in a thread: what is not due, or not the engine's, begins no run."""
        queue, now = self._queue(), self._clock()
        genuine = [queue.engine.authenticate(each.headers) for each in asked]
        runs = [each.execution for each in asked]
        # A delivery that the engine calls the first finds nothing that is kept. It is looked at once it is admitted, as any
        # other, and an engine that is wrong has the ledger admit a run that is given back.
        later = [number for number, each in enumerate(asked) if queue.engine.attempt(each.headers).retries]
        kept: list[tuple[Progress, bool]] = [(NO_PROGRESS, False)] * len(runs)
        for number, found_before in zip(later, self._kept(queue, [runs[n] for n in later]), strict=True):
            kept[number] = found_before
        lost = queue.ledger.lost_many(runs, now=now)
        due = [sent and found.not_before <= now for sent, (found, _) in zip(genuine, kept, strict=True)]
        begun = iter(
            queue.ledger.begin_many(
                [run for run, is_due in zip(runs, due, strict=True) if is_due],
                now=now,
                lease=self._seconds,
            )
        )
        found = []
        for sent, is_due, (progress, cancelled), was_lost in zip(genuine, due, kept, lost, strict=True):
            admission = None if not sent else next(begun) if is_due else Admission.EARLY
            found.append(FoundRun(admission, progress, cancelled, was_lost))
        return self._looked_again(queue, runs, found)

    def _looked_again(self, queue: PushQueue, runs: Sequence[Execution], found: list[FoundRun]) -> list[FoundRun]:
        """Read once more what is kept of the tasks that may run: another run may have ended since, and this one owns it now."""
        ours = [number for number, each in enumerate(found) if each.admission is Admission.RUN]
        for number, (progress, cancelled) in zip(ours, self._kept(queue, [runs[n] for n in ours]), strict=True):
            found[number] = found[number]._replace(progress=progress, cancelled=cancelled)
        return found

    def _kept(self, queue: PushQueue, runs: Sequence[Execution]) -> list[tuple[Progress, bool]]:
        names = [_kept_keys(run) for run in runs]
        values = queue.keep.get_many([name for pair in names for name in pair]) if names else {}
        return [(Progress.load(values.get(counted)), mark in values) for counted, mark in names]

    def _give_back(self, asked: PushedRun, found: FoundRun) -> None:
        self._end(asked.execution, found.admission)


def _kept_keys(run: Execution) -> tuple[str, str]:
    """Return the keys of what was counted of a task, and of the mark that it was cancelled."""
    return progress_key(run.audience, run.task_id), cancel_key(run.task_id)
