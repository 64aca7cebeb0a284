import pytest

from tests.adversarial import victim


@pytest.fixture(autouse=True)
def ran():
    """What the victim's tasks did in this test."""
    victim.RAN.clear()
    yield victim.RAN
    victim.RAN.clear()
