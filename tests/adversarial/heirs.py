"""Classes of the application that inherit from everywhere. Only what they define themselves is theirs to run."""

import collections
import dataclasses
import enum
import json
import logging
import string
import threading
import unittest
import xmlrpc.client
from typing import NamedTuple

from pydantic import BaseModel, RootModel
from pydantic_settings import BaseSettings

from tests.adversarial.victim import Counted, Parcel


class Model(BaseModel):
    a: int = 1

    def own(self):
        return self.a

    @classmethod
    def make(cls):
        return cls()


class Root(RootModel[list[int]]):
    pass


class Config(BaseSettings):
    a: int = 1


class Worker(threading.Thread):
    def own(self):
        return 1


class Handler(logging.FileHandler):
    def __init__(self):
        logging.Handler.__init__(self)


class Encoder(json.JSONEncoder):
    pass


class Formatter(string.Formatter):
    pass


class Case(unittest.TestCase):
    def own(self):
        return 1


class Server(xmlrpc.client.ServerProxy):
    def __init__(self):
        pass


class Table(dict):
    def own(self):
        return 1


class Text(str):
    """Inherits ``format``, which reads any attribute, and ``encode``, which imports a codec."""

    __slots__ = ()


class Number(int):
    pass


class Names(collections.UserDict):
    pass


class Color(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int = 0


class Heavy(Parcel):
    """Inherits from another module of the application, which the policy may name or not."""


class Left:
    def shared(self):
        return "left"


class Right(Left):
    def shared(self):
        return "right"


class Keyed(Counted):
    pass


@dataclasses.dataclass(frozen=True)
class Holder:
    held: object
