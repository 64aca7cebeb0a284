"""Trees that nobody's encoder wrote: refused with the path, or by the policy, and nothing of theirs runs."""

import sys

import jiter
import pytest

from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import InvalidArguments, PolicyViolation, RejectedTask, UnresolvableCallable
from safedefer.options import Limits
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo import values as zoo
from tests.zoo.exactly import CODEC, POLICY, decode_one, parse

V = "tests.zoo.values:"

MALFORMED = {
    # objects and tags
    "unknown tag": {"$nope": 1},
    "two tags": {"$tuple": [], "$set": []},
    "tag with a sibling": {"$tuple": [], "a": 1},
    "sibling before the tag": {"a": 1, "$tuple": []},
    "lone dollar": {"$": 1},
    "tag in capitals": {"$Tuple": []},
    # numbers
    "integer too large": 2**53,
    "integer too small": -(2**53),
    "$int that is plain": {"$int": "1"},
    "$int with 16 digits that is plain": {"$int": "9007199254740991"},
    "$int with a plus": {"$int": "+9007199254740993"},
    "$int with leading zeros": {"$int": "09007199254740993"},
    "$int with underscores": {"$int": "9_007_199_254_740_993"},
    "$int with spaces": {"$int": " 9007199254740993"},
    "$int in Arabic digits": {"$int": "٩٩٩٩٩٩٩٩٩٩٩٩٩٩٩٩٩"},
    "$int with a newline": {"$int": "9007199254740993\n"},
    "$int of a number": {"$int": 1},
    "$int of 4,301 digits": {"$int": "1" + "0" * 4300},
    "$float of text": {"$float": "NaN"},
    "$float of a number": {"$float": 1.5},
    "$complex of ints": {"$complex": [1, 2]},
    "$complex of three": {"$complex": [1.0, 2.0, 3.0]},
    "$decimal with a small e": {"$decimal": "1e5"},
    "$decimal not canonical": {"$decimal": "100E-1"},
    "$decimal in Arabic digits": {"$decimal": "٣"},
    "$decimal of nothing": {"$decimal": ""},
    "$decimal too large": {"$decimal": "1E+99999999999999999999"},
    "$fraction not reduced": {"$fraction": [2, 4]},
    "$fraction of zero": {"$fraction": [1, 0]},
    "$fraction negative below": {"$fraction": [1, -2]},
    "$fraction of floats": {"$fraction": [1.0, 2.0]},
    "$range of step 0": {"$range": [0, 1, 0]},
    "$range of two": {"$range": [0, 1]},
    "$range of bools": {"$range": [False, True, True]},
    "$ellipsis of null": {"$ellipsis": None},
    # text and bytes
    "$str that is plain": {"$str": "YWJj"},
    "$str of bad UTF-8": {"$str": "//8="},
    "$bytes in base64url": {"$bytes": "_-8="},
    "$bytes without padding": {"$bytes": "YQ"},
    "$bytes with spare bits": {"$bytes": "YR=="},
    "$bytes with a newline": {"$bytes": "YWJj\n"},
    "$bytes of a list": {"$bytes": [1]},
    "$bytes beyond ASCII": {"$bytes": "é==="},
    "$bytearray with a space": {"$bytearray": "YW Jj"},
    # times
    "$datetime with an offset": {"$datetime": ["2026-01-01T00:00:00+00:00", 0, None]},
    "$datetime with Z": {"$datetime": ["2026-01-01T00:00:00Z", 0, None]},
    "$datetime in another ISO form": {"$datetime": ["20260101T000000", 0, None]},
    "$datetime with a space": {"$datetime": ["2026-01-01 00:00:00", 0, None]},
    "$datetime of fold 2": {"$datetime": ["2026-01-01T00:00:00", 2, None]},
    "$datetime of fold true": {"$datetime": ["2026-01-01T00:00:00", True, None]},
    "$datetime of a zone name": {"$datetime": ["2026-01-01T00:00:00", 0, "Europe/Paris"]},
    "$datetime of a date": {"$datetime": ["2026-01-01", 0, None]},
    "$datetime of two": {"$datetime": ["2026-01-01T00:00:00", 0]},
    "$date of a week": {"$date": "2026-W01-1"},
    "$date of a time": {"$date": "2026-01-01T00:00:00"},
    "$date out of range": {"$date": "2026-02-30"},
    "$time with T": {"$time": ["T01:02:03", 0, None]},
    "$timedelta denormal": {"$timedelta": [0, 86400, 0]},
    "$timedelta too large": {"$timedelta": [10**9, 0, 0]},
    "$timedelta of floats": {"$timedelta": [1.0, 0, 0]},
    "$timezone of a day": {"$timezone": [1, 0, 0, None]},
    "$timezone with an int name": {"$timezone": [0, 0, 0, 1]},
    "$zoneinfo with a path": {"$zoneinfo": "../../etc/passwd"},
    "$zoneinfo absolute": {"$zoneinfo": "/etc/localtime"},
    "$zoneinfo with dots inside": {"$zoneinfo": "Europe/../../x"},
    "$zoneinfo with a zero": {"$zoneinfo": "UTC\0"},
    "$zoneinfo with a newline": {"$zoneinfo": "UTC\n"},
    "$zoneinfo of a folder": {"$zoneinfo": "Europe"},
    "$zoneinfo of a file": {"$zoneinfo": "zone.tab"},
    "$zoneinfo empty": {"$zoneinfo": ""},
    "$zoneinfo unknown": {"$zoneinfo": "Mars/Olympus"},
    "$zoneinfo backslash": {"$zoneinfo": "..\\x"},
    # names of things
    "$uuid in capitals": {"$uuid": ["00000000-0000-0000-0000-00000000000A", None]},
    "$uuid without dashes": {"$uuid": ["0" * 32, None]},
    "$uuid of odd safety": {"$uuid": ["00000000-0000-0000-0000-000000000000", "maybe"]},
    "$uuid of a list": {"$uuid": ["00000000-0000-0000-0000-000000000000", []]},
    "$path of another class": {"$path": ["Popen", "x"]},
    "$path not normal": {"$path": ["PosixPath", "a//b"]},
    "$path of an int": {"$path": ["PosixPath", 1]},
    "$path of another system": {"$path": ["WindowsPath", "x"]},
    "$ip of an int": {"$ip": ["IPv4Address", 1]},
    "$ip not canonical": {"$ip": ["IPv6Address", "0:0:0:0:0:0:0:1"]},
    "$ip with host bits": {"$ip": ["IPv4Network", "10.0.0.1/8"]},
    "$ip of another class": {"$ip": ["Popen", "x"]},
    "$pattern of an int": {"$pattern": [1, 0]},
    "$pattern that does not compile": {"$pattern": ["(", 32]},
    "$pattern of false flags": {"$pattern": ["a", 0]},
    "$pattern with debug": {"$pattern": ["a", 32 | 128]},
    "$pattern too long": {"$pattern": ["a" * 1025, 32]},
    "$pattern nested too deep": {"$pattern": ["(" * 500 + ")" * 500, 32]},
    "$pattern of nested repeats": {"$pattern": ["(?:" * 250 + "a" + "){9999}" * 100, 32]},
    "seventeen patterns": [{"$pattern": [f"a{i}", 32]} for i in range(17)],
    # containers
    "$tuple of an object": {"$tuple": {}},
    "$set of a list": {"$set": [[]]},
    "$set of equals": {"$set": [1, 1]},
    "$set of 1 and true": {"$set": [1, True]},
    "$frozenset of a dict": {"$frozenset": [{}]},
    "$frozenset of equals": {"$frozenset": ["a", "a"]},
    "$set of a signaling nan": {"$set": [{"$decimal": "sNaN"}]},
    "$set of an object without a hash": {"$set": [{"$object": {"class": V + "StateHooks", "setstate": {"n": 1}}}]},
    "$dict that is plain": {"$dict": [["a", 1]]},
    "$dict that is empty": {"$dict": []},
    "$dict of an unhashable key": {"$dict": [[[], 1]]},
    "$dict of equal keys": {"$dict": [[1, 1], [{"$float": "nan"}, 2], [1, 3]]},
    "$dict of triples": {"$dict": [[1, 2, 3]]},
    "$dict of an object": {"$dict": {"1": 2}},
    "$ordereddict of equal keys": {"$ordereddict": [["a", 1], ["a", 2]]},
    "$counter of an object": {"$counter": {}},
    "$defaultdict of nothing": {"$defaultdict": []},
    "$defaultdict of a number": {"$defaultdict": [1]},
    "$deque of nothing": {"$deque": []},
    "$deque over its length": {"$deque": [1, 1, 2]},
    "$deque of a negative length": {"$deque": [-1]},
    "$deque of true": {"$deque": [True]},
    "$slice of two": {"$slice": [1, 2]},
    # sharing
    "dangling $ref": {"$ref": 0},
    "forward $ref": [{"$ref": 1}, []],
    "negative $ref": [{"$ref": -1}],
    "$ref of true": [[], {"$ref": True}],
    "$ref of a float": [[], {"$ref": 0.0}],
    "$ref of text": [[], {"$ref": "0"}],
    "$ref to what is not made yet": {"$exception": ["builtins:ValueError", [{"$ref": 0}], {}]},
    "$ref into new args": {"$object": {"class": V + "NewArgs", "args": [{"$ref": 0}, 1]}},
    # classes
    "$enum by value": {"$enum": [V + "Color", 1]},
    "$enum unknown": {"$enum": [V + "Color", "MAUVE"]},
    "$enum by alias": {"$enum": [V + "Color", "CRIMSON"]},
    "$enum of a method": {"$enum": [V + "Color", "__class__"]},
    "$enum of a flag by number that has a name": {"$enum": [V + "Perm", 3]},
    "$enum of unknown bits": {"$enum": [V + "Perm", 64]},
    "$enum with _missing_": {"$enum": [V + "OwnMissing", 3]},
    "$enum of another class": {"$enum": [V + "Order", "RED"]},
    "$enum of a list": {"$enum": [["x"], "RED"]},
    "$namedtuple too short": {"$namedtuple": [V + "Point", 1]},
    "$namedtuple of a dataclass": {"$namedtuple": [V + "Order", 1]},
    "$dataclass of an object": {"$dataclass": [V + "Node", {}]},
    "$object of a dataclass": {"$object": {"class": V + "Order"}},
    "$object of a model": {"$object": {"class": V + "Model"}},
    "$object of an enum": {"$object": {"class": V + "Color"}},
    "$object of an exception": {"$object": {"class": V + "Oops"}},
    "$object of a built-in": {"$object": {"class": "builtins:list", "items": []}},
    "$object without a class": {"$object": {}},
    "$object of a list": {"$object": []},
    "$object with a part too many": {"$object": {"class": V + "Node", "args": []}},
    "$object with an unknown part": {"$object": {"class": V + "Node", "x": 1}},
    "$object with state instead of setstate": {"$object": {"class": V + "StateHooks", "state": {"n": 1}}},
    "$object with setstate instead of state": {"$object": {"class": V + "Node", "setstate": {}}},
    "$object of a reducer": {"$object": {"class": V + "Reduced"}},
    "$object whose new needs arguments": {"$object": {"class": V + "NewNeedsArgs"}},
    "$object without items": {"$object": {"class": V + "MyList"}},
    "$object without args": {"$object": {"class": V + "NewArgs"}},
    "$object of wrong args": {"$object": {"class": V + "NewArgs", "args": [1]}},
    "$object of a wrong value": {"$object": {"class": V + "MyInt", "value": "1"}},
    "$object of a bool value": {"$object": {"class": V + "MyInt", "value": True}},
    "$object whose setstate fails": {"$object": {"class": V + "StateHooks", "setstate": {}}},
    "$object of keys without values": {"$object": {"class": V + "MyDict", "keys": [1], "values": []}},
    "attribute without a place": {"$dataclass": [V + "Slotted", {"zzz": 1}]},
    "attribute with $": {"$dataclass": [V + "Order", {"$x": 1}]},
    "state that is a list": {"$dataclass": [V + "Order", []]},
    "$dataclass of three": {"$dataclass": [V + "Order", {}, {}]},
    "$model of three": {"$model": [V + "Model", {}, []]},
    "$model of a field twice": {"$model": [V + "Model", {}, ["a", "a"], None, None]},
    "$model of a number": {"$model": [V + "Model", {}, [1], None, None]},
    "$model of extra that is a list": {"$model": [V + "Model", {}, [], [], None]},
    "$attrs without a place": {"$attrs": [V + "AttrsSlotted", {"zzz": 1}]},
    "$attrs of a dataclass": {"$attrs": [V + "Order", {}]},
    # callables
    "$callable of nothing": {"$callable": {}},
    "$callable of text": {"$callable": V + "top"},
    "$callable of a class": {"$callable": {"kind": "class", "module": "tests.zoo.values", "qualname": "Order"}},
    "$callable with null": {"$callable": {"kind": "function", "module": "tests.zoo.values", "qualname": "top", "member": None}},
    "$callable with more": {"$callable": {"kind": "function", "module": "tests.zoo.values", "qualname": "top", "x": 1}},
    "$callable of a bad module": {"$callable": {"kind": "function", "module": "os\0", "qualname": "system"}},
    "$class of a number": {"$class": 1},
    # exceptions
    "$exception of a class": {"$exception": [V + "Order", [], {}]},
    "$exception of another type": {"$exception": ["builtins:OSError", [2, "x"], {}]},
    "$exception of wrong args": {"$exception": ["builtins:UnicodeDecodeError", [1], {}]},
    "$exception with a traceback": {"$exception": ["builtins:ValueError", [], {"__traceback__": None}]},
    "$exception with args in its state": {"$exception": ["builtins:ValueError", [], {"args": {"$tuple": []}}]},
    "$exception with __dict__": {"$exception": ["builtins:ValueError", [], {"__dict__": {}}]},
    "$exception whose cause is none": {"$exception": ["builtins:ValueError", [], {"__cause__": 1}]},
    "$exception whose attribute is read-only": {"$exception": ["builtins:ExceptionGroup", ["g", [{"$exception": ["builtins:ValueError", [], {}]}]], {"message": "x"}]},
    # depth
    "65 lists": __import__("functools").reduce(lambda v, _: [v], range(65), 1),
    "65 tuples": __import__("functools").reduce(lambda v, _: {"$tuple": [v]}, range(65), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_tree_is_refused_with_its_path(name):
    zoo.RAN.clear()
    with pytest.raises(InvalidArguments) as refusal:
        decode_one({"$tuple": [MALFORMED[name]]})
    ran, zoo.RAN[:] = list(zoo.RAN), []
    assert ran == []
    assert refusal.value.path.startswith("$.args[0][0]")
    assert str(refusal.value).startswith(refusal.value.path)


NOT_ADMITTED = [
    {"$class": "os:system"},
    {"$class": "subprocess:Popen"},
    {"$dataclass": ["tests.unit.test_typed_refused:NotAdmitted", {}]},
    {"$object": {"class": "antigravity:X"}},
    {"$exception": ["json.decoder:JSONDecodeError", [], {}]},
    {"$enum": ["signal:Signals", "SIGINT"]},
    {"$callable": {"kind": "builtin", "module": "posix", "qualname": "system"}},
    {"$callable": {"kind": "builtin", "module": "builtins", "qualname": "eval"}},
    {"$defaultdict": [{"$callable": {"kind": "builtin", "module": "builtins", "qualname": "exec"}}]},
    {"$class": "this:x"},
    {"$model": ["antigravity:X", {}, [], None, None]},
    {"$attrs": ["antigravity:X", {}]},
    {"$namedtuple": ["antigravity:X"]},
]


@pytest.mark.parametrize("tree", NOT_ADMITTED, ids=str)
def test_a_class_or_callable_outside_the_policy_is_a_policy_violation_and_not_imported(tree):
    with pytest.raises(PolicyViolation):
        decode_one(tree)
    assert "antigravity" not in sys.modules
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "tree",
    [
        {"$class": V + "top"}, {"$class": V + "Nobody"}, {"$dataclass": [V + "Gone", {}]}, {"$class": V + "Outer.Nobody"},
        {"$callable": {"kind": "function", "module": "tests.zoo.values", "qualname": "gone"}},
        {"$callable": {"kind": "method", "module": "tests.zoo.values", "qualname": "Worker", "member": "work", "bound": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_there_is_unresolvable(tree):
    with pytest.raises(UnresolvableCallable):
        decode_one(tree)


@pytest.mark.parametrize(
    "text",
    [
        b'{"args":[1e999],"kwargs":{}}', b'{"args":[-1e999],"kwargs":{}}', b'{"args":[1E400],"kwargs":{}}',
        b'{"args":[1.0e+0999],"kwargs":{}}', b'{"args":[9007199254740992],"kwargs":{}}', b'{"args":[-9007199254740992],"kwargs":{}}',
        b'{"args":[ 12345678901234567890 ],"kwargs":{}}', b'{"args":[\n12345678901234567890\t],"kwargs":{}}',
        b'{"args":[[[12345678901234567890]]],"kwargs":{}}', b'{"args":[],"kwargs":{"a":12345678901234567890}}',
        b'{"args":[' + b"1" + b"0" * 400 + b'.0],"kwargs":{}}', b'{"args":[],"kwargs":{"a":-12345678901234567890}}',
        b'{"args":[{"\\u0024nope":1}],"kwargs":{}}', b'{"args":[{"\\u0024ref":0}],"kwargs":{}}', b'{"args":[],"kwargs":{"\\u0024x":0}}',
        b'{"args":[],"kwargs":{"$tuple":[]}}',
    ],
)  # fmt: skip
def test_raw_numbers_and_tags_are_found_however_they_are_written(text):
    with pytest.raises(InvalidArguments):
        CODEC.decode(parse(text), POLICY, text=text)


@pytest.mark.parametrize(
    "text",
    [
        b'{"args":[9007199254740991,-9007199254740991,0.30000000000000004,1e16,1e-400,1.5e300,1E2],"kwargs":{}}',
        b'{"args":["12345678901234567890","1e999","$x"],"kwargs":{}}',
        b'{"args":[1234567890123456.5],"kwargs":{}}',
    ],
)
def test_numbers_that_only_look_dangerous_pass(text):
    call = parse(text)
    assert CODEC.decode(call, POLICY, text=text).args == call.args


def test_depth_and_items_hold_without_any_tag():
    for levels, passes in ((64, True), (65, False), (190, False)):
        text = b'{"args":[' + b"[" * levels + b"]" * levels + b'],"kwargs":{}}'
        if passes:
            CODEC.decode(parse(text), POLICY, text=text)
        else:
            with pytest.raises(InvalidArguments, match="64"):
                CODEC.decode(parse(text), POLICY, text=text)
    text = b'{"args":[[' + b",".join([b"0"] * 100_001) + b']],"kwargs":{}}'
    with pytest.raises(InvalidArguments, match="100000"):
        CODEC.decode(parse(text), POLICY, text=text)


def test_brackets_inside_strings_do_not_count_as_depth():
    text = b'{"args":["' + b"[" * 100 + b'"],"kwargs":{}}'
    assert CODEC.decode(parse(text), POLICY, text=text).args == ["[" * 100]


def test_the_limits_of_the_codec_hold():
    codec = TypedCodec(limits=Limits(depth=3, items=5, int_digits=20))
    decode = lambda tree: decode_one(tree, codec)
    decode([[[1]]])
    decode([1, 2, 3, 4])
    decode({"$int": str(10**19)})
    for tree in (
        [[[[1]]]],
        [1, 2, 3, 4, 5],
        {"$int": str(10**20)},
        {"$tuple": [{"$tuple": [{"$tuple": [[]]}]}]},
        {"$dict": [[1, 2]] * 3},
    ):
        with pytest.raises(InvalidArguments):
            decode(tree)


@pytest.mark.parametrize("bound", [{"$nope": 1}, {"$ref": 0}, {"$tuple": 1}])
def test_the_path_of_the_bound_object_is_named(bound):
    with pytest.raises(InvalidArguments) as refusal:
        CODEC.decode(CallData(bound, [], {}), POLICY, text=b'{"$nope"')
    assert refusal.value.path == "$.bound"


def test_paths_lead_into_tags():
    tree = {"$dataclass": [V + "Order", {"id": 1, "lines": [1, {"$tuple": [{"$dict": [[1, 2], [{"$nope": 1}, 2]]}]}]}]}
    with pytest.raises(InvalidArguments) as refusal:
        decode_one(tree)
    assert refusal.value.path == "$.args[0].lines[1][0]{1}"


def test_a_reference_that_a_canonical_text_does_not_spell_is_refused_as_nothing_was_counted():
    # Whoever calls with a text that is not that of the trees gets a refusal, not an undercount.
    trees = [[1, 2], {"$ref": 0}]
    with pytest.raises(InvalidArguments, match="nobody counted"):
        CODEC.decode(CallData(UNBOUND, trees, {}), POLICY, b'[[1,2],{"$re\\u0066":0}]', True)
    assert CODEC.decode(CallData(UNBOUND, trees, {}), POLICY, b'[[1,2],{"$re\\u0066":0}]').args == [[1, 2], [1, 2]]


def test_what_is_no_json_is_refused():
    for value in ((1,), {1}, b"x", object(), CODEC):
        with pytest.raises(InvalidArguments):
            CODEC.decode(CallData(UNBOUND, [value], {}), POLICY, text=b'"$')


def test_hash_and_eq_that_come_from_a_class_outside_the_policy_do_not_run():
    only_child = Policy("tests.zoo.values:Child")
    child = {"$object": {"class": V + "Child", "state": {"key": "k", "other": None}}}
    decode_one(child, policy=only_child)
    for tree in ({"$set": [child]}, [child, {"$set": [{"$ref": 1}]}], {"$dict": [[child, 1]]}):
        with pytest.raises(PolicyViolation, match="ByValue"):
            decode_one(tree, policy=only_child)


def test_a_policy_that_admits_one_class_admits_no_other():
    only_order = Policy("tests.zoo.values:Order")
    assert decode_one({"$dataclass": [V + "Order", {"id": 1}]}, policy=only_order).id == 1
    with pytest.raises(PolicyViolation):
        decode_one({"$dataclass": [V + "Money", {"amount": 1}]}, policy=only_order)


def test_renamed_classes_are_found_under_their_new_names():
    moved = Policy("tests.zoo.values", "old.place", moved={"old.place:Order": V + "Order"})
    assert type(decode_one({"$dataclass": ["old.place:Order", {"id": 1}]}, policy=moved)) is zoo.Order


def test_the_message_never_quotes_the_payload():
    secret = "hunter2-very-secret"
    for tree in (
        {"$datetime": [secret, 0, None]}, {"$int": secret}, {"$nope": secret}, {"$enum": [V + "Color", secret]},
        {"$dict": [[secret + "!", {"$nope": 1}]]}, {"$zoneinfo": secret}, {"$bytes": secret}, {secret + " key": {"$nope": 1}},
    ):  # fmt: skip
        with pytest.raises(RejectedTask) as refusal:
            decode_one(tree)
        assert "hunter2" not in str(refusal.value) + str(getattr(refusal.value, "path", ""))


def test_lone_surrogates_and_duplicates_do_not_even_parse():
    for text in (b'{"a":"\\ud800"}', b'{"a":1,"a":2}', b'{"a":1,"\\u0061":2}', b'{"a":NaN}', b'{"a":Infinity}'):
        with pytest.raises(ValueError, match="line 1"):
            jiter.from_json(text, allow_inf_nan=False, catch_duplicate_keys=True)
