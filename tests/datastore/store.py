"""What a Datastore holds: entities, transactions, limits, queries. ``server`` speaks gRPC for it.

It is Firestore in Datastore mode with optimistic concurrency, as far as google-cloud-ndb and safedefer need it. Sources:

- [proto] the comments of google/datastore/v1/datastore.proto, query.proto and entity.proto (github.com/googleapis/googleapis);
- [limits] https://cloud.google.com/datastore/docs/concepts/limits
- [transactions] https://cloud.google.com/datastore/docs/concepts/transactions
- [queries] https://cloud.google.com/datastore/docs/concepts/queries
- [errors] https://cloud.google.com/datastore/docs/concepts/errors
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Final

import grpc
from google.cloud.datastore_v1.types import Entity, Key, Mutation, PropertyFilter, PropertyOrder, Query, Value

#: Bytes, of [limits]: an entity, an unindexed property, an indexed text, a key, all of a request.
ENTITY_BYTES: Final = 1_048_572
PROPERTY_BYTES: Final = 1_048_487
INDEXED_BYTES: Final = 1_500
KEY_BYTES: Final = 6 * 1024
REQUEST_BYTES: Final = 10 * 2**20
#: Keys of one Lookup, of [limits].
LOOKUP_KEYS: Final = 1_000
#: Seconds after which a transaction has expired, and idle ones have: [transactions].
EXPIRES: Final = 270.0
IDLE: Final = 60.0


class Refused(Exception):
    """A call is answered with an error."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _invalid(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message)


def key_bytes(key: Key) -> bytes:
    """Return a key as bytes that are equal for equal keys."""
    return Key.pb(key).SerializeToString(deterministic=True)


def _rank(key: Key) -> tuple[tuple[str, int, int | str], ...]:
    """[queries]: keys are ordered by their path; kinds as texts, ids before names."""
    return tuple(
        (element.kind, 1, element.name) if element.name else (element.kind, 0, element.id) for element in key.path
    )


@dataclass
class Transaction:
    """One transaction: what it saw, and what it has read of it."""

    snapshot: dict[bytes, tuple[int, Entity]]
    read_only: bool
    began: float
    used: float
    reads: dict[bytes, int] = field(default_factory=dict)
    queries: list[tuple[Query, tuple[str, str], list[tuple[bytes, int]]]] = field(default_factory=list)


class Store:
    """Entities of one database."""

    def __init__(self) -> None:
        self.entities: dict[bytes, tuple[int, Entity]] = {}
        self.transactions: dict[bytes, Transaction] = {}
        self.now = 0.0
        """Seconds; tests let them pass."""
        self._versions = itertools.count(1)
        self._names = itertools.count(1)
        self._ids = itertools.count(5_000_000_000_000_000)

    # --- Transactions ---

    def begin(self, *, read_only: bool) -> bytes:
        """[transactions]: reads see the database as it was when the transaction began."""
        name = b"transaction-%d" % next(self._names)
        self.transactions[name] = Transaction(dict(self.entities), read_only, self.now, self.now)
        return name

    def transaction(self, name: bytes) -> Transaction:
        """[transactions]: one expires after 270 seconds, or if it is idle for 60. [errors]: then INVALID_ARGUMENT."""
        found = self.transactions.get(name)
        if found is None or self.now > found.began + EXPIRES or self.now > found.used + IDLE:
            self.transactions.pop(name, None)
            raise _invalid("The referenced transaction has expired or is no longer valid.")
        found.used = self.now
        return found

    def rollback(self, name: bytes) -> None:
        """[proto] RollbackRequest: frees a transaction. One that a failed commit has ended is not there any more: no error."""
        self.transactions.pop(name, None)

    def commit(self, name: bytes | None, mutations: list[Mutation]) -> list[Key | None]:
        """[proto] Commit: all mutations of a transaction are applied, or none. [errors] ABORTED: what it has read was changed.

        [proto] Mutations that affect one entity are applied in order, and outside of a transaction are refused.
        """
        if name is not None:
            transaction = self.transaction(name)
            # ndb rolls back after a commit that failed, and tries the whole transaction again.
            del self.transactions[name]
            if transaction.read_only and mutations:
                raise _invalid("Cannot modify entities in a read-only transaction.")
            self._check_reads(transaction)
        else:
            keys = [key_bytes(_key_of(mutation)) for mutation in mutations if _is_complete(_key_of(mutation))]
            if len(set(keys)) < len(keys):
                raise _invalid(
                    "A non-transactional commit may not contain multiple mutations affecting the same entity."
                )
        changed: dict[bytes, tuple[int, Entity] | None] = {}
        results = [self._apply(mutation, changed) for mutation in mutations]
        for key, value in changed.items():
            if value is None:
                self.entities.pop(key, None)
            else:
                self.entities[key] = value
        return results

    def _check_reads(self, transaction: Transaction) -> None:
        for key, version in transaction.reads.items():
            if self.entities.get(key, (0,))[0] != version:
                raise Refused(
                    grpc.StatusCode.ABORTED, "too much contention on these datastore entities. please try again."
                )
        for query, partition, seen in transaction.queries:
            if [
                (key_bytes(entity.key), version) for version, entity in select(self.entities, query, partition)
            ] != seen:
                raise Refused(
                    grpc.StatusCode.ABORTED, "too much contention on these datastore entities. please try again."
                )

    def _apply(self, mutation: Mutation, changed: dict[bytes, tuple[int, Entity] | None]) -> Key | None:
        """[proto] Mutation: insert, update, upsert, delete. MutationResult: a key is given where one was allocated."""
        kind = Mutation.pb(mutation).WhichOneof("operation")
        if kind == "delete":
            changed[key_bytes(mutation.delete)] = None
            return None
        entity = Entity(getattr(mutation, kind))  # a copy
        allocated = None
        if not _is_complete(entity.key):
            allocated = entity.key = self.allocate(entity.key)
        _check_limits(entity)
        key = key_bytes(entity.key)
        there = changed.get(key, self.entities.get(key)) is not None
        if kind == "insert" and there:
            raise Refused(grpc.StatusCode.ALREADY_EXISTS, "entity already exists")
        if kind == "update" and not there:
            raise Refused(grpc.StatusCode.NOT_FOUND, "no entity to update")
        changed[key] = next(self._versions), entity
        return allocated

    def allocate(self, key: Key) -> Key:
        """[proto] AllocateIds: an id that no other entity has or gets."""
        if _is_complete(key):
            raise _invalid("The key path must be incomplete.")
        complete = Key(key)  # a copy
        complete.path[-1].id = next(self._ids)
        return complete

    # --- Reads ---

    def lookup(self, keys: list[Key], name: bytes | None) -> list[tuple[Key, int, Entity | None]]:
        """[proto] Lookup: by complete key; in a transaction, of its snapshot. Firestore in Datastore mode is strongly consistent."""
        if len(keys) > LOOKUP_KEYS:
            raise _invalid("cannot get more than 1000 keys in a single call")
        if not all(map(_is_complete, keys)):
            raise _invalid("The key path must be complete.")
        transaction = None if name is None else self.transaction(name)
        entities = self.entities if transaction is None else transaction.snapshot
        found = []
        for key in keys:
            version, entity = entities.get(key_bytes(key), (0, None))
            if transaction is not None:
                transaction.reads[key_bytes(key)] = version
            found.append((key, version, entity))
        return found

    def query(self, query: Query, partition: tuple[str, str], name: bytes | None) -> list[tuple[int, Entity]]:
        """[transactions]: a query in a transaction sees its snapshot, and conflicts with what changes its results."""
        transaction = None if name is None else self.transaction(name)
        found = select(self.entities if transaction is None else transaction.snapshot, query, partition)
        if transaction is not None:
            transaction.queries.append(
                (query, partition, [(key_bytes(entity.key), version) for version, entity in found])
            )
        return found

    def kind(self, kind: str) -> list[Entity]:
        """Return all entities of a kind, of any namespace, for assertions."""
        return [entity for _, entity in self.entities.values() if entity.key.path[-1].kind == kind]


def _key_of(mutation: Mutation) -> Key:
    kind = Mutation.pb(mutation).WhichOneof("operation")
    return mutation.delete if kind == "delete" else getattr(mutation, kind).key


def _is_complete(key: Key) -> bool:
    """[proto] Key.PathElement: the last one has an id or a name."""
    return bool(key.path) and bool(key.path[-1].id or key.path[-1].name)


def _check_limits(entity: Entity) -> None:
    """[limits], each answered with INVALID_ARGUMENT: [errors]."""
    if len(key_bytes(entity.key)) > KEY_BYTES:
        raise _invalid("The key is longer than 6 KiB.")
    if len(Entity.pb(entity).SerializeToString()) > ENTITY_BYTES:
        raise _invalid("entity is too big")
    for name, value in entity.properties.items():
        content = value.string_value.encode() or value.blob_value
        most = PROPERTY_BYTES if value.exclude_from_indexes else INDEXED_BYTES
        if len(content) > most:
            raise _invalid(f'The value of property "{name}" is longer than {most} bytes.')


def select(
    entities: dict[bytes, tuple[int, Entity]], query: Query, partition: tuple[str, str]
) -> list[tuple[int, Entity]]:
    """[queries]: all entities of the kind that match every filter, in order; by key where nothing else is said.

    An entity without the property of a filter, or with one that is not indexed, is not found.
    """
    found = [
        (version, entity)
        for version, entity in entities.values()
        if (entity.key.partition_id.database_id, entity.key.partition_id.namespace_id) == partition
        and all(entity.key.path[-1].kind == kind.name for kind in query.kind)
        and all(_matches(entity, each) for each in _filters(query))
    ]
    found.sort(key=lambda each: _rank(each[1].key))
    for order in reversed(query.order):
        name, backwards = order.property.name, order.direction == PropertyOrder.Direction.DESCENDING
        if name != "__key__":
            found = [each for each in found if name in each[1].properties]
        found.sort(key=lambda each, name=name: _comparable(each[1], name), reverse=backwards)
    return found


def _filters(query: Query) -> list[PropertyFilter]:
    composite = query.filter.composite_filter.filters
    single = query.filter.property_filter
    return [each.property_filter for each in composite] if composite else [single] if single.property.name else []


def _comparable(entity: Entity, name: str) -> object:
    return _rank(entity.key) if name == "__key__" else _plain(entity.properties[name])


def _plain(value: Value) -> object:
    kind = Value.pb(value).WhichOneof("value_type")
    return _rank(value.key_value) if kind == "key_value" else getattr(value, kind or "string_value")


def _matches(entity: Entity, each: PropertyFilter) -> bool:
    name, wanted, operator = each.property.name, _plain(each.value), PropertyFilter.Operator(each.op)
    if operator is PropertyFilter.Operator.HAS_ANCESTOR:
        return _rank(entity.key)[: len(wanted)] == wanted
    if name != "__key__" and (name not in entity.properties or entity.properties[name].exclude_from_indexes):
        return False
    mine = _comparable(entity, name)
    if type(mine) is not type(wanted):
        return False
    return {
        PropertyFilter.Operator.EQUAL: lambda: mine == wanted,
        PropertyFilter.Operator.LESS_THAN: lambda: mine < wanted,
        PropertyFilter.Operator.LESS_THAN_OR_EQUAL: lambda: mine <= wanted,
        PropertyFilter.Operator.GREATER_THAN: lambda: mine > wanted,
        PropertyFilter.Operator.GREATER_THAN_OR_EQUAL: lambda: mine >= wanted,
    }[operator]()
