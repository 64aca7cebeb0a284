"""Which class ndb makes of a stored entity: the one of its kind that was defined last, in whatever module of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.cloud import ndb

if TYPE_CHECKING:
    from types import ModuleType

    import pytest


def use_kinds(patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
    """Let the models of some modules be those of their kinds while a test runs."""
    own = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    kinds = {cls._get_kind(): cls for cls in own if issubclass(cls, ndb.Model) and cls is not ndb.Model}
    patch.setattr(ndb.Model, "_kind_map", {**ndb.Model._kind_map, **kinds})
