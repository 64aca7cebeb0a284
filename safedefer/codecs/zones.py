"""Time zones by their keys, without an import at a token's request.

``ZoneInfo(key)`` looks for a file in ``zoneinfo.TZPATH`` and then imports the package ``tzdata.zoneinfo.Some`` for
``Some/Where``, whether there is one or not. Here the packages of ``tzdata`` are imported when a handler starts, and no key is
looked up that none of the places has.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import zoneinfo
from functools import cache
from importlib import import_module, resources
from typing import Final

_PACKAGE: Final = "tzdata.zoneinfo"
# Without empty, dot or absolute parts.
_KEY: Final = r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_+.-]{0,63}(?:/[A-Za-z0-9_][A-Za-z0-9_+.-]{0,63}){0,4}"


def load_zones() -> None:
    """Import the packages of ``tzdata``, if it is installed: called when a handler starts."""
    _import_packages(_PACKAGE)


@cache  # the search of all its folders takes 10 ms, which an App after the first need not spend again
def _import_packages(name: str) -> None:
    import pkgutil  # noqa: PLC0415  # for a handler alone

    with contextlib.suppress(ImportError):
        package = import_module(name)
        resources.files(package)  # imports what reads a package
        for found in pkgutil.walk_packages(package.__path__, f"{name}."):
            if found.ispkg:
                import_module(found.name)


def is_key(key: str) -> bool:
    """Whether a text may be a key of the IANA database: its parts cannot lead out of the database."""
    return re.fullmatch(_KEY, key) is not None


def has_zone(key: str) -> bool:
    """Whether this machine's database, or a package of ``tzdata`` that is imported, has the zone of a key.

    Args:
        key: ``Some/Where``, without empty and dot parts.
    """
    if any(os.path.isfile(os.path.join(folder, key)) for folder in zoneinfo.TZPATH):  # noqa: PTH113, PTH118  # as zoneinfo does
        return True
    folder, _, name = key.rpartition("/")
    package = sys.modules.get(".".join([_PACKAGE, *folder.split("/")]) if folder else _PACKAGE)
    return package is not None and resources.files(package).joinpath(name).is_file()
