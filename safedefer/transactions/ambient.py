"""Which Datastore transaction runs here, asked of google-cloud-ndb where it is imported. Imports nothing of it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Final

NDB: Final = "google.cloud.ndb"


def running_transaction() -> bytes | None:
    """Return the name of the ndb transaction that the calling code is in; None if there is none."""
    ndb = sys.modules.get(NDB)
    get_context = getattr(ndb, "get_context", None)  # another thread may be importing it
    context = None if get_context is None else get_context(raise_context_error=False)
    name: bytes | None = None if context is None else context.transaction
    return name


def is_ndb(connection: object) -> bool:
    """Whether an object is the module ``google.cloud.ndb``, which stands for its transaction."""
    return isinstance(connection, ModuleType) and connection.__name__ == NDB
