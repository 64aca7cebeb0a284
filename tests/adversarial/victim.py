"""The tasks of the application under attack. They write down that they ran."""

from safedefer.errors import PermanentTaskFailure

RAN = []


def note(*args, **kwargs):
    RAN.append((args, kwargs))


def other(*args):
    RAN.append(("other", args))


def fail(*args):
    RAN.append(("fail", args))
    raise PermanentTaskFailure("the task says no")


def stumble(*args):
    RAN.append(("stumble", args))
    raise ValueError(*args)


class Parcel:
    def __init__(self, weight=0):
        self.weight = weight


def reraise(error):
    RAN.append(("reraise", error))
    raise error


class NoSuchThing(ImportError):
    pass


class Counted:
    """Writes down who hashes and compares it."""

    def __hash__(self):
        RAN.append("__hash__")
        return 1

    def __eq__(self, other):
        RAN.append("__eq__")
        return self is other


class Number(int):
    def __new__(cls, value):
        RAN.append(("__new__", value))
        return int.__new__(cls, value)
