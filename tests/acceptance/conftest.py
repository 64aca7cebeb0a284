import base64
import secrets

import pytest

from tests.acceptance.processes import Project


@pytest.fixture
def project(tmp_path):
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    project = Project(tmp_path, {"SAFEDEFER_KEYS": f"k1:{secret}"})
    yield project
    project.kill_all()
