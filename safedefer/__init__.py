"""safedefer: call a Python function later, without pickle and without a registry."""

__version__ = "0.1.0"
