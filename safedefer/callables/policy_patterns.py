"""How the patterns of a policy are spelled: ``pkg.mod``, ``pkg.*`` and ``mod:qualname``. ``policy`` says what each admits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from safedefer.errors import ConfigurationError
from safedefer.gadgets import is_standard_library

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*"
_MODULE: Final = re.compile(_NAME)
_PACKAGE: Final = re.compile(rf"({_NAME})\.\*")
#: ``mod:qualname``: an exact pattern, and the name of a class inside the arguments.
EXACT: Final = re.compile(rf"({_NAME}):({_NAME})")
#: Modules that are run again under another name when they are imported so.
OTHER_MODULES: Final = frozenset({"__main__", "__mp_main__", "__init__"})


class PatternsByKind(NamedTuple):
    """The patterns of a policy, by kind."""

    modules: frozenset[str]
    """Those of one module."""
    packages: tuple[str, ...]
    """Those of a package, without the asterisk: what the name of a module and a dot begins with."""
    exact: tuple[tuple[str, str], ...]
    """Module and qualified name of those of one object."""


def read_patterns(patterns: tuple[str, ...]) -> PatternsByKind:
    """Tell the patterns of a policy apart.

    Raises:
        ConfigurationError: One is malformed, or names the standard library as a whole.
    """
    for pattern in patterns:
        _check_pattern(pattern)
    return PatternsByKind(
        modules=frozenset(pattern for pattern in patterns if _MODULE.fullmatch(pattern)),
        packages=tuple(pattern.removesuffix("*") for pattern in patterns if _PACKAGE.fullmatch(pattern)),
        exact=tuple((match[1], match[2]) for match in map(EXACT.fullmatch, patterns) if match is not None),
    )


def check_moved(moved: Mapping[str, str]) -> None:
    """Check the names of what moved.

    Raises:
        ConfigurationError: One is malformed, or moves twice.
    """
    for old, new in moved.items():
        if EXACT.fullmatch(old) is None or EXACT.fullmatch(new) is None:
            raise ConfigurationError("moved maps 'old.mod:name' to 'new.mod:name'; write both with a colon")
        if new in moved:
            raise ConfigurationError(f"moved takes one step, and {new} moves again; map {old} to the last name")


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str) or not any(shape.fullmatch(pattern) for shape in (_MODULE, _PACKAGE, EXACT)):
        raise ConfigurationError(
            f"{pattern!a} is not a pattern; write 'pkg.mod', 'pkg.*' or 'mod:qualname', one argument each"
        )
    module = pattern.removesuffix(".*")
    if ":" in pattern:
        return
    if is_standard_library(module):
        raise ConfigurationError(
            f"{pattern!r} would admit a part of the standard library; name the callables exactly: '{module}:name'"
        )
    if not OTHER_MODULES.isdisjoint(module.split(".")):
        raise ConfigurationError(f"{pattern!r} is another module in every process; move the tasks to one of their own")
