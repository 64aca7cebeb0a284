"""The outbox in Datastore, by google-cloud-ndb: a task is an entity in the user's transaction, and large ones some more.

It is written by ndb, in the transaction that runs. It is read by the client's own calls: those need no context, so that any
thread may read, and a property is what the service says that it is, where ndb would decompress what claims to be compressed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from safedefer.blobs import Blob
from safedefer.errors import MissingExtra, TaskTooLargeError
from safedefer.transactions.rows import to_text

try:
    import google.auth
    import grpc  # type: ignore[import-untyped]
    from google.api_core import exceptions
    from google.api_core.gapic_v1 import routing_header
    from google.cloud import datastore_v1, ndb  # type: ignore[attr-defined]
except ModuleNotFoundError as _error:
    raise MissingExtra("ndb", "an outbox in Datastore") from _error

if TYPE_CHECKING:
    from safedefer.queues.base import QueuedTask

_log: Final = logging.getLogger("safedefer.outbox")

#: Kinds of the entities: one for each task, and one for each further piece of a large one.
KIND: Final = "SafedeferOutbox"
_PIECE_KIND: Final = "SafedeferOutboxPiece"
#: Bytes of a piece. An entity may have 1,048,572, with its key and names.
_PIECE_BYTES: Final = 1_000_000
#: Pieces of a task, the first one too. A transaction may have 10 MiB: a larger task cannot come from one.
_PIECES: Final = 10
#: Seconds for a call.
_TIMEOUT: Final = 10.0
#: Keys that are read at once.
_KEYS: Final = 500
#: Answers to one question that bring nothing, and say that they are not the last.
_EMPTY_ANSWERS: Final = 100
_KEYS_ONLY: Final = {
    "projection": [{"property": {"name": "__key__"}}],
    "order": [{"property": {"name": "__key__"}}],
}


class OutboxEntity(ndb.Model):  # type: ignore[misc]  # ndb has no types
    """A task. Its key is the task's id, in the namespace that has no name: so one query finds those of all namespaces."""

    environment: Any = ndb.StringProperty()
    payload: Any = ndb.BlobProperty()
    text_bytes: Any = ndb.IntegerProperty(indexed=False)
    pieces: Any = ndb.IntegerProperty(indexed=False)

    @classmethod
    def _get_kind(cls) -> str:
        return KIND


class OutboxPieceEntity(ndb.Model):  # type: ignore[misc]  # as above
    """The second piece of a large task, or a further one: a child of the first."""

    payload: Any = ndb.BlobProperty()

    @classmethod
    def _get_kind(cls) -> str:
        return _PIECE_KIND


class TaskPieces(NamedTuple):
    """A task as it is put."""

    id: str
    text_bytes: int
    """How many of all bytes are its text; the rest is its blob."""
    pieces: Sequence[bytes]


class EntityRow(NamedTuple):
    """What was read of a task's entity."""

    id: str
    payload: bytes
    """The first piece."""
    text_bytes: int
    pieces: int


def split(task: QueuedTask) -> TaskPieces:
    """Return what is put of a task.

    Raises:
        TaskTooLargeError: A transaction has no room for it.
    """
    blob = task.blob
    text = to_text(task if blob is None else task._replace(blob=Blob(blob.id, b""))).encode()
    payload = text if blob is None else text + blob.data
    most = _PIECES * _PIECE_BYTES
    if len(payload) > most:
        raise TaskTooLargeError(
            f"a task of {len(payload)} bytes does not go with a Datastore transaction, which may have 10 MiB in all; "
            f"it may have {most} bytes: pass an id, and have the task read the rest",
            size=len(payload),
            limit=most,
        )
    starts = range(0, len(payload), _PIECE_BYTES)
    return TaskPieces(task.id, len(text), [payload[start : start + _PIECE_BYTES] for start in starts])


def put(task: TaskPieces, environment: str) -> None:
    """Put a task into the transaction that runs."""
    # The namespace of the context is not asked.
    key = ndb.Key(KIND, task.id, namespace="")
    first, *rest = task.pieces
    entities: list[Any] = [
        OutboxEntity(
            key=key, environment=environment, payload=first, text_bytes=task.text_bytes, pieces=len(task.pieces)
        ),
        *(
            OutboxPieceEntity(key=ndb.Key(_PIECE_KIND, number, parent=key), payload=piece)
            for number, piece in enumerate(rest, 1)
        ),
    ]
    # Into Datastore and into no cache, whatever policies the context has: nobody reads it by ndb. In a transaction ndb
    # refuses the option use_datastore.
    with ndb.get_context().new(datastore_policy=None, cache=None).use():
        for entity in entities:
            entity.put(use_cache=False, use_global_cache=False)


def client_here() -> Any:
    """Return the ndb client of the context that runs."""
    return ndb.get_context().client


def has_context() -> bool:
    """Whether there is an ndb context."""
    return ndb.get_context(raise_context_error=False) is not None


class _AtEnd:
    """Functions that are called at the end of a transaction. ndb calls this object after it."""

    def __init__(self, committed: Callable[[], object], ended: Callable[[bool], object]) -> None:
        self._committed = committed
        self._ended = ended
        self._was_told = False
        self.is_over = False
        """Whether the transaction has ended."""

    def on_commit(self) -> None:
        """Note and say that it has committed. ndb does not call this if another function before it raises."""
        self.is_over = True
        self._was_told = _safely(self._committed)

    def __call__(self) -> None:
        self.is_over = True
        _safely(lambda: self._ended(self._was_told))


def call_at_end(committed: Callable[[], object], ended: Callable[[bool], object]) -> None:
    """Have functions called after the commit of the transaction that runs, and after its end of either kind.

    An error of theirs is logged: ndb would take it for one of the transaction, and run that again. A function of the
    user's that raises keeps ndb from calling those that were registered after it.

    Args:
        committed: Called if it commits.
        ended: Called after that, with whether ``committed`` was called and did not raise.
    """
    context, at_end = ndb.get_context(), _AtEnd(committed, ended)
    context.call_on_commit(at_end.on_commit)
    context.call_on_transaction_complete(at_end)


def _safely(function: Callable[[], object]) -> bool:
    try:
        function()
    except Exception:  # noqa: BLE001  # the task is in the outbox: a sweep finds it
        _log.warning("a committed task is left to the next sweep of the outbox", exc_info=True)
        return False
    return True


def is_over() -> bool:
    """Whether the transaction of the context has ended, though the context still names it: as far as that can be known.

    Raises:
        GoogleAPICallError: Datastore was asked, and did not answer.
    """
    context = ndb.get_context()
    if any(isinstance(each, _AtEnd) and each.is_over for each in context.transaction_complete_callbacks or ()):
        return True
    # ndb has begun to commit. What nobody has waited for runs before that, and what it puts goes with the commit; the
    # functions that are called at the end run after it. Only Datastore can tell these two.
    batch = context.commit_batches.get(context.transaction)
    if not getattr(batch, "preparing_to_commit", False):
        return False
    return not EntityReader(context.client, "").knows(context.transaction)


class OwnTransaction:
    """A transaction that a block opens: ndb's own, whose function ends when the block does.

    It is not tried again: the block's code cannot run a second time.
    """

    def __init__(self) -> None:
        self._ends: Any = ndb.Future("the block")
        self._around: Any = None
        """The context in which ndb runs it."""
        self._inside: Any = None
        """The context of the transaction itself."""
        self._uses: Any = None
        self._outcome: Any = None

    def begin(self) -> None:
        """Open it, and be in it from now on. Raises what ndb raises."""
        here, began = ndb.get_context(), ndb.Future("begin")
        # With an event loop of its own: one that another block of another asyncio task runs would drop what belongs to this
        # one. With a cache of its own, so that what comes back into that of the context is what was committed.
        self._around = here.new(eventloop=type(here.eventloop)(), batches=None, commit_batches=None, cache=None)

        def run() -> Any:
            began.set_result(ndb.get_context())
            return self._ends

        with self._around.use():
            self._outcome = ndb.transaction_async(run, retries=0)
            ndb.wait_any([began, self._outcome])
            if not began.done():
                self._outcome.check_success()
        self._inside = began.result()
        self._uses = self._inside.use()
        self._uses.__enter__()

    def end(self, *, commit: bool) -> None:
        """Leave it; commit it, or undo it. Raises what ndb raises of a commit."""
        is_committed = False
        try:
            if commit:
                self._ends.set_result(None)
                self._finish()
                is_committed = True
            else:
                self._ends.set_exception(RuntimeError("the block was left by an error"))
                with contextlib.suppress(Exception):  # the error of the block is what should be seen
                    self._finish()
        finally:
            # What was not committed must not be found in the cache afterwards. ndb copies it around while it commits.
            if not is_committed:
                self._inside.clear_cache()
            self._uses.__exit__(None, None, None)

    def _finish(self) -> None:
        """Wait for the end, and for what the functions have started that are called then."""
        with self._around.use():
            try:
                self._outcome.check_success()
            finally:
                # Whether it is committed, only ndb says: who is told of another error might do all of it again.
                try:
                    self._around.flush()
                except Exception as error:  # noqa: BLE001  # of whatever they have started
                    _log.warning("what was started at the end of a transaction failed (%s)", type(error).__name__)


def find_credentials() -> Any:
    """Return the application's default credentials, which keep their access token; None if there is an emulator.

    Raises:
        DefaultCredentialsError: There are none.
    """
    if os.environ.get("DATASTORE_EMULATOR_HOST"):
        return None
    credentials, _ = google.auth.default(scopes=ndb.Client.SCOPE)
    return credentials


@contextlib.contextmanager
def connected(project: str, database: str, credentials: Any) -> Iterator[Any]:
    """Open a client for some calls: its channel must not be carried across a fork."""
    client = ndb.Client(project=project, database=database or None, credentials=credentials)
    try:
        yield client
    finally:
        client.stub.close()


class EntityReader:
    """Reads and deletes entities of the outbox. Errors are those of ``google.api_core.exceptions``.

    Args:
        client: An ndb client.
        environment: Whose tasks are read.
    """

    def __init__(self, client: Any, environment: str) -> None:
        self._stub = client.stub
        self._environment = environment
        self._place = {"project_id": client.project, "database_id": client.database or ""}
        self._partition = datastore_v1.PartitionId(**self._place)

    def _call(self, name: str, request: Any) -> Any:
        routing = {name: value for name, value in self._place.items() if value}
        metadata = (routing_header.to_grpc_metadata(routing),)  # type: ignore[no-untyped-call]
        try:
            return getattr(self._stub, name)(request, timeout=_TIMEOUT, metadata=metadata)
        except grpc.RpcError as error:
            raise exceptions.from_grpc_error(error) from error  # type: ignore[no-untyped-call]

    def _key(self, task_id: str, piece: int = 0) -> datastore_v1.Key:
        path = [{"kind": KIND, "name": task_id}, *([{"kind": _PIECE_KIND, "id": piece}] if piece else [])]
        return datastore_v1.Key(partition_id=self._partition, path=path)

    def _query(self, after: datastore_v1.Key | None, **more: Any) -> datastore_v1.Query:
        """Return the query for the keys after one. Its filters need no index but those that every property has."""
        operator = datastore_v1.PropertyFilter.Operator
        filters = [_filter("environment", operator.EQUAL, datastore_v1.Value(string_value=self._environment))]
        if after is not None:
            value = datastore_v1.Value(key_value=after)
            filters.append(_filter("__key__", operator.GREATER_THAN, value))
        every = datastore_v1.CompositeFilter(op=datastore_v1.CompositeFilter.Operator.AND, filters=filters)
        return datastore_v1.Query(kind=[{"name": KIND}], filter=datastore_v1.Filter(composite_filter=every), **more)

    def keys(self, after: datastore_v1.Key | None) -> Sequence[datastore_v1.Key]:
        """Return the next keys after one, in their order. Some may be none of ours. There are no more if there are none.

        An answer may be empty and not the last one: QueryResultBatch.more_results of google.datastore.v1.
        """
        query = self._query(after, limit=_KEYS, **_KEYS_ONLY)
        for _ in range(_EMPTY_ANSWERS):
            request = datastore_v1.RunQueryRequest(**self._place, partition_id=self._partition, query=query)
            batch = self._call("run_query", request).batch
            if batch.entity_results or batch.more_results != batch.MoreResultsType.NOT_FINISHED:
                return [each.entity.key for each in batch.entity_results]
            query.start_cursor = batch.end_cursor
        raise exceptions.ServiceUnavailable("a query for the tasks of the outbox does not finish")  # type: ignore[no-untyped-call]

    def _lookup(self, keys: Sequence[datastore_v1.Key]) -> list[datastore_v1.Entity]:
        """Return the entities of some keys, but those that are not there.

        Keys may be put off: LookupResponse.deferred of google.datastore.v1.
        """
        found: list[datastore_v1.Entity] = []
        empty = 0
        while keys and empty < _EMPTY_ANSWERS:
            answer = self._call("lookup", datastore_v1.LookupRequest(**self._place, keys=keys))
            found += [each.entity for each in answer.found]
            empty, keys = empty + (len(answer.deferred) == len(keys)), list(answer.deferred)
        if keys:
            raise exceptions.ServiceUnavailable("a task of the outbox is not looked up")  # type: ignore[no-untyped-call]
        return found

    def count(self) -> int:
        """Return how many tasks there are."""
        counted = datastore_v1.AggregationQuery.Aggregation(
            count=datastore_v1.AggregationQuery.Aggregation.Count(), alias="rows"
        )
        query = self._query(None)
        request = datastore_v1.RunAggregationQueryRequest(
            **self._place,
            partition_id=self._partition,
            aggregation_query=datastore_v1.AggregationQuery(nested_query=query, aggregations=[counted]),
        )
        (result,) = self._call("run_aggregation_query", request).batch.aggregation_results
        return int(result.aggregate_properties["rows"].integer_value)

    def rows(self, ids: Sequence[str]) -> dict[str, EntityRow | None]:
        """Return the entities of some ids, but those that are gone; None for one that has not the properties of a task.

        Where they are too many bytes for one answer, they are read in smaller parts.
        """
        try:
            entities = self._lookup([self._key(task_id) for task_id in ids])
        except exceptions.ResourceExhausted:
            if len(ids) == 1:
                raise
            middle = len(ids) // 2
            return {**self.rows(ids[:middle]), **self.rows(ids[middle:])}
        return {str(entity.key.path[-1].name): self._row(entity) for entity in entities}

    def knows(self, transaction: bytes) -> bool:
        """Whether a transaction has not ended: it is asked for an entity that nobody writes."""
        options = datastore_v1.ReadOptions(transaction=transaction)
        request = datastore_v1.LookupRequest(**self._place, keys=[self._key("none")], read_options=options)
        try:
            self._call("lookup", request)
        except (exceptions.InvalidArgument, exceptions.FailedPrecondition):
            return False
        return True

    def _row(self, entity: datastore_v1.Entity) -> EntityRow | None:
        properties = entity.properties
        payload, text_bytes, pieces = (
            _typed(properties, name, kind)
            for name, kind in (("payload", "blob_value"), ("text_bytes", "integer_value"), ("pieces", "integer_value"))
        )
        if payload is None or text_bytes is None or pieces is None or not 1 <= pieces <= _PIECES:
            return None
        return EntityRow(str(entity.key.path[-1].name), payload, text_bytes, pieces)

    def payload(self, row: EntityRow) -> bytes | None:
        """Return all of a task; None if a piece is missing. It is read one by one: ten entities of 1 MiB at most."""
        pieces = [row.payload]
        for number in range(1, row.pieces):
            found = self._lookup([self._key(row.id, number)])
            piece = _typed(found[0].properties, "payload", "blob_value") if found else None
            if piece is None:
                return None
            pieces.append(piece)
        return b"".join(pieces)

    def delete(self, written: Sequence[tuple[str, int]]) -> None:
        """Delete the entities of some tasks; all of a large one, or none.

        Args:
            written: The id and the pieces of each.
        """
        keys = [self._key(task_id, number) for task_id, pieces in written for number in range(pieces)]
        mode = datastore_v1.CommitRequest.Mode
        request = datastore_v1.CommitRequest(
            **self._place, mode=mode.NON_TRANSACTIONAL, mutations=[datastore_v1.Mutation(delete=key) for key in keys]
        )
        if len(keys) > len(written):
            began = self._call("begin_transaction", datastore_v1.BeginTransactionRequest(**self._place))
            request.mode, request.transaction = mode(mode.TRANSACTIONAL), began.transaction
        self._call("commit", request)


def _filter(name: str, operator: int, value: datastore_v1.Value) -> datastore_v1.Filter:
    return datastore_v1.Filter(property_filter={"property": {"name": name}, "op": operator, "value": value})


def id_of(key: datastore_v1.Key) -> str:
    """Return the id of the task that a key names; empty if it names none."""
    return str(key.path[0].name) if len(key.path) == 1 else ""


def _typed(properties: Any, name: str, kind: str) -> Any:
    """Return the value of a property, if it is of that type."""
    if name not in properties:
        return None
    value = datastore_v1.Value.pb(properties[name])
    return getattr(value, kind) if value.WhichOneof("value_type") == kind else None
