"""A datastore in memory, behind the gRPC service of Google's: enough for puts, gets, deletes and queries by kind."""

import threading
from concurrent import futures
from contextlib import contextmanager

import grpc
from google.cloud.datastore_v1.types import datastore, query

SERVICE = "google.datastore.v1.Datastore"


def path_of(key):
    return tuple((each.kind, each.name or each.id) for each in key.path)


class Datastore:
    """The entities, by the path of their key."""

    def __init__(self):
        self.entities = {}
        self.ids = iter(range(1_000, 1_000_000))
        self.lock = threading.Lock()

    def kind(self, name):
        return [entity for path, entity in sorted(self.entities.items(), key=str) if path[-1][0] == name]

    def lookup(self, request):
        answer = datastore.LookupResponse()
        for key in request.keys:
            entity = self.entities.get(path_of(key))
            if entity is None:
                missing = query.EntityResult()
                missing.entity.key = key
                answer.missing.append(missing)
            else:
                answer.found.append(query.EntityResult(entity=entity, version=1))
        return answer

    def commit(self, request):
        answer = datastore.CommitResponse()
        for mutation in request.mutations:
            result = datastore.MutationResult(version=1)
            if "delete" in mutation:
                self.entities.pop(path_of(mutation.delete), None)
            else:
                entity = mutation.upsert or mutation.insert or mutation.update
                if not entity.key.path[-1].id and not entity.key.path[-1].name:
                    entity.key.path[-1].id = next(self.ids)
                    result.key = entity.key
                self.entities[path_of(entity.key)] = entity
            answer.mutation_results.append(result)
        return answer

    def run_query(self, request):
        asked = request.query
        rows = self.kind(asked.kind[0].name)
        start = int(asked.start_cursor or b"0") + asked.offset
        limit = asked.limit or len(rows)
        page = rows[start : start + limit]
        more = query.QueryResultBatch.MoreResultsType
        batch = query.QueryResultBatch(
            entity_result_type=query.EntityResult.ResultType.FULL,
            entity_results=[
                query.EntityResult(entity=entity, version=1, cursor=str(number).encode())
                for number, entity in enumerate(page, start + 1)
            ],
            end_cursor=str(start + len(page)).encode(),
            more_results=more.MORE_RESULTS_AFTER_LIMIT if start + len(page) < len(rows) else more.NO_MORE_RESULTS,
            skipped_results=asked.offset,
        )
        return datastore.RunQueryResponse(batch=batch)

    def answering(self, function):
        def answer(request, _context):
            with self.lock:
                return function(request)

        return answer


@contextmanager
def serve():
    """Yield the datastore and its address."""
    store = Datastore()
    kinds = {"Lookup": store.lookup, "Commit": store.commit, "RunQuery": store.run_query}
    handlers = {}
    for name, function in kinds.items():
        request, response = getattr(datastore, f"{name}Request"), getattr(datastore, f"{name}Response")
        handlers[name] = grpc.unary_unary_rpc_method_handler(
            store.answering(function), request_deserializer=request.deserialize, response_serializer=response.serialize
        )
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield store, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
