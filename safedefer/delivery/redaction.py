"""Redaction of exceptions for the record of an attempt: no tokens, no control characters."""

from __future__ import annotations

import re
import traceback
from typing import Final

_MAX_RECORDED: Final = 16_384
# Any text in the shape of a token is taken for one. The pattern matches whole words with dots, and _blank looks for the
# token inside: a pattern that began with the token would be tried at every position of a long word (quadratic time).
_DOTTED: Final = r"[A-Za-z0-9_.-]{12,}"
_TOKEN_START: Final = "eyJ"  # noqa: S105  # how a JSON object begins in base64
# Compiled when the first task fails: that takes 3 ms, 5 % of importing safedefer.
_CONTROL: Final = r"[^\t\n -~\u00a0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def redacted_traceback(error: BaseException) -> str:
    """Return frames, type and text of an exception; tokens in it are blanked, control characters replaced."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as failure:  # noqa: BLE001  # its causes and notes are objects of the user's, whose code may raise
        text = f"{exception_type(error)} (no traceback: {type(failure).__name__})"
    text = re.sub(_CONTROL, "\N{REPLACEMENT CHARACTER}", re.sub(_DOTTED, _blank, text))
    return text if len(text) <= _MAX_RECORDED else f"[...]\n{text[-_MAX_RECORDED:]}"


def exception_type(error: BaseException) -> str:
    """Return the name of an exception's class and its module, control characters replaced."""
    return re.sub(_CONTROL, "\N{REPLACEMENT CHARACTER}", f"{type(error).__module__}.{type(error).__qualname__}")[:500]


def _blank(match: re.Match[str]) -> str:
    before, start, rest = match.group().partition(_TOKEN_START)
    return f"{before}[token]" if start and rest.count(".") > 1 else match.group()
