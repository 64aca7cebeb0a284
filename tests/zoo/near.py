"""Classes that are constructed by others'."""

from tests.zoo.far import Inits, Makes


class Child(Inits, Makes):
    pass


class Own:
    def __init__(self, value: object = None) -> None:
        self.value = value


def run() -> None: ...
