"""What codecs and the execution ask of a policy, as a Protocol. ``policy`` answers, and ``policy_cache`` remembers answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from safedefer.refs import UNBOUND, CallableRef


class Gate(Protocol):
    """What is asked before a class or a callable is named or loaded. Whoever asks imports nothing itself."""

    @property
    def is_settled(self) -> bool:
        """Whether a name that was admitted stays so. Marks come with the modules that are imported."""
        ...

    def load(self) -> None:
        """Import and look up what is named exactly, when a handler starts. Raises ``ConfigurationError``."""
        ...

    def check(self, ref: CallableRef) -> CallableRef:
        """Admit a reference by its names. Raises ``PolicyViolation`` or ``CapabilityExceeded``."""
        ...

    def class_name(self, cls: type) -> str:
        """Name a class as ``module:qualname``, proved and admitted. Raises ``NotDeferrable``."""
        ...

    def load_class(self, name: str) -> type:
        """Find an admitted class. Raises a ``RejectedTask``: not admitted, or not that class."""
        ...

    def callable_ref(self, obj: object) -> CallableRef:
        """Name a callable, proved and admitted. Raises ``NotDeferrable``."""
        ...

    def load_callable(self, ref: CallableRef, bound: object = UNBOUND) -> Callable[..., object]:
        """Find an admitted callable. Raises a ``RejectedTask``: not admitted, or not that callable."""
        ...
