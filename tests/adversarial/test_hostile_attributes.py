"""Values of ndb with attributes that are no attributes: names and classes of somebody's own, whose code must not run."""

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import ndb

from safedefer import Policy
from safedefer.errors import UnencodableArgument
from tests import sample_tasks as tasks
from tests.unit.apps import make_app

RAN = []


class Named(str):
    __slots__ = ()

    def __str__(self):
        RAN.append("str")
        return "text"

    def __hash__(self):
        RAN.append("hash")
        return str.__hash__(self)

    def __eq__(self, other):
        RAN.append("eq")
        return str.__eq__(self, other)

    def __lt__(self, other):
        RAN.append("lt")
        return str.__lt__(self, other)


class Meta(type):
    def __eq__(cls, other):
        RAN.append("eq of the metaclass")
        return cls is other

    def __hash__(cls):
        RAN.append("hash of the metaclass")
        return 1


class OfMeta(metaclass=Meta):
    pass


class Values(dict):
    def items(self):
        RAN.append("items")
        return []


@pytest.fixture
def app():
    app = make_app(policy=Policy("tests.sample_tasks", "google.cloud.ndb.model:Model"))
    with ndb.Client(project="p", credentials=AnonymousCredentials()).context():
        yield app
    app.close()


MAKERS = {
    "key": lambda: ndb.Key("A", 1),
    "point": lambda: ndb.GeoPt(1, 2),
    "user": lambda: ndb.User("a@b.example", "b.example"),
    "cursor": lambda: ndb.Cursor(b"abc"),
    "query": ndb.Query,
    "entity": ndb.Model,
}


def refused(app, value):
    RAN.clear()
    with pytest.raises(UnencodableArgument) as caught:
        app.defer(tasks.take, value)
    assert RAN == []
    return str(caught.value)


@pytest.mark.parametrize("label", MAKERS)
@pytest.mark.parametrize("added", [True, False], ids=["added", "in place of another"])
def test_no_code_of_the_name_of_an_attribute_runs(app, label, added):
    value = MAKERS[label]()
    own = value.__dict__
    if not added:
        del own[next(iter(own))]
    own[Named("name")] = 1
    assert "the name of an attribute of it is not exactly a str" in refused(app, value)


@pytest.mark.parametrize(("label", "name"), [("point", "latitude"), ("cursor", "cursor"), ("query", "limit")])
def test_no_code_of_the_metaclass_of_an_attribute_runs(app, label, name):
    value = MAKERS[label]()
    value.__dict__[name] = OfMeta()
    assert f"holds what it should not ({name})" in refused(app, value)


def test_no_code_of_the_values_of_an_entity_runs(app):
    value = ndb.Model()
    value.__dict__.update(_values=Values(), extra=1)
    assert "beside its properties (extra)" in refused(app, value)
