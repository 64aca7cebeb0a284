"""asyncpg's own UUID, which its connections return: another class than ``uuid.UUID``, in C. Needs asyncpg imported."""

from __future__ import annotations

import re
import sys
from typing import Any, Final

from safedefer.codecs.packs import Pack, PackedType
from safedefer.codecs.shared import Refusal

_MODULE: Final = "asyncpg.pgproto.pgproto"
_TEXT: Final = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def _types() -> tuple[PackedType, ...]:
    uuid: Any = sys.modules[_MODULE].UUID

    def decode(text: Any) -> object:
        if type(text) is not str or re.fullmatch(_TEXT, text) is None:
            raise Refusal("$asyncpg_uuid is the text of a UUID")
        return uuid(text)

    return (PackedType("$asyncpg_uuid", (uuid,), str, decode),)


PACK: Final = Pack(_MODULE, _types)
