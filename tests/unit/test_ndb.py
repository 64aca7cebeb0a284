"""App Engine's values: keys, entities, cursors, and calls on them, with the real google-cloud-ndb."""

# ruff: noqa: E402 - what is skipped without ndb

import datetime
import sys
import threading

import pytest

ndb = pytest.importorskip("google.cloud.ndb")

from google.auth.credentials import AnonymousCredentials
from google.cloud.datastore.entity import Entity
from google.cloud.datastore.key import Key as StoredKey
from google.cloud.ndb import model as ndb_model
from google.cloud.ndb import query as ndb_query

from safedefer.errors import CapabilityExceeded, InvalidArguments, NotDeferrable, PolicyViolation, UnencodableArgument
from safedefer.policy import Policy
from safedefer.refs import bound_object
from tests.adversarial import victim
from tests.zoo import shelf
from tests.zoo.exactly import carry, carry_one, decode_one, tree_of
from tests.zoo.shelf import Address, Book, Cat, Loose

HERE = shelf.__name__
POLICY = Policy(HERE)
NOTHING = Policy()


@pytest.fixture(scope="module")
def one_client():
    client = ndb.Client(project="p", credentials=AnonymousCredentials())
    yield client
    client.stub.grpc_channel.close()  # its threads would be in the way of tests that fork


@pytest.fixture(autouse=True)
def client(one_client):
    with one_client.context():
        yield one_client


def book(**more):
    return Book(
        title="Ulysses", tags=["a", "b"], when=datetime.datetime(2024, 1, 1), home=Address(street="s"), homes=[Address(city="c"), Address(city="d")],
        local=Address(city="q"), notes={"a": [1, None]}, author=ndb.Key("Author", "joyce", parent=ndb.Key("Country", 7)), place=ndb.GeoPt(53.3, -6.2),
        owner=ndb.User("a@b.example", "b.example", "7"), cover=b"x" * 100, scan=ndb.BlobKey(b"k"), **more,
    )  # fmt: skip


def converted(entity):
    """Return an entity as ``put`` leaves it: its values in the form of the datastore."""
    ndb_model._entity_to_ds_entity(entity)
    for prop in type(entity)._properties.values():
        if prop._name in entity._values:
            prop._get_base_value_unwrapped_as_list(entity)
    assert any(
        type(each.b_val) is ndb_model._CompressedValue
        for each in entity._values.values()
        if type(each) is ndb_model._BaseValue
    )
    return entity


KEYS = {
    "id": lambda: ndb.Key("A", 1),
    "name": lambda: ndb.Key("A", "ü/1"),
    "parent": lambda: ndb.Key("A", 1, "B", "x"),
    "partial": lambda: ndb.Key("A", 1, "B", None),
    "namespace": lambda: ndb.Key("A", 1, namespace="n"),
    "project": lambda: ndb.Key("A", 1, project="other"),
    "database": lambda: ndb.Key("A", 1, database="db"),
    "urlsafe": lambda: ndb.Key(urlsafe=ndb.Key("A", 1, project="s~p").urlsafe()),
}

ENTITIES = {
    "whole": lambda: book(),
    "saved": lambda: book(id=5, namespace="n", project="other"),
    "child": lambda: book(id="x", parent=ndb.Key("Shelf", 1)),
    "incomplete key": lambda: book(parent=ndb.Key("Shelf", 1)),
    "compressed": lambda: converted(book(id=5)),
    "empty": lambda: Book(),
    "expando": lambda: Loose(name="n", size=3, sizes=[1, 2], sub=Loose(x=1), plain={"a": 1}, home=Address(city="c")),
    "plain expando": lambda: ndb.Expando(a=1),
    "poly": lambda: Cat(name="c"),
    "projection": lambda: book(id=1, projection=("t", "copies")),
    "read": lambda: ndb_model._entity_from_ds_entity(ndb_model._entity_to_ds_entity(book(id=5)), model_class=Book),
    "read expando": lambda: ndb_model._entity_from_ds_entity(
        ndb_model._entity_to_ds_entity(Loose(name="n", size=3, sizes=[1, 2], id=3)), model_class=Loose
    ),
}

VALUES = {
    "GeoPt": lambda: ndb.GeoPt(1, 2.5),
    "User": lambda: ndb.User("a@b.example", "b.example"),
    "BlobKey": lambda: ndb.BlobKey(b"abc"),
    "Cursor": lambda: ndb.Cursor(b"\x00abc"),
    "websafe cursor": lambda: ndb.Cursor.from_websafe_string(ndb.Cursor(b"\xff\x00").urlsafe()),
}


QUERIES = {
    "all": lambda: Book.query(),
    "one filter": lambda: Book.query(Book.copies == 1),
    "and": lambda: Book.query(Book.copies > 1, Book.author == ndb.Key("Author", 1)),
    "or": lambda: Book.query(ndb.OR(Book.copies == 1, Book.copies == 2), ancestor=ndb.Key("Shelf", 1)),
    "nothing": lambda: Book.query(Book.copies.IN([])),
    "order": lambda: Book.query(namespace="n").order(-Book.copies, Book.author),
    "projection": lambda: Book.query(projection=["copies"], distinct_on=["copies"]),
    "no kind": lambda: ndb.Query(keys_only=True),
}


@pytest.mark.parametrize("label", QUERIES)
def test_a_query_needs_no_pattern_and_arrives_as_it_was(label):
    query = QUERIES[label]()
    arrived, again = carry(query, [query], _policy=NOTHING).args
    assert again[0] is arrived
    assert type(arrived) is ndb.Query
    assert state(arrived) == state(query)
    assert arrived.filters == query.filters


def with_function():
    return Book.query(ndb_query.PostFilterNode(len))


def with_parameter():
    return ndb.gql("SELECT * FROM Book WHERE copies > :1")


def with_other_filters():
    query = Book.query()
    query.filters = "copies"
    return query


@pytest.mark.parametrize("make", [with_function, with_parameter, with_other_filters])
def test_a_query_with_code_or_parameters_is_refused(make):
    with pytest.raises(UnencodableArgument, match="query.Query. cannot be carried"):
        carry(make(), _policy=Policy(HERE, "google.cloud.ndb.*"))


@pytest.mark.parametrize("label", KEYS)
def test_a_key_needs_no_pattern_and_arrives_equal(label):
    key = KEYS[label]()
    arrived, again, keyed = carry(key, [key], {key: 1}, _policy=NOTHING).args
    assert type(arrived) is ndb.Key
    assert arrived == key
    assert hash(arrived) == hash(key)
    assert again[0] is arrived
    assert keyed == {key: 1}
    for part in ("flat", "project", "namespace", "database", "parent"):
        assert getattr(arrived, part)() == getattr(key, part)()
    if key.id() is not None:
        assert arrived.urlsafe() == key.urlsafe()


@pytest.mark.parametrize("label", VALUES)
def test_the_other_values_need_no_pattern(label):
    value = VALUES[label]()
    arrived = carry_one(value, _policy=NOTHING)
    assert type(arrived) is type(value)
    assert vars(arrived) == vars(value)


def state(value):
    """What there is of an entity or a part of one, by types and values."""
    if isinstance(value, ndb.Model):
        return type(value), {name: state(each) for name, each in vars(value).items()}
    if isinstance(value, StoredKey):
        return value.flat_path, value.project, value.namespace, value.database
    if isinstance(value, ndb.Key):
        return state(value._key)
    if isinstance(value, Entity):
        return type(value), state(value.key), state(dict(value)), sorted(value.exclude_from_indexes), value._meanings
    if isinstance(value, dict):
        return {name: state(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [state(each) for each in value]
    if hasattr(value, "__dict__") and type(value).__module__.startswith("google."):
        return type(value), {name: state(each) for name, each in vars(value).items() if name != "_reference"}
    return type(value), value


@pytest.mark.parametrize("label", ENTITIES)
def test_an_entity_arrives_as_it_was_and_nothing_of_its_class_runs(label):
    entity = ENTITIES[label]()
    Book.RAN.clear()
    arrived, again = carry(entity, [entity], _policy=POLICY).args
    assert Book.RAN == []
    assert state(arrived) == state(entity)
    assert again[0] is arrived
    assert arrived == entity
    assert arrived.key == entity.key
    stored = (
        [state(ndb_model._entity_to_ds_entity(each)) for each in (arrived, entity)] if label != "projection" else [1, 1]
    )
    assert stored[0] == stored[1]


def test_the_entity_can_be_used_as_before():
    arrived = carry_one(ENTITIES["read"](), _policy=POLICY)
    assert (arrived.title, arrived.upper, arrived.notes, arrived.home.street) == (
        "Ulysses",
        "ULYSSES",
        {"a": [1, None]},
        "s",
    )
    arrived.title = "Dubliners"
    assert arrived.upper == "DUBLINERS"
    loose = carry_one(ENTITIES["expando"](), _policy=POLICY)
    loose.more = 7
    assert (loose.size, loose.sub.x, loose.plain.a, loose.more) == (3, 1, 1, 7)
    assert "more" not in carry_one(ENTITIES["expando"](), _policy=POLICY)._properties
    assert "size" not in Loose._properties


def test_what_entities_share_stays_shared():
    first, second = book(), book()
    first.notes = second.notes = [1]
    one, two = carry(first, second, _policy=POLICY).args
    one.notes.append(2)
    assert two.notes == [1, 2]


@pytest.mark.parametrize(
    "make", [lambda: book(), lambda: Loose(), lambda: ndb_model.Expando(sub=book()), lambda: [book().home]]
)
def test_the_class_of_an_entity_needs_a_pattern(make):
    with pytest.raises(UnencodableArgument, match=f"{HERE}.*to the policy"):
        carry(make(), _policy=NOTHING)
    tree = tree_of_entity(make())
    with pytest.raises(PolicyViolation):
        decode_one(tree, policy=NOTHING)
    with pytest.raises(CapabilityExceeded):
        decode_one(tree, policy=POLICY.restricted(["tests.sample_tasks"]))


class Counted(victim.Counted, ndb.Model):
    size = ndb.IntegerProperty()


def test_the_inherited_hash_of_an_entity_does_not_run():
    policy = Policy(__name__)
    tree = {
        "$google_ndb_entity": {"$tuple": [{"$class": f"{__name__}:Counted"}, None, {}, {"$tuple": []}, {"$tuple": []}]}
    }
    victim.RAN.clear()
    for trees in ({"$set": [tree]}, [tree, {"$set": [{"$ref": 1}]}]):
        with pytest.raises(PolicyViolation, match="inherits from one that may not run"):
            decode_one(trees, policy=policy)
    entity = Counted()
    assert victim.RAN == []
    for sent in ([{entity}], [entity, {entity}]):
        with pytest.raises(UnencodableArgument, match="victim:Counted"):
            carry(*sent, _policy=policy)
    assert type(decode_one(tree, policy=policy)) is Counted


def tree_of_entity(value):
    from safedefer.codecs.typed import CallData
    from safedefer.refs import UNBOUND
    from tests.zoo.exactly import CODEC

    return CODEC.encode(CallData(UNBOUND, (value,), {}), POLICY).args[0]


def with_attribute(value, name="extra"):
    value.__dict__[name] = 1
    return value


def replaced():
    value = Book()
    value._clone_properties()
    value._properties["t"] = ndb.StringProperty("t")
    return value


def computed():
    value = Loose(size=1)
    value._properties["size"] = ndb.ComputedProperty(lambda self: 1, name="size")
    return value


def forged_key():
    value = Book()
    value.__dict__["_entity_key"] = "A"
    return value


def cyclic():
    value = Book()
    value.notes = {"me": value}
    return value


@pytest.mark.parametrize(("make", "word"), [
    (lambda: with_attribute(book()), r"beside its properties \(extra\)"), (lambda: with_attribute(ndb.Key("A", 1)), "attributes were added"),
    (lambda: with_attribute(ndb.GeoPt(1, 2)), r"added.*\(extra\)"), (lambda: ndb.GeoPt("1", 2), r"added.*\(latitude\)"), (lambda: ndb.Cursor("text"), r"added.*\(cursor\)"),
    (lambda: Book.query(default_options=ndb.QueryOptions(limit=1)), r"\(default_options\)"),
    (replaced, "replaces properties"), (computed, "no plain one"), (forged_key, "is a Key"), (cyclic, "contains itself"), (lambda: shelf.Reduced(), "__reduce__"),
    (lambda: shelf.WithState(), "__getstate__"), (lambda: shelf.WithSlots(), "slots"),
    (lambda: with_attribute(Entity()), "stored entity"), (lambda: with_attribute(ndb_model._CompressedValue(b"x")), "compressed value"),
    (lambda: with_attribute(ndb_model._CompressedValue(b"x"), "z_val"), "compressed value"),
])  # fmt: skip
def test_what_would_be_dropped_is_refused(make, word):
    with pytest.raises(UnencodableArgument, match=word):
        carry(make(), _policy=POLICY)


@pytest.mark.parametrize("policy", [POLICY, Policy(HERE, "google.cloud.ndb.*")])
def test_what_holds_a_client_or_a_connection_is_refused(client, policy):
    from google.cloud.ndb import context

    live = [client, context.get_context(), Book.query(Book.title == "x").iter(), ndb.Future()]
    for value in (*live, {"a": [live[0]]}):
        with pytest.raises(UnencodableArgument, match="pass an id"):
            carry(value, _policy=policy)


def test_neither_end_needs_a_context(client):
    values = [make() for make in (*KEYS.values(), *ENTITIES.values(), *VALUES.values())]
    arrived = []

    def outside():
        arrived.extend(carry(*values, _policy=POLICY).args)

    thread = threading.Thread(target=outside)
    thread.start()
    thread.join()
    assert [type(each) for each in arrived] == [type(each) for each in values]


def test_no_token_makes_what_is_live():
    with pytest.raises(InvalidArguments, match="of this process"):
        decode_one({"$google_ndb_live": 1}, policy=POLICY)


# --- Calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [lambda: Book, lambda: book().shout, lambda: Book.count, lambda: Cat.put],
    ids=["class", "method", "classmethod", "unbound"],
)
def test_model_classes_and_their_methods_are_callables(of):
    obj = of()
    if getattr(obj, "__qualname__", "") == "Model._put":
        with pytest.raises(NotDeferrable, match="without its object"):
            POLICY.callable_ref(obj)
        return
    ref = POLICY.callable_ref(obj)
    bound = bound_object(obj)
    assert POLICY.load_callable(ref, bound) == obj


@pytest.mark.parametrize(("of", "pattern"), [
    (lambda: book(id=1).put, "google.cloud.ndb.model:Model._put"), (lambda: Book.get_by_id, "google.cloud.ndb.model:Model._get_by_id"),
    (lambda: ndb.Key("A", 1).delete, "google.cloud.ndb.key:Key.delete"), (lambda: ndb.Key("A", 1).get, "google.cloud.ndb.key:Key.get"),
])  # fmt: skip
def test_what_ndb_itself_defines_needs_the_pattern_that_the_message_names(of, pattern):
    obj = of()
    with pytest.raises(NotDeferrable, match=r"policy|pattern"):
        POLICY.callable_ref(obj)
    policy = Policy(HERE, pattern)
    ref = policy.callable_ref(obj)
    arrived = (
        carry(_bound=obj.__self__, _policy=policy).bound if isinstance(obj.__self__, (ndb.Key, ndb.Model)) else None
    )
    found = policy.load_callable(ref, arrived) if arrived is not None else policy.load_callable(ref)
    assert found.__func__ is obj.__func__
    assert found.__self__ == obj.__self__


def test_a_model_class_is_an_argument():
    assert carry(Book, [Cat], _policy=POLICY).args == [Book, [Cat]]
    with pytest.raises(UnencodableArgument, match="policy"):
        carry(Book, _policy=NOTHING)


# --- Forged payloads --------------------------------------------------------------------------------

CLASS = {"$class": f"{HERE}:Book"}
GENERIC = {"_name": "size", "_indexed": True}


def tuples(*parts):
    return {"$tuple": list(parts)}


PATH = tuples("A", 1)
BAD = {
    "$google_ndb_key": [1, tuples(PATH, "p", None, None), tuples(1, "p", None, None, None), tuples(tuples(), "p", None, None, None), tuples(tuples(1, 1), "p", None, None, None),
                 tuples(tuples("A", 1.5), "p", None, None, None), tuples(PATH, 1, None, None, None), tuples(PATH, "p", 1, None, None), tuples(PATH, "p", None, None, "x"),
                 tuples(PATH, "p", None, None, {"$bytes": "eA=="}), tuples(tuples("A", None), "p", None, None, None)],
    "$google_datastore_key": [tuples(PATH, "p"), 1],
    "$google_ndb_cursor": [tuples("x"), tuples(), 1], "$google_ndb_geopt": [tuples("1", 2), tuples(1)], "$google_ndb_user": [tuples(1, "x", None)], "$google_ndb_blobkey": [tuples(5)],
    "$google_ndb_filter": [tuples(1, "=", 1), tuples("a", "="), 1], "$google_ndb_and": [tuples([]), tuples([1]), tuples(tuples())],
    "$google_ndb_or": [tuples([CLASS]), tuples(None)], "$google_ndb_false": [1, tuples(1)], "$google_ndb_order": [tuples("a", 1), tuples(1, True)],
    "$google_ndb_query": [
        1, tuples(), tuples(None, "A", None, CLASS, *[None] * 9), tuples(None, "A", None, None, [1], *[None] * 8),
        tuples(CLASS, *[None] * 12), tuples(None, 1, *[None] * 11), tuples(*[None] * 11, tuples(1), None), tuples(None, "A", {"a": 1}, *[None] * 10),
    ],
    "$google_ndb_compressed": [tuples("x"), tuples(), 1], "$google_ndb_stored": [tuples(), 1],
    "$google_datastore_entity": [1, tuples(None, [], {"$frozenset": []}, {}), tuples(1, {}, {"$frozenset": []}, {}), tuples(None, {"$dict": [[1, 2]]}, {"$frozenset": []}, {})],
    "$google_ndb_entity": [
        1, tuples(CLASS), tuples(f"{HERE}:Book", None, {}, tuples(), tuples()), tuples({"$class": "builtins:int"}, None, {}, tuples(), tuples()),
        tuples({"$class": f"{HERE}:Plain"}, None, {}, tuples(), tuples()), tuples(CLASS, 1, {}, tuples(), tuples()), tuples(CLASS, None, [], tuples(), tuples()),
        tuples(CLASS, None, {"$dict": [[1, 1]]}, tuples(), tuples()), tuples(CLASS, None, {}, "x", tuples()), tuples(CLASS, None, {}, tuples(1), tuples()),
        tuples(CLASS, None, {}, tuples(), 1), tuples(CLASS, None, {"gone": 1}, tuples(), tuples()), tuples({"$class": f"{HERE}:Reduced"}, None, {}, tuples(), tuples()),
        tuples(CLASS, None, {}, tuples(), tuples(1)), tuples(CLASS, None, {}, tuples(), tuples(tuples("size", "Property", GENERIC, None))),
        tuples(CLASS, None, {}, tuples(), tuples(tuples("size", "GenericProperty", GENERIC, CLASS))),
        tuples(CLASS, None, {}, tuples(), tuples(tuples("size", "StructuredProperty", GENERIC, None))),
        tuples(CLASS, None, {}, tuples(), tuples(tuples("other", "GenericProperty", GENERIC, None))),
        tuples(CLASS, None, {}, tuples(), tuples(tuples("size", "GenericProperty", GENERIC | {"_validator": CLASS}, None))),
        tuples(CLASS, None, {}, tuples(), tuples(tuples("size", "GenericProperty", GENERIC | {"_code_name": [1]}, None))),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "payload"), [(tag, payload) for tag, payloads in BAD.items() for payload in payloads], ids=str
)
def test_a_payload_that_no_encoder_wrote_is_refused(tag, payload):
    Book.RAN.clear()
    with pytest.raises(InvalidArguments):
        decode_one({tag: payload}, policy=POLICY)
    assert Book.RAN == []


def test_a_reference_of_another_key_is_refused():
    tree = tree_of(KEYS["urlsafe"]())
    other = tree_of(ndb.Key("A", 2))
    forged = [*other["$google_ndb_key"]["$tuple"][:4], tree["$google_ndb_key"]["$tuple"][4]]
    with pytest.raises(InvalidArguments, match="another key"):
        decode_one({"$google_ndb_key": {"$tuple": forged}})


def test_a_property_of_a_token_does_not_replace_one_of_the_class():
    tree = {
        "$google_ndb_entity": tuples(
            CLASS, None, {}, tuples(), tuples(tuples("t", "GenericProperty", {"_name": "t"}, None))
        )
    }
    with pytest.raises(InvalidArguments, match="of the class"):
        decode_one(tree, policy=POLICY)
    assert "google.cloud.ndb" in sys.modules
