"""Classes that are constructed by others'."""

from tests.zoo.far import Inits, Makes, Point


class Child(Inits, Makes):
    pass


class Own:
    def __init__(self, value: object = None) -> None:
        self.value = value


class Moved(Point):
    def own(self) -> None: ...


def run() -> None: ...
