import pytest

from safedefer.dashboard import lookup


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Let no search end by the clock on a busy machine; the test of that gives its own clock."""
    monkeypatch.setattr(lookup, "_SECONDS", 600.0)
