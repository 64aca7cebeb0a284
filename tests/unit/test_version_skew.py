"""Arguments of another version of the code: what a deployment can cure is tried again, and nothing else is."""

import json
import zoneinfo
from dataclasses import dataclass
from enum import Enum, Flag
from typing import NamedTuple

import pytest
from pydantic import BaseModel

from safedefer.policy import Policy
from tests.adversarial.forge import VICTIM, make_app, mint, post

HERE = __name__


class Colour(Enum):
    RED = "red"


class Right(Flag):
    READ = 1


class Point(NamedTuple):
    x: int


@dataclass
class Data:
    a: int = 0


class Model(BaseModel):
    a: int = 0


class Plain:
    pass


class Slotted:
    __slots__ = ("a",)


class Hooked:
    def __setstate__(self, state):
        self.b = state["b"]


class NowFinal:
    """Was an object; has a finalizer now, which may not run on what a token says."""

    def __del__(self):
        pass


class Unhashable:
    __hash__ = None


class Alike:
    def __eq__(self, other):
        return type(other) is Alike

    def __hash__(self):
        return 1


class NowMethod:
    def a(self):
        pass


class NowOne:
    def __new__(cls):
        return ONE


ONE = object.__new__(NowOne)


class Error(Exception):
    def __init__(self, text):
        super().__init__(text)


def name(cls):
    return f"{HERE}:{cls.__qualname__}"


def obj(cls, **state):
    return {"$object": {"class": name(cls), "state": state}}


SKEWS = {
    "an unknown tag": {"$point3d": [1, 2, 3]},
    "a tag of a library that is not installed here": {"$acme.Money": "1"},
    "a new enum member": {"$enum": [name(Colour), "BLUE"]},
    "a new flag": {"$enum": [name(Right), 6]},
    "a combination of flags that has a name here": {"$enum": [name(Right), 1]},
    "a named tuple with a new field": {"$namedtuple": [name(Point), 1, 2]},
    "a named tuple that is a class here": {"$namedtuple": [name(Plain), 1]},
    "a dataclass with a new field in its slots": {"$object": {"class": name(Slotted), "state": {"b": 1}}},
    "a dataclass that is a model here": {"$dataclass": [name(Model), {"a": 1}]},
    "a model that is a dataclass here": {"$model": [name(Data), {"a": 1}, ["a"], None, None]},
    "an object that is a dataclass here": {"$object": {"class": name(Data), "state": {"a": 1}}},
    "an object with a hook here, without its state": {"$object": {"class": name(Hooked), "state": {"a": 1}}},
    "an object whose hook wants another state": {"$object": {"class": name(Hooked), "setstate": {"a": 1}}},
    "an object that may not travel here": {"$object": {"class": name(NowFinal), "state": {}}},
    "a set member without a hash here": {"$set": [{"$object": {"class": name(Unhashable), "state": {}}}]},
    "set members that are equal here": {"$set": [obj(Alike, a=1), obj(Alike, a=2)]},
    "an attribute that is a method here": obj(NowMethod, a=1),
    "an object of which there is one here": {"$object": {"class": name(NowOne), "state": {}}},
    "an exception that takes no such attribute": {"$exception": ["builtins:UnicodeDecodeError", [], {}]},
    "a time zone that this machine does not know": {"$zoneinfo": "Mars/Olympus_Mons"},
    "a pattern of a newer Python": {"$pattern": ["(?N)a", 32]},
}
FOR_EVER = {
    "not base64": {"$bytes": "%"},
    "a reference to nothing": {"$ref": 7},
    "two equal set members": {"$set": [1, 1]},
    "a decimal that is none": {"$decimal": "one"},
    "no IANA key": {"$zoneinfo": "../../etc/passwd"},
    "an enum without a name": {"$enum": [name(Colour)]},
    "a tag beside a member": {"$set": [], "a": 1},
    "a date that is none": {"$date": "2026-02-30"},
}


@pytest.fixture
def app():
    app = make_app(policy=Policy(VICTIM, HERE))
    yield app
    app.close()


def answer(app, tree):
    status, headers, _ = post(app, mint(args=[tree]))
    return status, headers["Safedefer-Outcome"]


@pytest.mark.parametrize("case", SKEWS)
def test_what_another_version_may_read_is_tried_again(app, case):
    assert answer(app, SKEWS[case]) == (500, "rejected")


@pytest.mark.parametrize("case", FOR_EVER)
def test_what_no_version_reads_is_dead_at_once(app, case):
    assert answer(app, FOR_EVER[case]) == (200, "failed")


def test_a_zone_is_read_once_the_machine_has_it(app, monkeypatch):
    token = mint(args=[{"$zoneinfo": "Europe/Paris"}])
    original = zoneinfo.ZoneInfo

    class Missing(original):
        def __new__(cls, key):
            raise zoneinfo.ZoneInfoNotFoundError(key)

    with monkeypatch.context() as patch:
        patch.setattr("safedefer.codecs.tags.times.ZoneInfo", Missing)
        assert post(app, token)[0] == 500
    assert post(app, token)[0] == 200


def test_all_cases_are_json():
    assert json.dumps([SKEWS, FOR_EVER])
