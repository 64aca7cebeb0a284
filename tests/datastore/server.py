"""The gRPC service google.datastore.v1.Datastore, on loopback, of the entities in ``store``."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.cloud.datastore_v1.types import (
    AggregationResult,
    AggregationResultBatch,
    AllocateIdsRequest,
    AllocateIdsResponse,
    BeginTransactionRequest,
    BeginTransactionResponse,
    CommitRequest,
    CommitResponse,
    Entity,
    EntityResult,
    LookupRequest,
    LookupResponse,
    MutationResult,
    QueryResultBatch,
    ReadOptions,
    RollbackRequest,
    RollbackResponse,
    RunAggregationQueryRequest,
    RunAggregationQueryResponse,
    RunQueryRequest,
    RunQueryResponse,
    Value,
)

from tests.datastore.store import REQUEST_BYTES, Refused, Store

_SERVICE = "google.datastore.v1.Datastore"


class DatastoreServer:
    """A server of one database. Its port is chosen by the system.

    ``batch`` is how many results a query gives at once: [proto] QueryResultBatch, a server may give fewer than asked for.
    ``looks_up`` is how many keys a Lookup looks up at once: [proto] LookupResponse, the others are ``deferred``.
    ``before`` and ``after`` are called with each request of a name, and may raise ``Refused``: after it was done, the
    answer is lost.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.batch = 300
        self.looks_up = 1_000
        self.before: dict[str, Callable[[Any], None]] = {}
        self.after: dict[str, Callable[[Any], None]] = {}
        self.calls: Counter[str] = Counter()
        self._lock = threading.Lock()
        methods = {
            "Lookup": (self._lookup, LookupRequest, LookupResponse),
            "RunQuery": (self._run_query, RunQueryRequest, RunQueryResponse),
            "RunAggregationQuery": (self._aggregate, RunAggregationQueryRequest, RunAggregationQueryResponse),
            "BeginTransaction": (self._begin, BeginTransactionRequest, BeginTransactionResponse),
            "Commit": (self._commit, CommitRequest, CommitResponse),
            "Rollback": (self._rollback, RollbackRequest, RollbackResponse),
            "AllocateIds": (self._allocate, AllocateIdsRequest, AllocateIdsResponse),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._answering(name, answer),
                request_deserializer=request.deserialize,
                response_serializer=response.serialize,
            )
            for name, (answer, request, response) in methods.items()
        }
        # Larger than the limit, so that it is the service that refuses a request.
        options = [("grpc.max_receive_message_length", 64 * 2**20), ("grpc.so_reuseport", 0)]
        self._server = grpc.server(ThreadPoolExecutor(8, "datastore"), options=options)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    @property
    def host(self) -> str:
        """The value of DATASTORE_EMULATOR_HOST."""
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        """End it, with what is under way."""
        self._server.stop(None).wait(60)

    def _answering(self, name: str, answer: Callable[[Any], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
        def answered(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                self.before.get(name, _nothing)(request)
                with self._lock:
                    self.calls[name] += 1
                    if len(type(request).serialize(request)) > REQUEST_BYTES:
                        raise Refused(
                            grpc.StatusCode.INVALID_ARGUMENT, "Request payload size exceeds the limit: 10485760 bytes."
                        )
                    response = answer(request)
                self.after.get(name, _nothing)(request)
            except Refused as error:
                context.abort(error.code, str(error))
            return response

        return answered

    def _lookup(self, request: LookupRequest) -> LookupResponse:
        keys = list(request.keys)
        found = self.store.lookup(keys[: self.looks_up], _transaction_of(request.read_options))
        return LookupResponse(
            deferred=keys[self.looks_up :],
            found=[EntityResult(entity=entity, version=version) for _, version, entity in found if entity is not None],
            missing=[EntityResult(entity=Entity(key=key)) for key, _, entity in found if entity is None],
        )

    def _selected(self, request: Any, query: Any) -> list[tuple[int, Entity]]:
        partition = request.partition_id.database_id, request.partition_id.namespace_id
        return self.store.query(query, partition, _transaction_of(request.read_options))

    def _run_query(self, request: RunQueryRequest) -> RunQueryResponse:
        """[proto] QueryResultBatch. A cursor is opaque: here it is how many results are before it."""
        query = request.query
        found = self._selected(request, query)
        start = int(query.start_cursor or b"0")
        rest = found[start + query.offset :]
        limit = query.limit if "limit" in query else len(rest)
        given = rest[: min(limit, self.batch)]
        keys_only = [each.property.name for each in query.projection] == ["__key__"]
        more = QueryResultBatch.MoreResultsType
        end = b"%d" % (start + query.offset + len(given))
        batch = QueryResultBatch(
            skipped_results=min(query.offset, len(found)),
            entity_result_type=EntityResult.ResultType.KEY_ONLY if keys_only else EntityResult.ResultType.FULL,
            entity_results=[
                EntityResult(entity=Entity(key=entity.key) if keys_only else entity, version=version, cursor=end)
                for version, entity in given
            ],
            end_cursor=end,
            more_results=more.NOT_FINISHED if len(given) < min(limit, len(rest))
            else more.MORE_RESULTS_AFTER_LIMIT if len(rest) > limit
            else more.NO_MORE_RESULTS,
        )  # fmt: skip
        return RunQueryResponse(batch=batch, query=query)

    def _aggregate(self, request: RunAggregationQueryRequest) -> RunAggregationQueryResponse:
        """[proto] AggregationQuery.Aggregation.Count: how many entities match, ``up_to`` at most."""
        query = request.aggregation_query
        (aggregation,) = query.aggregations
        counted = len(self._selected(request, query.nested_query))
        if "up_to" in aggregation.count:
            counted = min(counted, aggregation.count.up_to)
        result = AggregationResult(aggregate_properties={aggregation.alias: Value(integer_value=counted)})
        return RunAggregationQueryResponse(batch=AggregationResultBatch(aggregation_results=[result]))

    def _begin(self, request: BeginTransactionRequest) -> BeginTransactionResponse:
        return BeginTransactionResponse(
            transaction=self.store.begin(read_only="read_only" in request.transaction_options)
        )

    def _commit(self, request: CommitRequest) -> CommitResponse:
        is_transactional = request.mode == CommitRequest.Mode.TRANSACTIONAL
        keys = self.store.commit(request.transaction if is_transactional else None, list(request.mutations))
        return CommitResponse(mutation_results=[MutationResult(key=key) for key in keys])

    def _rollback(self, request: RollbackRequest) -> RollbackResponse:
        self.store.rollback(request.transaction)
        return RollbackResponse()

    def _allocate(self, request: AllocateIdsRequest) -> AllocateIdsResponse:
        return AllocateIdsResponse(keys=[self.store.allocate(key) for key in request.keys])


def _nothing(_: object) -> None:
    pass


def _transaction_of(options: ReadOptions) -> bytes | None:
    return options.transaction or None
