"""Payloads that no claims are: wrong JSON, wrong members, and texts that a careless regex lets pass."""


def _args(text):
    """Return what puts raw JSON into ``args``."""
    return lambda good: good.replace('"args":[]', f'"args":[{text}]')


#: Comment: the payload, or a function of the right one.
JSON = {
    "null": "null",
    "a number": "1",
    "a string": '"claims"',
    "a list": "[]",
    "a list of the object": lambda good: f"[{good}]",
    "an empty object": "{}",
    "white space alone": " ",
    "a string that holds the object": lambda good: '"' + good.replace('"', '\\"') + '"',
    "bytes behind": lambda good: good + "x",
    "a brace behind": lambda good: good + "}",
    "a comma behind": lambda good: good + ",",
    "a second object behind": lambda good: good + good,
    "a zero behind": lambda good: good + "\0",
    "cut short": lambda good: good[:-1],
    "cut in a string": lambda good: good[:20],
    "a byte order mark": lambda good: "\ufeff" + good,
    "UTF-16, little-endian": lambda good: good.encode("utf-16-le"),
    "UTF-16, with a byte order mark": lambda good: good.encode("utf-16"),
    "UTF-32": lambda good: good.encode("utf-32-be"),
    "Latin-1": lambda good: _args('"é"')(good).encode("latin-1"),
    "an overlong slash": lambda good: _args('"?"')(good).encode().replace(b"?", b"\xc0\xaf"),
    "an overlong zero": lambda good: _args('"?"')(good).encode().replace(b"?", b"\xc0\x80"),
    "a surrogate in UTF-8": lambda good: _args('"?"')(good).encode().replace(b"?", b"\xed\xa0\x80"),
    "beyond U+10FFFF": lambda good: _args('"?"')(good).encode().replace(b"?", b"\xf4\x90\x80\x80"),
    "a lone continuation byte": lambda good: _args('"?"')(good).encode().replace(b"?", b"\x80"),
    "UTF-8 cut short": lambda good: _args('"?"')(good).encode().replace(b"?", b"\xe2\x82"),
    "an escaped lone high surrogate": _args('"\\ud800"'),
    "an escaped lone low surrogate": _args('"\\udc00"'),
    "escaped surrogates in the wrong order": _args('"\\udc00\\ud800"'),
    "NaN": _args("NaN"),
    "Infinity": _args("Infinity"),
    "-Infinity": _args("-Infinity"),
    "nan": _args("nan"),
    "undefined": _args("undefined"),
    "True": _args("True"),
    "single quotes": lambda good: good.replace('"', "'"),
    "a member name without quotes": lambda good: good.replace('"v"', "v"),
    "a comment": lambda good: good.replace("{", "{/* */", 1),
    "a line comment": lambda good: good + "// end",
    "a comma too many in an object": lambda good: good[:-1] + ",}",
    "a comma too many in a list": _args("1,"),
    "a comma too few": _args("1 2"),
    "a colon too few": lambda good: good.replace('"v":1', '"v" 1'),
    "a number with a zero in front": _args("01"),
    "a number with a plus": _args("+1"),
    "a number that begins with a dot": _args(".5"),
    "a number that ends with a dot": _args("1."),
    "a number with an empty exponent": _args("1e"),
    "a hexadecimal number": _args("0x10"),
    "a number with an underscore": _args("1_000"),
    "a full-width digit": _args("\uff11"),
    "a raw newline in a string": _args('"\n"'),
    "a raw tab in a string": _args('"\t"'),
    "a raw zero in a string": _args('"\0"'),
    "an unknown escape": _args('"\\x41"'),
    "a short escape": _args('"\\u12"'),
    "a no-break space for white space": lambda good: good.replace(":", ":\u00a0", 1),
    "a form feed for white space": lambda good: good.replace(":", ":\f", 1),
    "a member twice": lambda good: good.replace('"v":1', '"v":1,"v":1'),
    "aud twice": lambda good: good.replace('"aud"', '"aud":"test:default:default:/","aud"'),
    "aud twice, once escaped": lambda good: good.replace('"aud"', '"\\u0061ud":"test:default:default:/","aud"'),
    "kind twice in the call": lambda good: good.replace('"kind"', '"kind":"class","kind"'),
    "a member twice inside an argument": _args('[{"a":1,"a":1}]'),
    "a member twice inside an argument, once escaped": _args('{"a":1,"\\u0061":2}'),
    "a keyword argument twice": lambda good: good.replace('"kwargs":{}', '"kwargs":{"a":1,"a":2}'),
    "201 lists deep": _args("[" * 201 + "]" * 201),
    "201 objects deep": _args('{"a":' * 201 + "1" + "}" * 201),
    "lists that never close": _args("[" * 5000),
    "an integer of 5,000 digits": lambda good: good.replace('"iat":', '"iat":' + "9" * 5000),
    "1e999 for a time": lambda good: good.replace('"v":1', '"v":1').replace('"iat":1900000000', '"iat":1e999'),
    "-0 for the version": lambda good: good.replace('"v":1', '"v":-0'),
    "1.0 for the version": lambda good: good.replace('"v":1', '"v":1.0'),
    "1e0 for the version": lambda good: good.replace('"v":1', '"v":1e0'),
    "1.9e9 for a time": lambda good: good.replace('"nbf":1900000000', '"nbf":1.9e9'),
}

_NEEDED = (
    "v",
    "jti",
    "iat",
    "nbf",
    "exp",
    "aud",
    "cty",
    "call",
    "args",
    "kwargs",
    "call.kind",
    "call.module",
    "call.qualname",
)
_OPTIONAL = (
    "name",
    "blob",
    "retry",
    "deadline",
    "retry_of",
    "root",
    "headers",
    "trace",
    "call.member",
    "call.bound",
)
_BLOB = {"id": "f" * 32, "sha256": "0" * 64, "length": 1}
_SECONDS = ("min_backoff_seconds", "max_backoff_seconds", "task_age_limit")
_COUNTS = ("max_doublings", "task_retry_limit")
_ROOT = {"id": "0123456789abcdef", "kid": "now"}
_RECEIPT = {"$object": {"class": "tests.schema.tasks:Receipt", "state": {"number": 1}}}


def _kind(kind, **more):
    return {"call": {"kind": kind, "module": "tests.schema.tasks", "qualname": "Receipt", **more}}


def changes(now):
    """Comment: changes of the right claims, by dotted name."""
    return {
        **{f"no {name}": {name: "<absent>"} for name in _NEEDED},
        **{f"{name}: null": {name: None} for name in (*_NEEDED, *_OPTIONAL)},
        **{
            f"an unknown member {name}": {name: 1}
            for name in ("x", "V", "iss", "sub", "crit", "$tuple", "", "call.x", "call.args")
        },
        "v: 0": {"v": 0},
        "v: 2": {"v": 2},
        "v: text": {"v": "1"},
        "v: true": {"v": True},
        "v: a list": {"v": [1]},
        "jti: a number": {"jti": 1234567890123456},
        "jti: a list": {"jti": ["0123456789abcdef"]},
        "jti: 15 characters": {"jti": "a" * 15},
        "jti: 65 characters": {"jti": "a" * 65},
        "jti: empty": {"jti": ""},
        **{f"{name}: text": {name: str(now)} for name in ("iat", "nbf", "exp")},
        **{f"{name}: a float": {name: now + 0.5} for name in ("iat", "nbf", "exp")},
        **{f"{name}: true": {name: True} for name in ("iat", "nbf", "exp")},
        **{f"{name}: negative": {name: -1} for name in ("iat", "nbf", "exp")},
        **{f"{name}: beyond the year 9999": {name: 253_402_300_800} for name in ("iat", "nbf", "exp")},
        "iat: beyond 64 bits": {"iat": 2**64},
        "exp before nbf": {"exp": now - 1},
        "exp over 92 days after nbf": {"exp": now + 92 * 86_400 + 1},
        "aud: a list": {"aud": ["test:default:default:/_ah/queue/deferred"]},
        "aud: three parts": {"aud": "test:default:/_ah/queue/deferred"},
        "aud: an empty queue": {"aud": "test::default:/_ah/queue/deferred"},
        "aud: a queue of 101 characters": {"aud": f"test:{'q' * 101}:default:/"},
        "aud: no URL": {"aud": "test:default:default:"},
        "aud: a URL of another host": {"aud": "test:default:default://evil.example/"},
        "aud: a whole URL": {"aud": "test:default:default:https://evil.example/"},
        "aud: a relative URL": {"aud": "test:default:default:_ah/queue/deferred"},
        "aud: a query": {"aud": "test:default:default:/_ah/queue/deferred?x"},
        "aud: a fragment": {"aud": "test:default:default:/_ah/queue/deferred#x"},
        "aud: a space": {"aud": "test:default:default:/_ah/queue/def erred"},
        "aud: a URL of 2,049 characters": {"aud": f"test:default:default:/{'u' * 2048}"},
        "cty: json": {"cty": "json"},
        "cty: empty": {"cty": ""},
        "cty: in capitals": {"cty": "Typed"},
        "cty: a list": {"cty": ["typed"]},
        "name: empty": {"name": ""},
        "name: 501 characters": {"name": "a" * 501},
        "name: a number": {"name": 1},
        "args: an object": {"args": {}},
        "args: text": {"args": "[]"},
        "args: a tuple": {"args": {"$tuple": []}},
        "kwargs: a list": {"kwargs": []},
        "kwargs: pairs": {"kwargs": [["a", 1]]},
        "call: text": {"call": "tests.schema.tasks:echo"},
        "call: a list": {"call": []},
        "call: kind unknown": {"call.kind": "staticmethod"},
        "call: kind in capitals": {"call.kind": "Function"},
        "call: kind a number": {"call.kind": 0},
        "call: module of 256 characters": {"call.module": "m" * 256},
        "call: module empty": {"call.module": ""},
        "call: qualname of 256 characters": {"call.qualname": "q" * 256},
        "call: qualname empty": {"call.qualname": ""},
        "call: qualname a list": {"call.qualname": ["echo"]},
        "call: a local": {"call.qualname": "outer.<locals>.inner"},
        "call: a lambda": {"call.qualname": "<lambda>"},
        "call: a function with a member": {"call.member": "send"},
        "call: a function with an object": {"call.bound": 1},
        "call: a class with an object": _kind("class", bound=_RECEIPT),
        "call: an instance without one": _kind("instance"),
        "call: an instance with a member": _kind("instance", member="send", bound=_RECEIPT),
        "call: a method without a member": _kind("method", bound=_RECEIPT),
        "call: a method without an object": _kind("method", member="send"),
        "call: a class method without a member": _kind("classmethod"),
        "call: a class method with an object": _kind("classmethod", member="build", bound=_RECEIPT),
        "call: a built-in with a member": {
            "call": {"kind": "builtin", "module": "_operator", "qualname": "add", "member": "x"}
        },
        "call: a built-in method without an object": {
            "call": {"kind": "builtin_method", "module": "builtins", "qualname": "str", "member": "upper"}
        },
        **{
            f"call: the member {name}": _kind("method", member=name, bound=_RECEIPT)
            for name in ("__init__", "__class__", "__reduce__", "__globals__", "send.x", "", "__")
        },
        "call and blob": {"blob": _BLOB},
        "blob and args": {"call": "<absent>", "kwargs": "<absent>", "blob": _BLOB},
        "neither call nor blob": {"call": "<absent>", "args": "<absent>", "kwargs": "<absent>"},
        **{
            f"blob: {comment}": {"call": "<absent>", "args": "<absent>", "kwargs": "<absent>", "blob": blob}
            for comment, blob in {
                "text": "f" * 32,
                "no hash": {"id": "f" * 32, "length": 1},
                "an id with a slash": {**_BLOB, "id": "../../../../etc/passwd"},
                "an id of 15 characters": {**_BLOB, "id": "f" * 15},
                "a hash in capitals": {**_BLOB, "sha256": "F" * 64},
                "a hash of 63 digits": {**_BLOB, "sha256": "0" * 63},
                "length 0": {**_BLOB, "length": 0},
                "length true": {**_BLOB, "length": True},
                "length as text": {**_BLOB, "length": "1"},
                "an unknown member": {**_BLOB, "url": "https://evil.example/"},
            }.items()
        },
        "retry_of: a number": {"retry_of": 1},
        "retry_of: 15 characters": {"retry_of": "a" * 15},
        **{
            f"retry: {name}: {comment}": {"retry": {name: value}}
            for name in (*_SECONDS, *_COUNTS)
            for comment, value in {
                "null": None,
                "true": True,
                "text": "1",
                "a list": [1],
                "negative": -1,
                "2**31": 2**31,
            }.items()
        },
        **{f"retry: {name}: a fraction": {"retry": {name: 1.5}} for name in _COUNTS},
        **{f"retry: {name}: a count with a fraction of zero": {"retry": {name: 1.0}} for name in _COUNTS},
        "retry: a list": {"retry": []},
        "retry: text": {"retry": "{}"},
        "retry: a number": {"retry": 3},
        "retry: an unknown member": {"retry": {"limit": 1}},
        "retry: a least backoff above the largest": {"retry": {"min_backoff_seconds": 2, "max_backoff_seconds": 1}},
        **{
            f"deadline: {comment}": {"deadline": value}
            for comment, value in {
                "0": 0,
                "below a second": 0.999,
                "negative": -60,
                "above a day": 86_401,
                "above a day, by a fraction": 86_400.5,
                "text": "60",
                "true": True,
                "a list": [60],
            }.items()
        },
        "root without retry_of": {"root": _ROOT},
        **{
            f"root: {comment}": {"retry_of": "f" * 16, "root": root}
            for comment, root in {
                "text": "0123456789abcdef",
                "a list": ["0123456789abcdef", "now"],
                "empty": {},
                "no kid": {"id": "0123456789abcdef"},
                "no id": {"kid": "now"},
                "an id of 15 characters": {**_ROOT, "id": "f" * 15},
                "a kid of 65 characters": {**_ROOT, "kid": "k" * 65},
                "an empty kid": {**_ROOT, "kid": ""},
                "a kid that is null": {**_ROOT, "kid": None},
                "an unknown member": {**_ROOT, "queues": []},
            }.items()
        },
        "headers: a list": {"headers": [["X-A", "1"]]},
        "headers: a number": {"headers": {"X-A": 1}},
        "headers: null": {"headers": {"X-A": None}},
        "headers: a list of values": {"headers": {"X-A": ["1"]}},
        "headers: an empty name": {"headers": {"": "1"}},
        "headers: a name with a space": {"headers": {"X A": "1"}},
        "headers: a name with a colon": {"headers": {"X:A": "1"}},
        "headers: a name with a newline": {"headers": {"X-A\r\nX-B": "1"}},
        "headers: a name of 257 characters": {"headers": {"X" * 257: "1"}},
        "headers: a newline in a value": {"headers": {"X-A": "1\r\nX-B: 2"}},
        "headers: a letter beyond ASCII": {"headers": {"X-A": "é"}},
        "headers: a value of 4,097 characters": {"headers": {"X-A": "v" * 4097}},
        "trace: text": {"trace": "none"},
        "trace: in capitals": {"trace": "00-" + "A" * 32 + "-" + "b" * 16 + "-01"},
    }


_ID = "0123456789abcdef"
_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_MULTILINE = "\nx"

#: What `$` without an end-of-text anchor, `\w`, `\d` or a multi-line mode would let pass.
REGEX = {
    f"{name}: {what}": {name: text, **({"retry_of": _ID} if name == "root" else {})}
    for name, texts in {
        "jti": {
            "a newline behind": f"{_ID}\n",
            "a carriage return behind": f"{_ID}\r",
            "a line separator behind": f"{_ID}\u2028",
            "a second line": _ID + _MULTILINE,
            "a zero behind": f"{_ID}\0",
            "a letter beyond ASCII": f"{_ID}é",
            "an Arabic digit": f"{_ID}\u0661",
            "a full-width letter": f"{_ID}\uff21",
            "the Kelvin sign": f"{_ID}\u212a",
            "the long s": f"{_ID}\u017f",
            "a dot": f"{_ID}.",
        },
        "name": {
            "a newline behind": "a\n",
            "a newline in front": "\na",
            "a letter beyond ASCII": "\u00e4",
            "an Arabic digit": "\u0661",
            "a space": "a b",
            "a slash": "a/b",
        },
        "aud": {
            "a newline behind": "test:default:default:/_ah/queue/deferred\n",
            "a line behind": "test:default:default:/_ah/queue/deferred\nx",
            "a line in front": "x\ntest:default:default:/_ah/queue/deferred",
            "an Arabic digit": "test:\u0661:default:/_ah/queue/deferred",
            "an underscore in the queue": "test:de_fault:default:/_ah/queue/deferred",
            "a letter beyond ASCII in the path": "test:default:default:/\u00e9",
            "a delete character in the path": "test:default:default:/\x7f",
        },
        "call.module": {
            "a newline behind": "os\n",
            "a zero behind": "os\0",
            "a dot behind": "os.",
            "a dot in front": ".os",
            "two dots": "os..path",
            "a slash": "os/path",
            "a star": "os.*",
            "a colon": "os:system",
            "a digit in front": "1os",
            "a Cyrillic letter": "\u043es",
            "a full-width letter": "\uff4fs",
            "a mathematical letter": "\U0001d428s",
            "the long s": "o\u017f",
            "a zero-width joiner": "o\u200ds",
            "a combining mark": "o\u0308s",
            "an Arabic digit": "os\u0661",
        },
        "call.qualname": {
            "a newline behind": "echo\n",
            "a line behind": "echo\nx",
            "a Cyrillic letter": "\u0435cho",
            "a dot behind": "echo.",
            "a call": "echo()",
            "an index": "echo[0]",
        },
        "retry_of": {"a newline behind": f"{_ID}\n"},
        "root": {
            "a newline behind the id": {"id": f"{_ID}\n", "kid": "now"},
            "a newline behind the kid": {"id": _ID, "kid": "now\n"},
            "an Arabic digit in the kid": {"id": _ID, "kid": "now\u0661"},
            "a dot in the kid": {"id": _ID, "kid": "now."},
        },
        "trace": {"a newline behind": f"{_TRACE}\n", "an Arabic digit": _TRACE.replace("0", "\u0660", 1)},
        "headers": {
            "a value with a newline behind": {"X-A": "1\n"},
            "a name with a newline behind": {"X-A\n": "1"},
            "a name with a letter beyond ASCII": {"X-\u00e9": "1"},
        },
    }.items()
    for what, text in texts.items()
}  # fmt: skip
