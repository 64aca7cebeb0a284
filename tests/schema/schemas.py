"""JSON Schemas (2020-12) of the header, the claims and the key file, made from the models that validate them.

A schema cannot say all that the models check: ``1.0`` is an integer to JSON Schema, duplicate members are
invisible to it, and times are not compared. ``schema/README.md`` says those in prose, the vectors show them.
"""

import itertools

from pydantic import TypeAdapter

from safedefer.claims import adapter
from safedefer.keyfile import _Jwks
from safedefer.keys import TOKEN_TYPE

DIALECT = "https://json-schema.org/draft/2020-12/schema"
KID = "^[A-Za-z0-9_-]{1,64}$"


def documents():
    return {"header": _header(), "claims": _claims(), "keys": _keys()}


def _document(name, title, schema):
    schema.pop("title", None)
    return {"$schema": DIALECT, "$id": f"urn:safedefer:schema:{name}:1", "title": title, **schema}


def _header():
    return _document(
        "header",
        "The protected header of a task token, decoded",
        {
            "description": "Compact JSON, in any order of its three members. A handler compares it byte for byte.",
            "type": "object",
            "additionalProperties": False,
            "required": ["alg", "kid", "typ"],
            "properties": {
                "alg": {"const": "HS256"},
                "kid": {"type": "string", "pattern": KID},
                "typ": {"const": TOKEN_TYPE},
            },
        },
    )


def _claims():
    schema = _plain(adapter().json_schema())
    task = ["call", "args", "kwargs"]
    schema["oneOf"] = [
        {"required": task, "properties": {"blob": False}},
        {"required": ["blob"], "properties": dict.fromkeys(task, False)},
    ]
    schema["dependentRequired"] = {"root": ["retry_of"]}
    call = schema["$defs"]["Call"]
    kinds = call["properties"]["kind"]["enum"]
    call["oneOf"] = [
        {
            "title": f"{'with' if member else 'without'} member, {'with' if bound else 'without'} bound",
            "properties": {
                "kind": {"enum": group},
                **({} if member else {"member": False}),
                **({} if bound else {"bound": False}),
            },
            "required": [*(["member"] if member else []), *(["bound"] if bound else [])],
        }
        for member, bound in itertools.product((False, True), repeat=2)
        if (group := [k for k in kinds if (k in _MEMBER, k in _BOUND) == (member, bound)])
    ]
    return _document("claims", "The payload of a task token, decoded", schema)


_MEMBER = ("method", "classmethod", "builtin_method")
_BOUND = ("instance", "method", "builtin_method")


def _keys():
    schema = _plain(TypeAdapter(_Jwks).json_schema())
    key = schema["$defs"]["_Jwk"]["properties"]
    key["kid"] = {"type": "string", "pattern": KID}
    key["k"] = {"type": "string", "pattern": "^[A-Za-z0-9_-]{43,}$"}
    return _document("keys", "A key file: a JWK Set (RFC 7517) of oct keys", schema)


def _plain(node):
    """Leave out titles and defaults, and the null that stands for an absent member: none may be written."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    if {"type": "null"} in node.get("anyOf", ()):
        (only,) = [item for item in node["anyOf"] if item != {"type": "null"}]
        node = {**{k: v for k, v in node.items() if k != "anyOf"}, **only}
    # pydantic means its patterns of names as exhaustive.
    if "patternProperties" in node:
        node = {**node, "additionalProperties": False}
    return {
        key: {name: _plain(item) for name, item in value.items()} if key in {"properties", "$defs"} else _plain(value)
        for key, value in node.items()
        if key not in {"title", "default"}
    }
