"""Redaction: what the record of an attempt may say of an exception."""

from __future__ import annotations

import re
import traceback
from typing import Final

_MAX_RECORDED: Final = 16_384
# Anything shaped like a token, in a traceback, is a token of somebody. Whole words with dots are matched, and looked
# into: a pattern that begins with the token would be tried from every place of a long word.
_DOTTED: Final = r"[A-Za-z0-9_.-]{12,}"
_TOKEN_START: Final = "eyJ"  # noqa: S105  # how a JSON object begins in base64
# Compiled by `re` when it is first needed: that takes milliseconds, and few processes that import this ever do.
_CONTROL: Final = r"[^\t\n -~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def redacted_traceback(error: BaseException) -> str:
    """Return frames, type and text of an exception; tokens in it are blanked, control characters replaced."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as failure:  # noqa: BLE001  # its causes and notes are the user's objects
        text = f"{exception_type(error)} (no traceback: {type(failure).__name__})"
    text = re.sub(_CONTROL, "\N{REPLACEMENT CHARACTER}", re.sub(_DOTTED, _blank, text))
    return text if len(text) <= _MAX_RECORDED else f"[...]\n{text[-_MAX_RECORDED:]}"


def exception_type(error: BaseException) -> str:
    """Return the name of an exception's class and its module, control characters replaced."""
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    return re.sub(_CONTROL, "\N{REPLACEMENT CHARACTER}", name)[:500]


def _blank(match: re.Match[str]) -> str:
    before, start, rest = match.group().partition(_TOKEN_START)
    return f"{before}[token]" if start and rest.count(".") > 1 else match.group()
