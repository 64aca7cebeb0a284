"""The pytest plugin, wherever it is: a wheel has it beside the package."""

from pathlib import Path

import safedefer

try:
    from safedefer import pytest_plugin as plugin
except ImportError:
    import safedefer_pytest as plugin

__all__ = ["FILE", "ROOT", "plugin"]

FILE = plugin.__file__
ROOT = Path(safedefer.__file__).parents[1]
