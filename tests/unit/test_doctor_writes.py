"""``safedefer doctor`` on a store that can be read and not written."""

import json
import os
import secrets
import subprocess
import sys

import psycopg
import pytest

from safedefer.queues.postgres.migrations import migrate
from tests.postgres.server import fresh_database, shared_server
from tests.unit.apps import make_app

KEY = "a:" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbCdE"
#: What the disk of a file may still take is nothing, as where it is full: the write-ahead log is longer already.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (32_768, resource.RLIM_INFINITY)); "
DOCTOR = "from safedefer.cli.root import main; main(['doctor', '--json'])"


def doctor(queue, before=""):
    """Return the exit status, and what each check found."""
    settings = {"KEYS": KEY, "POLICY": "tests.sample_tasks", "QUEUE": queue, "ENVIRONMENT": "prod"}
    environment = os.environ | {f"SAFEDEFER_{name}": value for name, value in settings.items()}
    done = subprocess.run(
        [sys.executable, "-c", before + DOCTOR],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return done.returncode, {each["name"]: (each["status"], each["text"]) for each in found}


@pytest.mark.parametrize(("before", "status"), [("", "ok"), (FULL, "error")], ids=["with room", "full"])
def test_a_file_that_takes_no_more_is_said(tmp_path, before, status):
    app = make_app(queue=f"sqlite:///{tmp_path}/q.db")
    app.queue.stats(now=0.0)  # makes the file, and keeps it open
    code, found = doctor(f"sqlite:///{tmp_path}/q.db", before)
    assert found["queue"][0] == "ok", "it can be read"
    assert (found["writes"][0], code) == (status, int(status == "error")), found["writes"]
    assert app.queue.notices(since=0.0) == []
    app.close()


def test_a_role_that_may_only_read_is_said():
    server, role = shared_server(), f"safedefer_reader_{secrets.token_hex(4)}"
    with fresh_database(server) as name:
        dsn = server.dsn(name)
        migrate(dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {role} LOGIN")
            connection.execute(f"GRANT USAGE ON SCHEMA safedefer TO {role}")
            connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA safedefer TO {role}")
        try:
            code, found = doctor(dsn.replace("//postgres@", f"//{role}@"))
            assert found["queue"][0] == "ok", "it can be read"
            assert (code, found["writes"][0]) == (1, "error")
            assert "permission denied for table notices" in found["writes"][1]
            assert "give this role its rights" in found["writes"][1]
        finally:
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(f"DROP OWNED BY {role}")
                connection.execute(f"DROP ROLE {role}")
