"""Values of well-known libraries arrive exactly, without a pattern, once the library is imported; the user's classes need theirs."""

import datetime
import enum
import uuid
import zoneinfo
from urllib.parse import urlparse, urlsplit

import pydantic
import pytest
from pydantic import AnyUrl, HttpUrl, PostgresDsn, RedisDsn
from pydantic_core import MultiHostUrl, TzInfo, Url

from safedefer.codecs import type_arguments
from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.typed import CallData, TypedCodec
from safedefer.errors import InvalidArguments, NotDeferrable, PolicyViolation, UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import UNBOUND
from tests.zoo import parsed
from tests.zoo.exactly import carry, carry_one, decode_one, tree_of
from tests.zoo.parsed import MODULE, Box, Color, DataBox, OrderId, Pair, SlotBox, SlottedId, Tree, Wide, WideInt

POLICY = Policy(MODULE)
NOTHING = Policy()

#: Values that no pattern is needed for.
FREE = {
    "UTC": parsed.PARSE("2024-01-01T00:00:00Z"),
    "offset": parsed.PARSE("2024-01-01T00:00:00.5+05:30"),
    "negative offset": parsed.PARSE("2024-01-01T00:00:00-00:01"),
    "zone": TzInfo(-86_340),
    "http": HttpUrl("https://example.org/a?b=1#c"),
    "punycode": HttpUrl("https://bücher.example/"),
    "password": AnyUrl("ftp://u:p%20w@h:1/x"),
    "dsn": PostgresDsn("postgresql://u:p@h1:1,h2:2/d"),
    "dsn with defaults": RedisDsn("redis://"),
    "core": Url("http://example.org"),
    "core of many hosts": MultiHostUrl("postgresql://a,b/d"),
    "size": parsed.size_of("3 MiB"),
    "alias": dict[str, list[int]],
}

#: Values with a class of the application.
OURS = {
    "model with times": parsed.When(at="2024-01-01T00:00:00+02:00", time="10:00:00Z"),
    "model with URLs": parsed.Links(home="https://a.example", any="x:y", database="postgresql://h/d"),
    "flags above 2**53": Wide.A | Wide.B,
    "flags far above": Wide.A | Wide.C,
    "integer flags": WideInt.B | WideInt.C,
    "integer flags with others": WideInt.C | 2,
    "unknown integer flag": WideInt(1 << 90),
    "negated": ~WideInt.A,
    "UUID": OrderId(int=5),
    "UUID without a dict": SlottedId("12345678-1234-5678-1234-567812345678"),
    "safe UUID": OrderId(int=7, is_safe=uuid.SafeUUID.safe),
    "dataclass of a protocol": Tree(3),
    "choices": Color.RED,
    "nested choices": parsed.Order.Status.OPEN,
    "class of choices": Color,
    "alias of a class": Box[int],
    "nested alias": Box[Box[list[int]]],
    "two arguments": Pair[int, str],
}


@pytest.mark.parametrize("label", FREE)
def test_a_value_of_a_library_needs_no_pattern(label):
    value = FREE[label]
    arrived, again, keyed = carry(value, [value], {value: 1}, _policy=NOTHING).args
    assert type(arrived) is type(value)
    assert arrived == value
    assert repr(arrived) == repr(value)
    assert str(arrived) == str(value)
    assert list(keyed) == [value]
    if type(value) is not datetime.datetime:
        assert again[0] is arrived


@pytest.mark.parametrize("label", OURS)
def test_a_value_of_an_admitted_class_arrives_equal(label):
    value = OURS[label]
    arrived = carry_one(value, _policy=POLICY)
    assert type(arrived) is type(value)
    assert arrived == value
    assert repr(arrived) == repr(value)
    with pytest.raises(UnencodableArgument, match="policy"):
        carry(value, _policy=NOTHING)


def test_the_set_of_ids_arrives():
    assert carry_one({OrderId(int=1): [OrderId(int=2)]}, _policy=POLICY) == {OrderId(int=1): [OrderId(int=2)]}
    value = OrderId(int=7, is_safe=uuid.SafeUUID.safe)
    object.__setattr__(value, "extra", [1])
    arrived = carry_one(value, _policy=POLICY)
    assert (arrived.is_safe, arrived.extra) == (uuid.SafeUUID.safe, [1])


@pytest.mark.parametrize("make", [Box[int], DataBox[int], SlotBox[int], Pair[int, str], Box[Box[int]]])
def test_an_object_of_a_subscripted_generic_keeps_what_it_was_made_by(make):
    value = make(1)
    arrived, method = carry(value, getattr(value, "get", None), _policy=POLICY).args
    assert arrived.__orig_class__ == make
    assert arrived.value == 1
    assert method is None or method.__self__ is arrived


@pytest.mark.parametrize(
    "alias",
    [parsed.typing.List[int], list[parsed.typing.Any], Box[parsed.T], tuple[int, ...], *[parsed.OwnSubscript[int]]],
)
def test_an_alias_that_would_not_arrive_is_refused(alias):
    with pytest.raises(UnencodableArgument):
        carry(alias, _policy=POLICY)


def test_no_code_of_a_class_subscripts_it_for_a_token():
    parsed.OwnSubscript.RAN.clear()
    tree = {
        "$generic_alias": {"$tuple": [{"$class": f"{MODULE}:OwnSubscript"}, {"$tuple": [{"$class": "builtins:int"}]}]}
    }
    with pytest.raises(InvalidArguments, match="typing.Generic"):
        decode_one(tree, policy=POLICY)
    assert parsed.OwnSubscript.RAN == []


def bad(tag, *payloads):
    return [pytest.param({tag: payload}, id=f"{tag} {payload!s:.40}") for payload in payloads]


@pytest.mark.parametrize("tree", [
    *bad("$pydantic_url", 1, {"$tuple": ["HttpUrl"]}, {"$tuple": ["EmailStr", "a@b"]}, {"$tuple": ["HttpUrl", "ftp://x"]}, {"$tuple": ["Url", "HTTP://X"]},
         {"$tuple": ["HttpUrl", 1]}, {"$tuple": ["Url", "x"]}),
    *bad("$pydantic_tz", None, 86_400, -86_400, 1.5, True),
    *bad("$pydantic_bytesize", "1", True),
    *bad("$asyncpg_uuid", 1, "x", "12345678123456781234567812345678", "12345678-1234-5678-1234-56781234567G"),
    *bad("$generic_alias", 1, {"$tuple": [{"$class": "builtins:int"}, {"$tuple": [{"$class": "builtins:int"}]}]},
         {"$tuple": [{"$class": "builtins:list"}, {"$tuple": []}]}, {"$tuple": [{"$class": "builtins:list"}, {"$tuple": [1]}]},
         {"$tuple": [{"$class": f"{MODULE}:Box"}, {"$tuple": [{"$class": "builtins:int"}, {"$class": "builtins:int"}]}]}),
    *bad("$enum", [f"{MODULE}:Wide", {"$int": "1152921504606846976"}], [f"{MODULE}:Wide", {"$float": "nan"}], [f"{MODULE}:Wide", None],
         [f"{MODULE}:Wide", [1]], [f"{MODULE}:Wide", {"$int": str(1 << 299)}]),
    *bad("$object", {"class": f"{MODULE}:OrderId"}, {"class": f"{MODULE}:OrderId", "value": 5}, {"class": f"{MODULE}:OrderId", "value": "x"}),
])  # fmt: skip
def test_a_payload_that_no_encoder_wrote_is_refused(tree):
    pytest.importorskip("asyncpg")
    with pytest.raises(InvalidArguments):
        decode_one(tree, policy=POLICY)


def test_what_would_not_arrive_equal_is_refused():
    url = HttpUrl("https://a.example/")
    url.note = 1
    size = parsed.size_of("1 B")
    size.note = 1
    forged = object.__new__(HttpUrl)
    forged._url = Url("ftp://a.example/")
    for value in (url, size, forged):
        with pytest.raises(UnencodableArgument, match="; pass"):
            carry(value)


def test_asyncpgs_own_uuid_arrives_as_such():
    asyncpg = pytest.importorskip("asyncpg.pgproto.pgproto")
    value = asyncpg.UUID("12345678-1234-5678-1234-567812345678")
    arrived, plain = carry(value, uuid.UUID(str(value)), _policy=NOTHING).args
    assert type(arrived) is asyncpg.UUID
    assert type(plain) is uuid.UUID
    assert arrived == value == plain


def test_datetimes_of_freezegun_are_no_others_and_others_are_not_its():
    freezegun = pytest.importorskip("freezegun")
    real = datetime.datetime(2020, 1, 2, 3, tzinfo=datetime.UTC), datetime.date(2020, 1, 2)
    with freezegun.freeze_time("2024-01-01 10:00:00.5"):
        fake = datetime.datetime.now(), datetime.datetime.now(datetime.UTC).replace(fold=1), datetime.date.today()
        for value in (*real, *fake, [fake]):
            arrived = carry_one(value, _policy=NOTHING)
            assert type(arrived) is type(value)
            assert arrived == value
        assert carry_one(fake[1], _policy=NOTHING).fold == 1
    assert [type(carry_one(value, _policy=NOTHING)) for value in (*real, *fake)] == [*map(type, real), *map(type, fake)]
    fake[0].note = 1
    with pytest.raises(UnencodableArgument, match="attributes were added"):
        carry(fake[0])
    for tag in ("datetime", "date"):
        with pytest.raises(InvalidArguments, match="holds a"):
            decode_one({f"$freezegun_{tag}": 1})


URLS = [urlparse("https://u:p@shop.example:8443/a;b?c=1#d"), urlparse(b"/x"), urlsplit("/x?y=1"), urlsplit(b"http://a")]


@pytest.mark.parametrize("parts", URLS)
def test_the_parts_of_a_url_arrive_as_such_and_need_no_pattern(parts):
    arrived = carry_one(parts, _policy=NOTHING)
    assert type(arrived) is type(parts)
    assert (arrived, arrived.geturl(), arrived.hostname) == (parts, parts.geturl(), parts.hostname)
    with pytest.raises(NotDeferrable):
        NOTHING.callable_ref(type(parts))
    with pytest.raises(NotDeferrable):
        NOTHING.callable_ref(parts.geturl)


class Parts(type(URLS[0])):
    pass


def test_of_the_parts_of_a_url_nothing_else_is_taken_for_them():
    for wrong in (
        1,
        tuple_of(),
        tuple_of("ParseResult"),
        tuple_of("SplitResult", *"abcd", 1),
        tuple_of("object", *"abcde"),
        tuple_of(1, *"abcde"),
    ):
        with pytest.raises(InvalidArguments, match="pass the URL as text"):
            decode_one({"$url_parts": wrong}, policy=NOTHING)
    with pytest.raises(UnencodableArgument, match="pass the URL as text"):
        carry_one(URLS[0]._replace(path=1), _policy=NOTHING)
    with pytest.raises(UnencodableArgument, match="not admitted"):
        carry_one(Parts(*"abcdef"), _policy=NOTHING)


def tuple_of(*parts):
    return {"$tuple": list(parts)}


GOOGLE = {"proto": "proto.datetime_helpers", "api": "google.api_core.datetime_helpers"}


@pytest.mark.parametrize("tag", GOOGLE)
def test_googles_datetimes_arrive_with_their_nanoseconds(tag):
    cls = pytest.importorskip(GOOGLE[tag]).DatetimeWithNanoseconds
    values = (
        cls(2024, 1, 2, 3, 4, 5, nanosecond=123_456_789, tzinfo=datetime.UTC), cls(2024, 1, 2), cls(1, 1, 1, microsecond=5),
        cls(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
    )  # fmt: skip
    for value, arrived in zip(values, carry(*values, _policy=NOTHING).args, strict=True):
        assert type(arrived) is cls
        assert (arrived, arrived.fold, arrived.tzinfo) == (value, value.fold, value.tzinfo)
        assert (arrived.nanosecond, arrived._nanosecond) == (value.nanosecond, value._nanosecond)
    plain = {"$datetime": tree_of(datetime.datetime(2024, 1, 1))["$datetime"]}
    for wrong in (1, plain, [plain, 1], *({"$tuple": [plain, nanos]} for nanos in (-1, 1000, 10**9, 1.5, None, True)),
                  {"$tuple": [1, 0]}, {"$tuple": [plain]}):  # fmt: skip
        with pytest.raises(InvalidArguments, match="nanoseconds"):
            decode_one({f"$google_{tag}_datetime": wrong})


# --- Generic models ---------------------------------------------------------------------------------

PAGES = {
    "one argument": parsed.Page[int](items=[1]),
    "an alias": parsed.Page[list[int]](items=[[1]]),
    "a class": parsed.Page[parsed.Tree](items=[Tree(1)]),
    "two arguments": parsed.Both[int, str](items=[1], other="a"),
    "a root": parsed.Wrapped[int](3),
    "one in another": parsed.Page[int](items=[1], next=parsed.Page[int](items=[2])),
    "a subclass": parsed.IntPage(items=[1]),
}


@pytest.mark.parametrize("label", PAGES)
def test_a_generic_model_with_arguments_arrives_as_such(label):
    page = PAGES[label]
    arrived, again, [shared] = carry(page, page, [page], _policy=POLICY).args
    assert type(arrived) is type(page)
    assert arrived == page
    assert arrived.model_fields_set == page.model_fields_set
    assert arrived is again is shared
    with pytest.raises(UnencodableArgument, match="policy"):
        carry(page, _policy=NOTHING)


def test_its_methods_are_tasks_and_its_class_methods_say_what_to_do():
    page = PAGES["one argument"]
    ref = POLICY.callable_ref(page.total)
    assert ref.parts == ("method", MODULE, "Page", "total")
    bound = carry(_bound=page, _policy=POLICY).bound
    assert POLICY.load_callable(ref, bound)() == 1
    assert carry_one(page.total, _policy=POLICY)() == 1
    for each in (parsed.Page[int], parsed.Page[int].empty, page):
        with pytest.raises(NotDeferrable, match=r"class IntPage\(Page\[int\]\)"):
            POLICY.callable_ref(each)
    assert POLICY.load_callable(POLICY.callable_ref(parsed.IntPage.empty))() == parsed.IntPage(items=[])


def test_a_class_that_says_that_it_is_a_generic_model_with_arguments_is_none(monkeypatch):
    forged = type(parsed.Page)("Forged", (parsed.Page,), {
        "__module__": MODULE, "__qualname__": "Forged", "total": lambda self: "forged",
    })  # fmt: skip
    forged.__pydantic_generic_metadata__ = {"origin": parsed.Page, "args": (int,), "parameters": ()}
    value = forged(items=[])
    with pytest.raises(UnencodableArgument, match="not what its generic model gives"):
        carry(value, _policy=POLICY)
    with pytest.raises(NotDeferrable):
        POLICY.callable_ref(value.total)


NAME = f"{MODULE}:Page"
INT = {"$class": "builtins:int"}


def model(*name):
    return {"$model": [list(name), {"items": []}, ["items"], None, None]}


@pytest.mark.parametrize("tree", [
    model(NAME), model(NAME, 1), model(NAME, INT, INT), model(f"{MODULE}:When", INT), model("builtins:int", INT), model(f"{MODULE}:Hooked", INT),
    model(NAME, {"$class": f"{MODULE}:Schema"}), model(NAME, {"$generic_alias": {"$tuple": [{"$class": "builtins:list"}, {"$tuple": [{"$class": f"{MODULE}:Schema"}]}]}}),
    model(NAME, {"$ref": 0}),
])  # fmt: skip
def test_no_token_makes_another_class_or_runs_a_hook_for_one(tree):
    parsed.Hooked.RAN.clear()
    parsed.Schema.RAN.clear()
    with pytest.raises(InvalidArguments):
        decode_one(tree, policy=POLICY)
    assert parsed.Hooked.RAN == parsed.Schema.RAN == []


def test_the_model_and_its_arguments_go_through_the_policy():
    with pytest.raises(PolicyViolation):
        decode_one(model(NAME, INT), policy=NOTHING)
    with pytest.raises(PolicyViolation):
        decode_one(model(NAME, {"$class": f"{MODULE}:Tree"}), policy=Policy(NAME))
    with pytest.raises(UnencodableArgument, match="Tree"):
        carry(parsed.Page[parsed.Tree](items=[]), _policy=Policy(NAME))


def test_the_number_of_classes_that_tokens_make_is_bounded(monkeypatch):
    monkeypatch.setattr(type_arguments, "_MOST", 2)
    registry = TypeRegistry(discover=True)
    codec = TypedCodec(registry=registry)
    aliases = [INT, {"$class": "builtins:str"}, {"$class": "builtins:bytes"}]
    assert [type(decode_one(model(NAME, each), codec, POLICY)) for each in aliases[:2]] == [
        parsed.Page[int],
        parsed.Page[str],
    ]
    assert type(decode_one(model(NAME, aliases[2]), codec, POLICY)) is parsed.Page[bytes]
    assert len(registry.generics) == len(registry.plans) == 2, "the oldest made room"
    assert type(decode_one(model(NAME, INT), codec, POLICY)) is parsed.Page[int]


# --- When a pack is there -------------------------------------------------------------------------


def pack_of(cls, tag, *, ready=lambda: None):
    def types():
        ready()
        return (PackedType(tag, (cls,), str, lambda text: cls()),)

    return Pack("a_library", types)


class Foreign:
    def __str__(self):
        return "foreign"


def registry_with(pack):
    types = TypeRegistry(discover=True)
    types._pending = (pack,)
    return types


def test_a_pack_is_there_once_its_library_is_imported_and_a_token_imports_nothing(monkeypatch):
    import sys

    codec = TypedCodec(registry=registry_with(pack_of(Foreign, "$foreign")))
    with pytest.raises(InvalidArguments, match="import its library"):
        decode_one({"$foreign": "x"}, codec)
    assert "a_library" not in sys.modules
    monkeypatch.setitem(sys.modules, "a_library", pydantic)
    assert type(decode_one({"$foreign": "x"}, codec, NOTHING)) is Foreign


def test_a_library_that_is_half_imported_is_asked_again(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "a_library", pydantic)
    left = [KeyError("a_library.inner"), AttributeError("Key")]

    def ready():
        if left:
            raise left.pop()

    types = registry_with(pack_of(Foreign, "$foreign", ready=ready))
    assert [types.by_tag("$foreign") is None for _ in range(3)] == [True, True, False]
    assert types.by_class(Foreign).tag == "$foreign"
    types._unpack(types._pending[0] if types._pending else pack_of(Foreign, "$foreign"))
    assert len(types._packed) == 1


def test_what_the_user_registered_comes_before_a_pack(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "a_library", pydantic)
    types = registry_with(pack_of(Foreign, "$foreign"))
    assert types.by_class(Foreign).decode is not None
    types.register_type(Foreign, "$foreign", lambda _: 1, lambda _: Foreign())
    codec = TypedCodec(registry=types)
    sent = codec.encode(CallData(UNBOUND, [Foreign()], {}), Policy(__name__))
    assert sent.args == [{"$foreign": 1}]
    with pytest.raises(UnencodableArgument, match="policy"):
        codec.encode(CallData(UNBOUND, [Foreign()], {}), NOTHING)


def test_a_tag_that_the_user_took_for_another_class_is_not_the_packs(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "a_library", pydantic)
    types = registry_with(pack_of(Foreign, "$foreign"))
    types.register_type(OrderId, "$foreign", str, OrderId)
    codec = TypedCodec(registry=types)
    with pytest.raises(UnencodableArgument, match="policy"):
        codec.encode(CallData(UNBOUND, [Foreign()], {}), NOTHING)


def test_the_wire_form_is_that_of_the_format():
    assert tree_of(HttpUrl("https://a.example/")) == {"$pydantic_url": {"$tuple": ["HttpUrl", "https://a.example/"]}}
    assert tree_of(TzInfo(60)) == {"$pydantic_tz": 60}


# --- Fields that came after the token ---------------------------------------------------------------

OLD = {
    "dataclass": ({"$dataclass": [f"{MODULE}:Data", {"a": 1}]}, parsed.Data(1)),
    "slots": ({"$dataclass": [f"{MODULE}:Slotted", {"a": 1}]}, parsed.Slotted(1)),
    "attrs": ({"$attrs": [f"{MODULE}:Attrs", {"a": 1}]}, parsed.Attrs(1)),
    "model": ({"$model": [f"{MODULE}:Model", {"a": 1}, ["a"], None, None]}, parsed.Model(a=1)),
    "named tuple": ({"$namedtuple": [f"{MODULE}:Named", 1]}, parsed.Named(1)),
    "heir": ({"$object": {"class": f"{MODULE}:Heir", "state": {"a": 1}}}, parsed.Heir(1)),
}


@pytest.mark.parametrize("label", OLD)
def test_a_field_that_came_after_the_token_arrives_with_its_default(label):
    tree, value = OLD[label]
    first, second = decode_one([tree, tree], policy=POLICY)
    assert first == value
    assert repr(first) == repr(value)
    if label != "named tuple":
        first.tags.append(1)
    assert second.tags == value.tags


def test_a_private_attribute_that_came_later_has_its_default():
    tree = OLD["model"][0]["$model"]
    assert decode_one({"$model": tree}, policy=POLICY)._seen == 3
    assert decode_one({"$model": [*tree[:4], {"_seen": 4}]}, policy=POLICY)._seen == 4


@pytest.mark.parametrize("tree", [
    {"$attrs": [f"{MODULE}:AttrsSelf", {"a": 1}]}, {"$namedtuple": [f"{MODULE}:Named"]}, {"$namedtuple": [f"{MODULE}:Named", 1, "x", [], 4]},
])  # fmt: skip
def test_a_field_without_a_default_of_its_own_is_version_skew(tree):
    with pytest.raises(InvalidArguments) as caught:
        decode_one(tree, policy=POLICY)
    assert not caught.value.is_final


def without(value, name):
    object.__delattr__(value, name)
    return value


@pytest.mark.parametrize("value", [
    without(parsed.Data(1), "tags"), without(parsed.Slotted(1), "note"), without(parsed.Attrs(1), "note"), without(parsed.Heir(1), "tags"),
])  # fmt: skip
def test_an_object_without_an_attribute_that_has_a_default_is_refused(value):
    with pytest.raises(UnencodableArgument, match="would arrive with its default"):
        carry(value, _policy=POLICY)


def test_a_model_without_a_field_that_has_a_default_is_refused():
    value = parsed.Model(a=1)
    del value.__dict__["tags"]
    with pytest.raises(UnencodableArgument, match="would arrive with its default"):
        carry(value, _policy=POLICY)
    private = parsed.Model(a=1)
    del private._seen
    with pytest.raises(UnencodableArgument, match="would arrive with its default"):
        carry(private, _policy=POLICY)


def test_a_default_that_the_class_itself_holds_needs_nothing():
    value = without(parsed.Data(1), "note")
    assert carry_one(value, _policy=POLICY).__dict__ == {"a": 1, "tags": []}
    assert isinstance(Color.RED, enum.Enum)
