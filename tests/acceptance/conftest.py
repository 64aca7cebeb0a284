import base64
import secrets

import pytest

from tests.acceptance.processes import Forker, Project


@pytest.fixture(scope="session")
def forker():
    forker = Forker()
    yield forker
    forker.close()


@pytest.fixture
def project(tmp_path, forker):
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    project = Project(tmp_path, {"SAFEDEFER_KEYS": f"k1:{secret}"}, forker)
    yield project
    project.kill_all()
