"""The entities of the shop, and the plain classes beside them."""

import collections
import datetime
import enum
from dataclasses import dataclass, field
from decimal import Decimal

from google.cloud import ndb
from google.cloud.ndb import polymodel

from safedefer import deferred

DONE = []


def note(what):
    DONE.append(what)


Money = collections.namedtuple("Money", "amount currency")  # noqa: PYI024


class Status(enum.Enum):
    OPEN = "open"
    SHIPPED = "shipped"


class Right(enum.IntFlag):
    READ = 1
    WRITE = 2


class ShopError(Exception):
    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


@dataclass
class Line:
    article: str
    price: Decimal
    tags: list = field(default_factory=list)


class Address(ndb.Model):
    street = ndb.StringProperty()
    city = ndb.StringProperty()


class Base(ndb.Model):
    """What all entities of the shop have."""

    created = ndb.DateTimeProperty()

    @classmethod
    def of(cls, name):
        return cls(id=name)

    @classmethod
    def import_rows(cls, rows):
        note((cls.__name__, rows))

    def reindex(self, full=False):
        note((self.key, full))


class Customer(Base):
    name = ndb.StringProperty()
    home = ndb.StructuredProperty(Address)
    others = ndb.StructuredProperty(Address, repeated=True)
    account = ndb.UserProperty()
    place = ndb.GeoPtProperty()
    photo = ndb.BlobKeyProperty()

    def _post_put_hook(self, _future):
        deferred.defer(self.reindex, full=True, _queue="index")


class Order(Base):
    class Kind(enum.Enum):
        PRIVATE = 1
        COMPANY = 2

    number = ndb.IntegerProperty()
    customer = ndb.KeyProperty(kind=Customer)
    related = ndb.KeyProperty(repeated=True)
    comment = ndb.TextProperty()
    label = ndb.BlobProperty(compressed=True)
    details = ndb.JsonProperty()
    extra = ndb.PickleProperty()
    upper = ndb.ComputedProperty(lambda self: (self.comment or "").upper())
    paid = ndb.BooleanProperty(default=False)

    def archive(self, mark=None):
        note((self.number, mark))

    def archive_later(self):
        deferred.defer(self._archive, "later")

    def _archive(self, mark):
        note((self.number, mark))

    @classmethod
    def close_old(cls, before):
        deferred.defer(cls._close, before)

    @classmethod
    def _close(cls, before):
        note((cls, before))

    @staticmethod
    def purge(number):
        note(number)

    def reindex(self, full=False):
        deferred.defer(super().reindex, full)


class Event(ndb.Expando):
    kind = ndb.StringProperty()


class Animal(polymodel.PolyModel):
    name = ndb.StringProperty()

    def speak(self):
        note(self.name)


class Dog(Animal):
    pass


class Mapper:
    """Goes over all entities of a kind, a batch in each task."""

    KIND = None
    FILTERS = ()

    def __init__(self):
        self.to_put = []
        self.seen = 0

    def map(self, entity):
        self.to_put.append(entity)

    def run(self, batch_size=2):
        deferred.defer(self._continue, None, batch_size)

    def _continue(self, start_key, batch_size):
        query = self.KIND.query().order(self.KIND.key)
        entities, cursor, more = query.fetch_page(batch_size, start_cursor=start_key)
        for entity in entities:
            self.map(entity)
        self.seen += len(entities)
        if more:
            deferred.defer(self._continue, cursor, batch_size)
        else:
            note(self.seen)


class AnimalMapper(Mapper):
    KIND = Animal


class Job:
    """One that holds others, and defers a method of its own."""

    def __init__(self, mailer, mapper, filters):
        self.mailer = mailer
        self.mapper = mapper
        self.filters = filters
        self.state = {"done": 0}

    def start(self):
        deferred.defer(self._run)

    def _run(self):
        note(self.mapper(self.state["done"]))


class Mailer:
    """A task that is an object."""

    def __init__(self, sender, retries=3):
        self.sender = sender
        self.retries = retries

    def __call__(self, to, subject):
        note((self.sender, to, subject))

    def send(self, to):
        note((self.sender, to))


class Report:
    def __init__(self, year, **options):
        note((year, options))


def order():
    """An order with something in each property."""
    return Order(
        id=7, number=7, customer=ndb.Key(Customer, "ann"), related=[ndb.Key(Order, 5), ndb.Key(Order, 6)], comment="schön",
        label=b"\x00" * 50, details={"a": [1, None, "x"]}, extra={"when": datetime.date(2024, 2, 29), "parts": (1, 2)},
        created=datetime.datetime(2024, 1, 2, 3, 4, 5), paid=True,
    )  # fmt: skip


def customer():
    """A customer that has not been stored."""
    return Customer(
        name="Ann", home=Address(street="Main", city="B"), others=[Address(city="C"), Address(city="D")],
        account=ndb.User("ann@shop.example", "shop.example", "17"), place=ndb.GeoPt(52.5, 13.4), photo=ndb.BlobKey(b"abc"),
    )  # fmt: skip
