"""Decorators and functions that the zoo of callables borrows from elsewhere."""

import functools

from safedefer import deferrable


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def unwrapped(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def foreign(self=None):
    return "foreign"


class Base:
    """A class outside the zoo's module, as that of an ORM."""

    def save(self):
        return "saved"

    @classmethod
    def create(cls):
        return cls()


class MarkedBase(Base):
    @deferrable
    def marked_method(self):
        return "marked"

    @classmethod
    @deferrable
    def marked_build(cls):
        return "marked"


class CallableBase:
    def __call__(self):
        return "called"
