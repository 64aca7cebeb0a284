"""App Engine's values, of ``google-cloud-ndb``: keys, entities, queries, cursors, ``GeoPt``, ``User``, ``BlobKey``.

An entity travels by its state: its class, key, stored values, projection, and the properties that an ``Expando`` has
beyond its class. The class is named as a value, so the policy must admit it. Neither ``__init__`` nor a hook nor a property of
the class runs, and nothing here asks for a context or a client. Needs ndb imported.
"""

from __future__ import annotations

import sys
from typing import Any, Final, NoReturn

from safedefer.codecs import inspect_safely
from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import Refusal, VersionSkew, step
from safedefer.codecs.types.holders import holder, own_state
from safedefer.codecs.types.ndb_queries import query_types

_MODULE: Final = "google.cloud.ndb"
_STATE: Final = frozenset({"_entity_key", "_values", "_projection", "_properties"})
_HOOKS: Final = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
#: What a property that was made for one entity says of itself: its name, and how it is stored.
_SETTINGS: Final = frozenset(
    {"_name", "_code_name", "_indexed", "_repeated", "_compressed", "_write_empty_list", "_verbose_name", "_required"}
)


def _types() -> tuple[PackedType, ...]:
    model: Any = sys.modules[f"{_MODULE}.model"]
    query: Any = sys.modules[f"{_MODULE}._datastore_query"]
    key: Any = sys.modules[f"{_MODULE}.key"].Key
    stored_key: Any = sys.modules["google.cloud.datastore.key"].Key
    stored: Any = sys.modules["google.cloud.datastore.entity"].Entity
    entities = _Entities(model, key)
    keys = _Keys(key, stored_key)
    return (
        PackedType("$google_ndb_key", (key,), keys.parts, keys.key),
        PackedType("$google_ndb_entity", (), entities.parts, entities.entity, base=model.Model, own=("[0]", "[2]")),
        PackedType("$google_ndb_cursor", (query.Cursor,), *holder(query.Cursor, {"cursor": (bytes, type(None))})),
        PackedType("$google_ndb_geopt", (model.GeoPt,), *holder(model.GeoPt, {"latitude": (float, int), "longitude": (float, int)})),
        PackedType("$google_ndb_user", (model.User,), *holder(model.User, {
            "_email": (str,), "_auth_domain": (str,), "_user_id": (str, type(None)),
        })),
        PackedType("$google_ndb_blobkey", (model.BlobKey,), *holder(model.BlobKey, {"_blob_key": (bytes, type(None))})),
        PackedType("$google_ndb_stored", (model._BaseValue,), *holder(model._BaseValue, {"b_val": None})),
        PackedType("$google_ndb_compressed", (model._CompressedValue,), *_compressed(model._CompressedValue)),
        *query_types(sys.modules[f"{_MODULE}.query"], key),
        *(PackedType("$google_ndb_live", (), _refuse, _refuse, base=live) for live in _live()),
        PackedType("$google_datastore_key", (stored_key,), keys.stored_parts, keys.stored),
        PackedType("$google_datastore_entity", (stored,), *_stored_entities(stored, stored_key)),
    )  # fmt: skip


def _live() -> tuple[type, ...]:
    """Return the classes whose objects are parts of this process: whatever the policy admits, they are no values."""
    names = {"client": "Client", "context": "_Context", "tasklets": "Future", "_datastore_query": "QueryIterator"}
    return tuple(getattr(sys.modules[f"{_MODULE}.{module}"], name) for module, name in names.items())


def _refuse(_: object) -> NoReturn:
    raise Refusal("it is a client, a connection or a call under way of this process; pass an id, and have the task ask")


def _compressed(cls: Any) -> tuple[Any, Any]:
    """Return the functions of compressed values, which are bytes and hold these bytes as an attribute too."""

    def parts(value: Any) -> tuple[bytes]:
        own, content = own_state(value), bytes.__getnewargs__(value)[0]
        if own.keys() != {"z_val"} or type(own["z_val"]) is not bytes or own["z_val"] != content:
            raise Refusal(
                "an attribute was added to the compressed value, or it holds what it should not; pass the key"
            )
        return (content,)

    def make(values: Any) -> object:
        if type(values) is not tuple or len(values) != 1 or type(values[0]) is not bytes:
            raise Refusal("$google_ndb_compressed is a tuple of $bytes")
        made = bytes.__new__(cls, values[0])
        own_state(made)["z_val"] = values[0]
        return made

    return parts, make


class _Keys:
    """Keys of ndb, and those of the datastore library that they hold."""

    def __init__(self, key: Any, stored: Any) -> None:
        self._key = key
        self._stored = stored

    def stored_parts(self, value: Any) -> tuple[Any, ...]:
        """Return flat path, project, namespace and database."""
        return tuple(value.flat_path), value.project, value.namespace, value.database

    def stored(self, parts: Any) -> Any:
        """Make a key of the datastore library."""
        path, project, namespace, database = parts if type(parts) is tuple and len(parts) == 4 else (None,) * 4  # noqa: PLR2004
        if (
            type(path) is not tuple
            or not path
            or any(type(kind) is not str for kind in path[::2])
            or any(type(name) not in (int, str) for name in path[1::2])
            or type(project) is not str
            or any(type(each) not in (str, type(None)) for each in (namespace, database))
        ):
            raise Refusal("here must be the path, project, namespace and database of a key")
        return self._stored(*path, project=project, namespace=namespace, database=database)

    def parts(self, value: Any) -> tuple[Any, ...]:
        """Return the parts of the datastore's key, and the reference that the key was read from (urlsafe, serialized)."""
        added = {
            name: each for name, each in own_state(value).items() if name not in {"_key", "_reference", "_hash_value"}
        }
        if added:
            instead = {step(name): each for name, each in added.items()}
            raise Refusal("attributes were added to the key; pass them as arguments of their own", instead=instead)
        read = value._reference
        return *self.stored_parts(value._key), None if read is None else read.SerializeToString(deterministic=True)

    def key(self, parts: Any) -> Any:
        """Make a key. One that was read from a reference keeps it: another one may lack the location of the application."""
        if type(parts) is not tuple or len(parts) != 5 or type(parts[4]) not in (bytes, type(None)):  # noqa: PLR2004
            raise Refusal("here must be the path, project, namespace, database and reference of a key")
        stored = self.stored(parts[:4])
        if parts[4] is None:
            return self._key._from_ds_key(stored)
        made = self._key(serialized=parts[4])
        if made._key != stored:
            raise Refusal("the reference of the key is that of another key")
        return made


class _Entities:
    """Entities of any model class."""

    def __init__(self, model: Any, key: Any) -> None:
        self._model = model
        self._key = key
        self._plain = {"Model": model.Model, "Expando": model.Expando}
        self._dynamic = {"GenericProperty": model.GenericProperty, "StructuredProperty": model.StructuredProperty}

    def parts(self, value: Any) -> tuple[Any, ...]:
        """Return class, key, stored values, projection and dynamic properties."""
        cls = type(value)
        self._check_class(cls)
        own = own_state(value)
        added = own.keys() - _STATE
        if added:
            raise Refusal(
                f"the entity has attributes beside its properties ({', '.join(sorted(added))}), "
                "which the datastore would not keep; pass them as arguments of their own, or pass the key",
                instead={
                    ".__class__": cls,
                    "": own.get("_values"),
                    **{step(name): own[name] for name in added},
                },
            )
        dynamic = self._dynamic_parts(cls, own.get("_properties"))
        key = own.get("_entity_key")
        values, projection = own.get("_values", {}), own.get("_projection", ())
        self._check_state(cls, (key, values, projection), {name for name, *_ in dynamic})
        return self._name(cls), key, values, projection, tuple(dynamic)

    def entity(self, parts: Any) -> object:
        """Make an entity without ``__init__``."""
        if type(parts) is not tuple or len(parts) != 5 or type(parts[4]) is not tuple:  # noqa: PLR2004
            raise Refusal("$google_ndb_entity is class, key, values, projection and dynamic properties")
        name, key, values, projection, dynamic = parts
        cls = self._class(name)
        properties = dict(map(self._property, dynamic))
        self._check_state(cls, (key, values, projection), properties.keys())
        if properties.keys() & self._declared(cls).keys():
            raise VersionSkew(
                "a property beyond the class is one of the class here; deploy the code that the task was made for"
            )
        made = object.__new__(cls)
        own = own_state(made)
        own["_values"] = values
        if key is not None:
            own["_entity_key"] = key
        if projection:
            own["_projection"] = projection
        if properties:
            own["_properties"] = {**self._declared(cls), **properties}
        return made

    def _name(self, cls: type) -> object:
        return next((name for name, plain in self._plain.items() if cls is plain), cls)

    def _class(self, name: Any) -> Any:
        cls: Any = self._plain.get(name) if type(name) is str else name
        if not issubclass(type(cls), type) or not inspect_safely.derives(cls, self._model.Model):
            raise VersionSkew("the entity's class is no model here; deploy the code that the task was made for")
        self._check_class(cls)
        return cls

    def _check_class(self, cls: type) -> None:
        for hook in _HOOKS:
            found = inspect_safely.lookup(cls, hook)
            if found is not None and found[0] is not object and found[0] is not self._model.Model:
                raise Refusal(f"its class defines {hook}; pass the key")
        if any(True for _ in inspect_safely.slots(cls, stop=object)):
            raise Refusal("its class has slots; pass the key")

    @staticmethod
    def _declared(model: type) -> dict[str, Any]:
        found = inspect_safely.lookup(model, "_properties")
        return found[1] if found is not None and type(found[1]) is dict else {}

    def _check_state(self, cls: type, state: tuple[Any, Any, Any], dynamic: Any) -> None:
        key, values, projection = state
        if key is not None and type(key) is not self._key:
            raise Refusal("the key of an entity is a Key")
        if type(values) is not dict or any(type(name) is not str for name in values):
            raise Refusal("the values of an entity are a dict of property names")
        if type(projection) is not tuple or any(type(name) is not str for name in projection):
            raise Refusal("the projection of an entity is a tuple of names")
        unknown = values.keys() - self._declared(cls).keys() - set(dynamic)
        if unknown:
            raise VersionSkew("a value is of no property of the class; deploy the code that the task was made for")

    def _dynamic_parts(self, cls: type, properties: Any) -> list[tuple[Any, ...]]:
        if properties is None:
            return []
        declared = self._declared(cls)
        if type(properties) is not dict or any(properties.get(name) is not declared[name] for name in declared):
            raise Refusal("the entity replaces properties of its class; pass the key")
        found = []
        for name, each in properties.items():
            if name in declared:
                continue
            kind = next((label for label, known in self._dynamic.items() if type(each) is known), None)
            settings = {key: value for key, value in own_state(each).items() if key != "_model_class"}
            if kind is None or not _are_settings(settings) or settings.get("_name") != name:
                raise Refusal("a property of this entity alone is no plain one; pass the key")
            found.append(
                (name, kind, settings, self._name(each._model_class) if "_model_class" in own_state(each) else None)
            )
        return found

    def _property(self, parts: Any) -> tuple[str, Any]:
        if type(parts) is not tuple or len(parts) != 4:  # noqa: PLR2004
            raise Refusal("a dynamic property is name, type, settings and model class")
        name, kind, settings, cls = parts
        if (
            type(name) is not str
            or type(kind) is not str
            or kind not in self._dynamic
            or not _are_settings(settings)
            or settings.get("_name") != name
            or (kind == "StructuredProperty") != (cls is not None)
        ):
            raise Refusal("a dynamic property is name, type, settings and model class")
        made = object.__new__(self._dynamic[kind])
        own_state(made).update(settings)
        if cls is not None:
            own_state(made)["_model_class"] = self._class(cls)
        return name, made


def _are_settings(settings: Any) -> bool:
    return (
        type(settings) is dict
        and settings.keys() <= _SETTINGS
        and all(type(value) in (str, bool, type(None)) for value in settings.values())
    )


def _stored_entities(cls: Any, key: Any) -> tuple[Any, Any]:
    """Return the functions of the datastore library's entities, which hold the structured values of a read entity."""

    def parts(value: Any) -> tuple[Any, ...]:
        own = own_state(value)
        if not own.keys() <= {"key", "exclude_from_indexes", "_meanings"} or type(own.get("_meanings")) is not dict:
            raise Refusal("attributes were added to the stored entity; pass them as arguments of their own")
        return own.get("key"), dict(dict.items(value)), frozenset(own["exclude_from_indexes"]), own["_meanings"]

    def make(values: Any) -> object:
        kinds = (None, dict, frozenset, dict)
        if (
            type(values) is not tuple
            or len(values) != len(kinds)
            or type(values[0]) not in (key, type(None))
            or any(kind is not None and type(each) is not kind for each, kind in zip(values, kinds, strict=True))
            or any(type(name) is not str for name in (*values[1], *values[2], *values[3]))
        ):
            raise Refusal("here must be the parts of a stored entity")
        made = cls(key=values[0], exclude_from_indexes=tuple(values[2]))
        dict.update(made, values[1])
        made._meanings = values[3]
        return made

    return parts, make


PACK: Final = Pack(_MODULE, _types)
