"""Names that may not run or are not there, and values that do not decode."""

TASKS = "tests.schema.tasks"


def _call(kind, name, **more):
    module, _, qualname = name.partition(":")
    return {"call": {"kind": kind, "module": module, "qualname": qualname, **more}}


def _function(name):
    return _call("function", name)


def _inside(tree):
    return {"args": [{"$tuple": [{"a": [tree]}]}]}


_RECEIPT = {"$object": {"class": f"{TASKS}:Receipt", "state": {"number": 1}}}
_EVAL = {"$callable": {"kind": "builtin", "module": "builtins", "qualname": "eval"}}

#: Comment, slug, kid, changes of the right claims.
NAMES = [
    *[
        (f"a key of one queue: {what}", "capability-exceeded", "mail-only", changes)
        for what, changes in {
            "another queue": {},
            "another queue, by a pointer": {
                "call": None, "args": None, "kwargs": None, "blob": {"id": "f" * 32, "sha256": "0" * 64, "length": 1},
            },
            "another queue, re-run": {"retry_of": "f" * 32},
            "another queue, expired too": {"exp": 1_899_999_000, "nbf": 1_899_998_000},
        }.items()
    ],
    *[
        (f"a narrow key: {what}", "capability-exceeded", "narrow", changes)
        for what, changes in {
            "another function": _function(f"{TASKS}:other"),
            "another class": _call("class", f"{TASKS}:Receipt"),
            "a method of another class": _call("method", f"{TASKS}:Receipt", member="send", bound=_RECEIPT),
            "a class method of another class": _call("classmethod", f"{TASKS}:Receipt", member="build"),
            "an instance of another class": _call("instance", f"{TASKS}:Receipt", bound=_RECEIPT),
            "another built-in": _call("builtin", "_operator:add"),
            "a name that has moved to one of its own": _function(f"{TASKS}:former"),
            "what no policy admits": _function("os:system"),
            "a class inside the arguments": _inside({"$class": f"{TASKS}:Elsewhere"}),
            "a callable inside the arguments": _inside({"$callable": _function(f"{TASKS}:other")["call"]}),
            "an object inside the arguments": _inside(_RECEIPT),
            "an enum inside the arguments": _inside({"$enum": [f"{TASKS}:Color", "RED"]}),
            "a dataclass inside the arguments": _inside({"$dataclass": [f"{TASKS}:Order", {}]}),
            "a model inside the arguments": _inside({"$model": [f"{TASKS}:Customer", {}, [], None, None]}),
            "an exception inside the arguments": _inside({"$exception": [f"{TASKS}:Refused", [], {}]}),
            "a named class that moved, inside the arguments": _inside({"$namedtuple": [f"{TASKS}:OldPoint", 1, 2]}),
            "a class in a keyword argument": {"kwargs": {"a": {"$class": f"{TASKS}:Elsewhere"}}},
            "a dead letter of another function, re-run": {"retry_of": "f" * 32, **_function(f"{TASKS}:other")},
        }.items()
    ],
    ("a key that may not sign pickles", "capability-exceeded", "now", {"cty": "pickle", "args": ["gASVCgAAAAAAAAApKX2HlC4=", "3.11", "3.1.2"]}),
    ("a key that may, where pickles are off", "policy-violation", "pickles", {"cty": "pickle", "args": ["gASVCgAAAAAAAAApKX2HlC4=", "3.11", "3.1.2"]}),
    *[
        (f"no pattern admits {name}", "policy-violation", "now", _function(name))
        for name in (
            "os:system", "posix:system", "subprocess:run", "shutil:rmtree", "antigravity:geohash", "this:s", "pickle:loads",
            "importlib:import_module", "runpy:run_module", "ctypes:CDLL", "tests:echo", "tests.schema:echo", "tests.schema.vectors:mint",
            "tests.schema.tasks.inner:f", "tests.schema.tasksx:echo", "tests.schema.task:echo", "tests.schema.Tasks:echo",
            "xtests.schema.tasks:echo", "__main__:main", "__mp_main__:main", "safedefer.app:new_task_id", "safedefer.deferred:invoke_member",
            "operator:sub", "operator:add.x", "operator:add",
        )
    ],
    *[
        (f"no pattern admits the built-in {name}", "policy-violation", "now", _call("builtin", name))
        for name in ("builtins:eval", "builtins:exec", "builtins:getattr", "builtins:print", "builtins:open", "_operator:sub", "_operator:methodcaller", "posix:system", "time:sleep")
    ],
    *[
        (f"no pattern admits the built-in method {member}", "policy-violation", "now", _call("builtin_method", name, member=member, bound=bound))
        for name, member, bound in (
            ("builtins:str", "format", "{0.__class__}"),
            ("builtins:str", "format_map", "{a}"),
            ("builtins:str", "encode", "x"),
            ("builtins:bytes", "decode", {"$bytes": "YQ=="}),
            ("builtins:bytes", "join", {"$bytes": "YQ=="}),
            ("builtins:int", "from_bytes", {"$class": "builtins:int"}),
            ("builtins:set", "isdisjoint", {"$set": [-1]}),
            ("builtins:list", "extend", []),
            ("builtins:list", "append", []),
            ("builtins:str", "split", "a"),
        )
    ],
    *[
        (f"an inherited member: {member}", "policy-violation", "now", _call("classmethod", f"{TASKS}:Customer", member=member))
        for member in ("parse_raw", "parse_file", "parse_obj", "model_construct", "model_validate", "model_validate_json", "model_rebuild", "from_orm", "construct")
    ],
    ("a built-in type as the callee", "policy-violation", "now", _call("class", "builtins:list")),
    ("type as the callee", "policy-violation", "now", _call("class", "builtins:type")),
    ("object as the callee", "policy-violation", "now", _call("class", "builtins:object")),
    *[
        (f"inside the arguments: {what}", "policy-violation", "now", _inside(tree))
        for what, tree in {
            "a built-in that is a gadget": _EVAL,
            "a gadget as a factory": {"$defaultdict": [_EVAL]},
            "a class of the standard library": {"$class": "subprocess:Popen"},
            "an object of the standard library": {"$object": {"class": "threading:Thread"}},
            "an enum of the standard library": {"$enum": ["signal:Signals", "SIGINT"]},
            "a module that acts when it is imported": {"$class": "antigravity:X"},
            "an exception of the standard library": {"$exception": ["json.decoder:JSONDecodeError", [], {}]},
            "a class name that is none": {"$class": "tests.schema.tasks"},
            "a class name with a newline": {"$class": "tests.schema.tasks:Receipt\n"},
            "a class name with a zero": {"$class": "os\0:system"},
            "a class name in Cyrillic": {"$class": "tests.schema.tasks:R\u0435ceipt"},
            "a class name of 600 characters": {"$class": "tests.schema.tasks:" + "R" * 600},
            "an empty class name": {"$class": ""},
            "a parent package": {"$class": "tests.schema:tasks"},
            "pathlib's Path as a class": {"$class": "pathlib:Path"},
        }.items()
    ],
    *[
        (what, "unresolvable-callable", "now", changes)
        for what, changes in {
            "a function that is not there": _function(f"{TASKS}:gone"),
            "a function in capitals": _function(f"{TASKS}:ECHO"),
            "a class as a function": _function(f"{TASKS}:Receipt"),
            "a function as a class": _call("class", f"{TASKS}:echo"),
            "a function as a built-in": _call("function", "_operator:add"),
            "a nested class": _call("class", f"{TASKS}:Outer.Choice"),
            "a method as a function": _function(f"{TASKS}:Receipt.send"),
            "a re-export": _call("class", f"{TASKS}:BaseModel"),
            "a re-exported module": _function(f"{TASKS}:enum"),
            "a function of a re-exported module": _function(f"{TASKS}:enum.unique"),
            "what is no callable": _function(f"{TASKS}:__file__"),
            "a method that is not there": _call("method", f"{TASKS}:Receipt", member="gone", bound=_RECEIPT),
            "a class method as a method": _call("method", f"{TASKS}:Receipt", member="build", bound=_RECEIPT),
            "a method as a class method": _call("classmethod", f"{TASKS}:Receipt", member="send"),
            "a method of another object": _call("method", f"{TASKS}:Receipt", member="send", bound={"$object": {"class": f"{TASKS}:Stated", "setstate": [1]}}),
            "a method of a number": _call("method", f"{TASKS}:Receipt", member="send", bound=1),
            "an instance that is a class": _call("instance", f"{TASKS}:Receipt", bound={"$class": f"{TASKS}:Receipt"}),
            "an instance that cannot be called": _call("instance", f"{TASKS}:Order", bound={"$dataclass": [f"{TASKS}:Order", {}]}),
            "a built-in method of another type": _call("builtin_method", "builtins:str", member="upper", bound=1),
            "arguments that do not bind": {**_call("class", f"{TASKS}:Receipt"), "args": [1, 2, 3]},
            "a keyword that the callable does not take": {**_call("class", f"{TASKS}:Receipt"), "kwargs": {"color": 1}},
            "a class inside the arguments that is not there": _inside({"$class": f"{TASKS}:Gone"}),
            "a class inside the arguments that is a function": _inside({"$class": f"{TASKS}:echo"}),
            "a class inside the arguments that is a re-export": _inside({"$class": f"{TASKS}:BaseModel"}),
            "a callable inside the arguments that is not there": _inside({"$callable": _function(f"{TASKS}:gone")["call"]}),
        }.items()
    ],
]  # fmt: skip


def _multiple(n):
    number = n * (2**61 - 1)
    return {"$int": str(number)} if number else 0


#: Lists, each of which holds the one before it by its number.
_CHAIN = [[], *([{"$ref": n}] for n in range(1, 64))]

#: Comment: a tree.
VALUES = {
    "1e999 as $float": {"$float": "1e999"},
    "an integer beyond 2**53-1": 2**53,
    "an integer below -(2**53-1)": -(2**53),
    "an integer of 40 digits": 10**39,
    "$int within 2**53-1": {"$int": "9007199254740991"},
    "$int with zeros in front": {"$int": "0009007199254740992"},
    "$int with a plus": {"$int": "+9007199254740992"},
    "$int with a newline behind": {"$int": "9007199254740992\n"},
    "$int in Arabic digits": {"$int": "\u0669" * 17},
    "$int with underscores": {"$int": "9_007_199_254_740_992"},
    "$int as a number": {"$int": 1},
    "$int of 4,301 digits": {"$int": "9" * 4301},
    "$float of a number": {"$float": 1.5},
    "$float NaN": {"$float": "NaN"},
    "$complex of integers": {"$complex": [1, 2]},
    "$decimal not in its own spelling": {"$decimal": "+1"},
    "$decimal with a small e": {"$decimal": "1e+3"},
    "$decimal in full-width digits": {"$decimal": "\uff11"},
    "$decimal with a newline behind": {"$decimal": "1\n"},
    "$fraction not in lowest terms": {"$fraction": [2, 4]},
    "$fraction over zero": {"$fraction": [1, 0]},
    "$range with step 0": {"$range": [0, 1, 0]},
    "$slice of two": {"$slice": [1, 2]},
    "$ellipsis: null": {"$ellipsis": None},
    "$str of plain text": {"$str": "YWJj"},
    "$str that is no UTF-8": {"$str": "/w=="},
    "$bytes in base64url": {"$bytes": "_-8="},
    "$bytes without padding": {"$bytes": "YQ"},
    "$bytes with unused bits": {"$bytes": "YR=="},
    "$bytes with a newline behind": {"$bytes": "YQ==\n"},
    "$bytes with more behind": {"$bytes": "YQ==YQ=="},
    "$bytearray of a list": {"$bytearray": [1]},
    "$datetime with Z": {"$datetime": ["2030-01-01T00:00:00Z", 0, None]},
    "$datetime with an offset": {"$datetime": ["2030-01-01T00:00:00+00:00", 0, None]},
    "$datetime of a date": {"$datetime": ["2030-01-01", 0, None]},
    "$datetime with a space": {"$datetime": ["2030-01-01 00:00:00", 0, None]},
    "$datetime of the 30th of February": {"$datetime": ["2030-02-30T00:00:00", 0, None]},
    "$datetime with fold 2": {"$datetime": ["2030-01-01T00:00:00", 2, None]},
    "$datetime with a zone of text": {"$datetime": ["2030-01-01T00:00:00", 0, "UTC"]},
    "$date of a week": {"$date": "2030-W01-1"},
    "$time with T": {"$time": ["T00:00:00", 0, None]},
    "$timedelta not normal": {"$timedelta": [0, 86400, 0]},
    "$timedelta of floats": {"$timedelta": [0.5, 0, 0]},
    "$timezone of a day": {"$timezone": [1, 0, 0, None]},
    "$zoneinfo out of the database": {"$zoneinfo": "../../etc/passwd"},
    "$zoneinfo absolute": {"$zoneinfo": "/etc/localtime"},
    "$zoneinfo with a newline behind": {"$zoneinfo": "UTC\n"},
    "$zoneinfo unknown": {"$zoneinfo": "Mars/Olympus"},
    "$uuid in capitals": {"$uuid": ["12345678-1234-5678-1234-56781234567A", None]},
    "$uuid in braces": {"$uuid": ["{12345678-1234-5678-1234-567812345678}", None]},
    "$path of another class": {"$path": ["Popen", "x"]},
    "$path not normal": {"$path": ["PurePosixPath", "a//b"]},
    "$ip not in its own spelling": {"$ip": ["IPv6Address", "0:0:0:0:0:0:0:1"]},
    "$ip with zeros in front": {"$ip": ["IPv4Address", "192.0.02.1"]},
    "$ip of a host name": {"$ip": ["IPv4Address", "localhost"]},
    "$pattern that does not compile": {"$pattern": ["(", 32]},
    "$pattern with flags that Python does not report": {"$pattern": ["a", 0]},
    "$pattern of 1,025 characters": {"$pattern": ["a" * 1025, 32]},
    "17 patterns": [{"$pattern": [f"a{i}", 32]} for i in range(17)],
    "$tuple of an object": {"$tuple": {}},
    "$set of a list": {"$set": [[]]},
    "$set of equals": {"$set": [1, True]},
    "$frozenset of a dict": {"$frozenset": [{}]},
    "$dict that would do without": {"$dict": [["a", 1]]},
    "$dict of triples": {"$dict": [[1, 2, 3]]},
    "$dict of equal keys": {"$dict": [[1, 1], [1.0, 2]]},
    "$dict of a list as key": {"$dict": [[[], 1]]},
    "$ordereddict of an object": {"$ordereddict": {"a": 1}},
    "$counter of equal keys": {"$counter": [["a", 1], ["a", 2]]},
    "$defaultdict of a number": {"$defaultdict": [1]},
    "$deque that is too full": {"$deque": [1, 1, 2]},
    "$enum by value": {"$enum": [f"{TASKS}:Color", 1]},
    "$enum of an unknown member": {"$enum": [f"{TASKS}:Color", "MAUVE"]},
    "$enum of an attribute": {"$enum": [f"{TASKS}:Color", "__class__"]},
    "$enum of a flag that has a name": {"$enum": [f"{TASKS}:Access", 1]},
    "$enum of an unknown bit": {"$enum": [f"{TASKS}:Access", 8]},
    "$namedtuple that is too short": {"$namedtuple": [f"{TASKS}:Point", 1]},
    "$namedtuple of another class": {"$namedtuple": [f"{TASKS}:Order", 1, 2]},
    "$dataclass of another class": {"$dataclass": [f"{TASKS}:Receipt", {}]},
    "$dataclass with a tag for an attribute": {"$dataclass": [f"{TASKS}:Order", {"$x": 1}]},
    "$model of another class": {"$model": [f"{TASKS}:Order", {}, [], None, None]},
    "$model with a field given twice": {"$model": [f"{TASKS}:Customer", {}, ["name", "name"], None, None]},
    "$model of three parts": {"$model": [f"{TASKS}:Customer", {}, []]},
    "$object of a dataclass": {"$object": {"class": f"{TASKS}:Order"}},
    "$object of a built-in type": {"$object": {"class": "builtins:list", "items": []}},
    "$object without a class": {"$object": {"state": {}}},
    "$object with an unknown part": {"$object": {"class": f"{TASKS}:Receipt", "x": 1}},
    "$object with state for __setstate__": {"$object": {"class": f"{TASKS}:Stated", "state": {}}},
    "$object whose __setstate__ fails": {"$object": {"class": f"{TASKS}:Stated", "setstate": 5}},
    "$object with arguments that do not fit": {"$object": {"class": f"{TASKS}:Arguments", "args": [1, 2, 3]}},
    "$exception of a class that is none": {"$exception": [f"{TASKS}:Order", [], {}]},
    "$exception with a traceback": {"$exception": ["builtins:ValueError", [], {"__traceback__": None}]},
    "$exception with a cause that is none": {"$exception": ["builtins:ValueError", [], {"__cause__": 1}]},
    "$callable of text": {"$callable": f"{TASKS}:echo"},
    "$callable of a class": {"$callable": {"kind": "class", "module": TASKS, "qualname": "Receipt"}},
    "$callable with a zero in the module": {"$callable": {"kind": "function", "module": "os\0", "qualname": "system"}},
    "$callable with null": {"$callable": {"kind": "function", "module": TASKS, "qualname": "echo", "member": None}},
    "$class of a number": {"$class": 1},
    "$ref to nothing": {"$ref": 0},
    "$ref forward": [{"$ref": 1}, []],
    "$ref below 0": [{"$ref": -1}],
    "$ref of text": [{"$ref": "0"}],
    "$ref of true": [[], {"$ref": True}],
    "$ref of a float": [[], {"$ref": 0.0}],
    "an unknown tag": {"$nope": 1},
    "a tag in capitals": {"$Tuple": []},
    "a dollar sign alone": {"$": 1},
    "two tags": {"$tuple": [], "$set": []},
    "a tag with a sibling": {"$tuple": [], "a": 1},
    "65 lists deep": __import__("functools").reduce(lambda inner, _: [inner], range(65), 1),
    "65 deep through $ref": _CHAIN,
    "$ref to what unfolds to more than 100,000 values": [[], *([{"$ref": n}, {"$ref": n}] for n in range(1, 18))],
    "65 numbers of one hash in a $set": {"$set": [_multiple(n) for n in range(65)]},
    "65 keys of one hash in a $dict": {"$dict": [[_multiple(n), 0] for n in range(65)]},
    "case-insensitive ranges of more than 200,000 characters": {"$pattern": ["[\\x00-\\U00040000]", 34]},
    "a UnicodeError with an end outside its object": {"$exception": ["builtins:UnicodeTranslateError", ["abc", 0, 4, "why"], {}]},
    "65 tuples deep": __import__("functools").reduce(lambda inner, _: {"$tuple": [inner]}, range(65), 1),
}  # fmt: skip
