"""Queries of ``google-cloud-ndb``, by their attributes: kind, ancestor, filters, orders, projection.

Not those with a filter that is a function, or with parameters that are bound later. Nothing is asked of the datastore.
"""

from __future__ import annotations

from typing import Any, Final

from safedefer.codecs.packs import PackedType
from safedefer.codecs.types.holders import holder

_NONE: Final = type(None)
_TEXT: Final = (str, _NONE)


def query_types(query: Any, key: Any) -> tuple[PackedType, ...]:
    """Return the types of ndb's module ``query``; ``key`` is the class of keys."""
    nodes = query.FilterNode, query.ConjunctionNode, query.DisjunctionNode, query.FalseNode

    def are_nodes(values: tuple[Any, ...]) -> bool:
        return bool(values[0]) and _all_of(values[0], nodes)

    def is_query(values: tuple[Any, ...]) -> bool:
        named = dict(zip(_QUERY, values, strict=True))
        return (
            any(type(named["filters"]) is each for each in (*nodes, _NONE))
            and _all_of(named["order_by"] or (), (query.PropertyOrder,))
            and all(_all_of(named[name] or (), (str,)) for name in ("projection", "distinct_on"))
        )

    fields: dict[str, tuple[type, ...] | None] = {**_QUERY, "ancestor": (key, _NONE)}
    return (
        PackedType("$google_ndb_query", (query.Query,), *holder(query.Query, fields, is_query)),
        PackedType("$google_ndb_filter", (query.FilterNode,), *holder(query.FilterNode, {
            "_name": (str,), "_opsymbol": (str,), "_value": None,
        })),
        PackedType("$google_ndb_and", (query.ConjunctionNode,), *holder(query.ConjunctionNode, {"_nodes": (list,)}, are_nodes)),
        PackedType("$google_ndb_or", (query.DisjunctionNode,), *holder(query.DisjunctionNode, {"_nodes": (list,)}, are_nodes)),
        PackedType("$google_ndb_false", (query.FalseNode,), *holder(query.FalseNode, {})),
        PackedType("$google_ndb_order", (query.PropertyOrder,), *holder(query.PropertyOrder, {"name": (str,), "reverse": (bool,)})),
    )  # fmt: skip


def _all_of(values: Any, kinds: tuple[type, ...]) -> bool:
    return all(any(type(each) is kind for kind in kinds) for each in values)


#: The attributes of a query, with their types.
_QUERY: Final[dict[str, tuple[type, ...] | None]] = {
    "default_options": (_NONE,),
    "kind": _TEXT,
    "ancestor": None,
    "filters": None,
    "order_by": (list, _NONE),
    "project": _TEXT,
    "database": _TEXT,
    "namespace": _TEXT,
    "limit": (int, _NONE),
    "offset": (int, _NONE),
    "keys_only": (bool, _NONE),
    "projection": (tuple, _NONE),
    "distinct_on": (tuple, _NONE),
}
