"""A part of the shop that its policy does not name."""

import enum

from google.cloud import ndb

from tests.ported.shop.models import note


class Level(enum.Enum):
    LOW = 1


class Voucher(ndb.Model):
    code = ndb.StringProperty()
    value = ndb.IntegerProperty()

    def redeem(self, *levels):
        note((self.code, levels))


class Rule:
    """An object with a state hook, which does not run before the policy admits its class."""

    def __init__(self, name):
        self.name = name
        self.lines = []

    def __getstate__(self):
        note("hook")
        return self.__dict__


def grant(*args, **kwargs):
    note((args, kwargs))
