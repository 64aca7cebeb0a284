"""Generic pydantic models with arguments, ``Page[int]``: made again from the model and the arguments, where no code of the user's runs.

pydantic makes a class for each, and looks at the arguments for hooks: models and arguments that have any are refused. So are
many arguments; a process keeps a bounded number of classes, and a token makes fewer. What the fields of the model itself,
or of a dataclass among the arguments, need of their types ran when it was defined, and runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from types import GenericAlias
from typing import Any, Final, Generic, cast

from pydantic import BaseModel, RootModel

from safedefer.codecs import inspect_safely
from safedefer.codecs.registry import TypeRegistry
from safedefer.codecs.shared import Refusal
from safedefer.codecs.types.generics import MOST_ARGUMENTS, count
from safedefer.refs import METACLASSES

#: The most classes that are kept: the oldest makes room for a new one, so that no key keeps others from theirs.
_MOST: Final = 256
#: The most classes that one token makes; the next attempt makes more.
MOST_NEW: Final = 32
_BASES: Final = (object, BaseModel, RootModel, cast("type", Generic))
#: What pydantic calls to make the schema of an argument, and to make a class of a model.
_OF_ARGUMENTS: Final = ("__get_pydantic_core_schema__", "__get_validators__")
_OF_MODELS: Final = (
    *_OF_ARGUMENTS, "__class_getitem__", "__init_subclass__", "__pydantic_init_subclass__", "__pydantic_on_complete__", "model_parametrized_name",
)  # fmt: skip


def parametrize(registry: TypeRegistry, origin: Any, args: Any, making: Callable[[], object] = object) -> type:
    """Return the class of a generic model and its arguments.

    Args:
        registry: Has those that were made already. One that is made is added.
        origin: The model, admitted.
        args: The arguments: classes, and aliases such as ``list[int]``.
        making: Called before a new one is made; may raise ``Refusal``.

    Raises:
        Refusal: It may not be made here.
    """
    if type(origin) is not type(BaseModel) or not _is_silent(origin, _OF_MODELS):
        raise Refusal(
            "a generic model with hooks of its own is not made from arguments; name it: class IntPage(Page[int])"
        )
    if type(args) is not tuple or not args or not all(_is_argument(each) for each in args):
        raise Refusal(
            "the arguments of a generic model must be classes without hooks; name it: class IntPage(Page[int])"
        )
    if sum(count(each) for each in args) > MOST_ARGUMENTS:
        raise Refusal(f"a generic model has more than {MOST_ARGUMENTS} arguments; name it: class IntPage(Page[int])")
    known = registry.generics
    made = known.get((origin, args))
    if made is None:
        making()
        getter = inspect_safely.namespace(BaseModel)["__class_getitem__"].__get__(None, origin)
        made = cast("type", getter(args))
        if made is origin:
            raise Refusal("the model is not generic, or its arguments are its own parameters; name the class")
        registry.keep_generic((origin, args), made, _MOST)
    return made


def _is_argument(value: Any) -> bool:
    if type(value) is GenericAlias:
        return all(map(_is_argument, (value.__origin__, *value.__args__)))
    # pydantic names the class it makes by the reprs of the arguments, which are their metaclasses'.
    return any(type(value) is known for known in METACLASSES) and _is_silent(value, _OF_ARGUMENTS)


def _is_silent(cls: type, hooks: tuple[str, ...]) -> bool:
    """Whether none of the hooks is one of the user's. Those of the built-in classes are Python's."""
    found = (inspect_safely.lookup(cls, hook) for hook in hooks)
    return all(
        each is None or any(each[0] is base for base in _BASES) or not inspect_safely.made_in_python(each[0])
        for each in found
    )
