"""Getters of the interpreter: what stands in a class or a module, read without any code of a metaclass or subclass."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Final, cast

class_mro: Final = cast("Any", type.__dict__["__mro__"]).__get__
class_dict: Final = cast("Any", type.__dict__["__dict__"]).__get__
class_module: Final = cast("Any", type.__dict__["__module__"]).__get__
class_qualname: Final = cast("Any", type.__dict__["__qualname__"]).__get__
module_dict: Final = cast("Any", vars(ModuleType)["__dict__"]).__get__
