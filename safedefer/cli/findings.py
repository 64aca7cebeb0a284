"""What a check of ``safedefer doctor`` says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from safedefer.app import App


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check says."""

    name: str
    status: Literal["ok", "warn", "error"]
    text: str
    """What was found and, unless it is ok, what to do."""


Check: TypeAlias = Callable[[App], Iterable[Finding]]
