"""Models of a small application on google-cloud-ndb."""

from google.cloud import ndb
from google.cloud.ndb import polymodel


class Address(ndb.Model):
    street = ndb.StringProperty()
    city = ndb.StringProperty()


class Book(ndb.Model):
    title = ndb.StringProperty("t")
    tags = ndb.StringProperty(repeated=True)
    when = ndb.DateTimeProperty()
    home = ndb.StructuredProperty(Address)
    homes = ndb.StructuredProperty(Address, repeated=True)
    local = ndb.LocalStructuredProperty(Address)
    upper = ndb.ComputedProperty(lambda self: self.title and self.title.upper())
    notes = ndb.JsonProperty()
    author = ndb.KeyProperty()
    place = ndb.GeoPtProperty()
    owner = ndb.UserProperty()
    cover = ndb.BlobProperty(compressed=True)
    scan = ndb.BlobKeyProperty()
    copies = ndb.IntegerProperty(default=3)

    RAN = []

    def __init__(self, **kwargs):
        Book.RAN.append("__init__")
        super().__init__(**kwargs)

    def _pre_put_hook(self):
        Book.RAN.append("_pre_put_hook")

    def shout(self, mark="!"):
        return self.title.upper() + mark

    @classmethod
    def count(cls, number):
        return cls, number


class Loose(ndb.Expando):
    name = ndb.StringProperty()


class Animal(polymodel.PolyModel):
    name = ndb.StringProperty()


class Cat(Animal):
    pass


class Reduced(ndb.Model):
    def __reduce__(self):
        return Reduced, ()


class WithState(ndb.Model):
    def __getstate__(self):
        return {}


class WithSlots(ndb.Model):
    __slots__ = ("extra",)


class Plain:
    pass
