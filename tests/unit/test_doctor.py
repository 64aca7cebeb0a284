"""``safedefer doctor``: every check passes, and fails, on a real App."""

import asyncio
import contextlib
import json
import secrets
import socket
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import web

from safedefer import Key, Keyring, KeyState, Policy
from safedefer.cli import doctor as doctors
from safedefer.cli import surroundings
from safedefer.cli.doctor import CHECKS, examine
from safedefer.cli.root import main
from safedefer.cli.surroundings import check_pgqueuer, check_target
from safedefer.queues.config import QueueFile
from tests.unit.apps import make_app

KEY = "a:" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789-_AbCdE"
healthy = None


def keyring(**options):
    return Keyring(Key("k1", secrets.token_bytes(32), KeyState.ACTIVE, **options))


def app_of(monkeypatch, **changes):
    values = {"keyring": keyring(), "policy": Policy("tests.sample_tasks", "builtins:len"), **changes}
    app = make_app(**values)
    if app.queue.file is not None and not Path(app.queue.file.path).exists():
        app.queue.stats(now=0.0)  # makes the file
    monkeypatch.setattr("tests.unit.test_doctor.healthy", app)
    return "tests.unit.test_doctor:healthy"


def find(spec, name):
    return [(finding.status, finding.text) for finding in examine(spec) if finding.name == name]


def one(spec, name):
    (found,) = find(spec, name)
    return found


def test_a_healthy_app_has_no_complaint(monkeypatch, tmp_path):
    spec = app_of(monkeypatch, queue=f"sqlite:///{tmp_path}/q.db", environment="prod")
    findings = [*examine(spec)]
    assert {finding.status for finding in findings} == {"ok"}
    assert {finding.name for finding in findings} == {
        "keys", "policy", "queue", "writes", "users", "clock", "environment", "sqlite", "deadlines", "pickle", "unverified_bytes",
    }  # fmt: skip
    assert len(CHECKS) == 14


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("environment", "status"), [("prod", 0), (None, 1)])
def test_the_command_prints_findings_and_its_status_says_whether_one_is_an_error(
    monkeypatch, capsys, as_json, environment, status
):
    spec = app_of(monkeypatch, environment=environment)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--app", spec, *(["--json"] if as_json else [])])
    assert (ended.value.code or 0) == status
    lines = capsys.readouterr().out.splitlines()
    if as_json:
        found = {(item["name"], item["status"]) for item in map(json.loads, lines)}
        assert ("environment", "error" if status else "ok") in found
    else:
        assert any(line.startswith("error  environment: no environment was given") for line in lines) is bool(status)


def test_without_settings_each_missing_one_is_said(monkeypatch):
    for name in ("SAFEDEFER_KEYS", "SAFEDEFER_KEYS_FILE", "SAFEDEFER_POLICY"):
        monkeypatch.delenv(name, raising=False)
    found = [*examine(None)]
    assert [(each.name, each.status) for each in found] == [
        (name, "error") for name in ("keys", "policy", "application")
    ]
    assert "safedefer keys new" in found[0].text
    assert "SAFEDEFER_POLICY" in found[1].text


def test_settings_alone_make_an_app(monkeypatch):
    for name, value in {
        "KEYS": KEY,
        "POLICY": "tests.sample_tasks",
        "QUEUE": "memory://",
        "ENVIRONMENT": "prod",
    }.items():
        monkeypatch.setenv(f"SAFEDEFER_{name}", value)
    monkeypatch.delenv("SAFEDEFER_KEYS_FILE", raising=False)
    assert {finding.status for finding in examine(None)} == {"ok"}


def test_an_app_that_is_not_there_is_said():
    assert one("tests.unit.test_doctor:nothing", "application")[0] == "error"


def test_a_key_file_that_others_may_change_is_said(monkeypatch, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text("{}")
    path.chmod(0o666)
    monkeypatch.delenv("SAFEDEFER_KEYS", raising=False)
    monkeypatch.setenv("SAFEDEFER_KEYS_FILE", str(path))
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    status, text = one(None, "keys")
    assert status == "error"
    assert "chmod 600" in text


def test_a_key_file_that_everybody_may_read_is_said(monkeypatch, tmp_path):
    path = tmp_path / "keys.json"
    path.touch(0o644)
    path.chmod(0o644)
    monkeypatch.setenv("SAFEDEFER_KEYS_FILE", str(path))
    assert [status for status, _ in find(app_of(monkeypatch), "keys")] == ["ok", "warn"]


@pytest.mark.parametrize("pattern", ["no_such_module_of_mine", "no_such_package.*"])
def test_a_pattern_that_names_nothing_is_said(monkeypatch, pattern):
    found = find(app_of(monkeypatch, policy=Policy("tests.sample_tasks", pattern)), "policy")
    assert [status for status, _ in found] == ["error"]
    assert pattern.removesuffix(".*") in found[0][1]


def test_an_exact_pattern_that_names_nothing_is_said(monkeypatch):
    monkeypatch.setenv("SAFEDEFER_KEYS", KEY)
    monkeypatch.delenv("SAFEDEFER_KEYS_FILE", raising=False)
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks:no_such_function")
    status, text = one(None, "policy")
    assert status == "error"
    assert "no_such_function names nothing" in text


def test_an_empty_policy_is_said(monkeypatch):
    assert one(app_of(monkeypatch, policy=Policy()), "policy")[0] == "warn"


@pytest.mark.parametrize("pattern", ["tests.*", "builtins:list.append", "tests.sample_tasks:add"])
def test_a_pattern_that_names_something_is_fine(monkeypatch, pattern):
    assert one(app_of(monkeypatch, policy=Policy(pattern)), "policy")[0] == "ok"


def test_a_queue_that_does_not_open_is_said(monkeypatch, tmp_path):
    path = tmp_path / "q.db"
    path.write_bytes(b"no database" * 1000)
    status, text = one(app_of(monkeypatch, queue=f"sqlite:///{path}"), "queue")
    assert status == "error"
    assert "not a SQLite database" in text


def test_a_queue_whose_schema_somebody_changed_is_said(monkeypatch, tmp_path):
    path = tmp_path / "q.db"
    one(app_of(monkeypatch, queue=f"sqlite:///{path}"), "queue")
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TRIGGER evil AFTER INSERT ON safedefer_ledger BEGIN DELETE FROM safedefer_ledger; END"
        )
    connection.close()
    assert "DROP TRIGGER" in one(app_of(monkeypatch, queue=f"sqlite:///{path}"), "queue")[1]


def test_a_queue_file_that_a_group_may_write_or_others_replace_is_said(monkeypatch, tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    spec = app_of(monkeypatch, queue=f"sqlite:///{folder}/q.db")
    assert one(spec, "queue")[0] == "ok"
    (folder / "q.db").chmod(0o660)
    folder.chmod(0o777)
    spec = app_of(monkeypatch, queue=f"sqlite:///{folder}/q.db")
    assert [status for status, _ in find(spec, "queue")] == ["ok", "warn", "warn"]


@pytest.mark.parametrize(("seconds", "status"), [(0, "ok"), (-9, "ok"), (3600, "error"), (-3600, "error")])
def test_the_clock_of_the_database_is_compared_with_ours(monkeypatch, seconds, status):
    spec = app_of(monkeypatch)
    monkeypatch.setattr(type(healthy.queue), "clock", lambda _: time.time() + seconds, raising=False)
    assert one(spec, "clock")[0] == status


def test_a_task_of_our_future_is_said(monkeypatch):
    spec = app_of(monkeypatch, clock=lambda: time.time() + 3600)
    healthy.defer(len, [])
    status, text = one(spec, "clock")
    assert (status, "NTP" in text) == ("warn", True)


@pytest.mark.parametrize(("version", "status"), [((3, 51, 2), "error"), ((3, 51, 3), "ok"), ((3, 7, 0), "error")])
def test_a_sqlite_that_loses_commits_is_said(monkeypatch, tmp_path, version, status):
    monkeypatch.setattr("safedefer.queues.sqlite.trust.sqlite_release", lambda: version)
    assert one(app_of(monkeypatch, queue=f"sqlite:///{tmp_path}/q.db"), "sqlite")[0] == status


def test_a_python_whose_sqlite_loses_commits_is_said_where_it_sweeps_an_outbox(monkeypatch, tmp_path):
    spec = app_of(monkeypatch, outboxes=[f"sqlite:///{tmp_path}/shop.db"])
    for version, status in (((3, 40, 1), "warn"), ((3, 52, 0), "ok")):
        monkeypatch.setattr(doctors, "sqlite3", SimpleNamespace(sqlite_version_info=version))
        assert [finding.status for finding in doctors.check_sqlite(healthy)] == [status]
    assert spec


OUTBOX_TROUBLE = {
    "a trigger": "CREATE TRIGGER t BEFORE INSERT ON safedefer_outbox BEGIN SELECT RAISE(IGNORE); END",
    "a view": "DROP TABLE safedefer_outbox; CREATE VIEW safedefer_outbox AS SELECT 1",
    "other columns": "DROP TABLE safedefer_outbox; CREATE TABLE safedefer_outbox (id)",
}


@pytest.mark.parametrize("label", [None, *OUTBOX_TROUBLE])
def test_an_outbox_that_cannot_be_used_is_said(monkeypatch, tmp_path, label):
    path = tmp_path / "shop.db"
    spec = app_of(monkeypatch, outboxes=[f"sqlite:///{path}"])
    assert one(spec, "outboxes")[0] == "ok"  # nobody has made it yet
    spec = app_of(monkeypatch, outboxes=[f"sqlite:///{path}"])
    connection = sqlite3.connect(path)
    with healthy.transaction(connection):
        healthy.options(transactional=True).defer(len, [])
    connection.executescript(OUTBOX_TROUBLE.get(label, ""))
    connection.close()
    assert one(spec, "outboxes")[0] == ("ok" if label is None else "error")


def test_an_outbox_that_is_not_reached_is_said_without_its_password(monkeypatch):
    spec = app_of(monkeypatch, outboxes=["postgresql://u:cAnArY@127.0.0.1:1/db"])
    status, text = one(spec, "outboxes")
    assert status == "error"
    assert "127.0.0.1" in text
    assert "cAnArY" not in text


@pytest.mark.parametrize(("text", "status"), [
    (None, "ok"), ("queue:\n- name: mail\n  rate: 5/s\n", "warn"), ("queue:\n- name: mail\n  rate: 5/s\n  attempt_deadline: 30\n", "ok"),
    ("queue:\n- name: mail\n  rate: 5/s\n  attempt_deadline: 0\n", "ok"),
])  # fmt: skip
def test_a_queue_without_a_deadline_of_its_own_is_named(monkeypatch, text, status):
    file = None if text is None else QueueFile.parse(text)
    found, said = one(app_of(monkeypatch, queue_yaml=file), "deadlines")
    assert found == status
    assert "600 s" in said
    assert ("mail" in said) == (status == "warn")


@pytest.mark.parametrize(
    ("pickle", "allowed", "status"),
    [(False, False, "ok"), (True, False, "warn"), (False, True, "warn"), (True, True, "warn")],
)
def test_pickles_are_said(monkeypatch, pickle, allowed, status):
    assert one(app_of(monkeypatch, keyring=keyring(pickle=pickle), allow_pickle=allowed), "pickle")[0] == status


@pytest.mark.parametrize(("size", "status"), [(32 * 2**20, "ok"), (4 * 2**20, "ok"), (2**21, "warn")])
def test_a_small_budget_of_unverified_bytes_is_said(monkeypatch, size, status):
    assert one(app_of(monkeypatch, unverified_bytes=size), "unverified_bytes")[0] == status


def test_what_a_check_raises_is_its_finding_and_the_others_go_on(monkeypatch):
    def check_broken(_):
        raise RuntimeError("out of order: postgresql://u:cAnArY@h/db")

    monkeypatch.setattr(doctors, "CHECKS", (check_broken, *CHECKS))
    monkeypatch.setenv("SAFEDEFER_QUEUE", "postgresql://u:cAnArY@h/db")
    findings = [*examine(app_of(monkeypatch))]
    assert (findings[0].name, findings[0].status) == ("broken", "error")
    assert "cAnArY" not in findings[0].text
    assert len(findings) > 5


# --- What is around an App --------------------------------------------------------------------------------------------


def test_a_queue_says_where_it_is_and_which_other_processes_have_it_open(monkeypatch, tmp_path):
    spec = app_of(monkeypatch, queue=f"sqlite:///{tmp_path}/q.db", environment="prod")
    assert one(spec, "users") == ("ok", f"the queue is {tmp_path}/q.db")
    spec = app_of(monkeypatch, queue=f"sqlite:///{tmp_path}/q.db", environment="prod")
    if not Path("/proc").is_dir():
        return
    with subprocess.Popen(["/bin/sh", "-c", f"exec 3<'{tmp_path}/q.db'; echo; read x"], stdin=-1, stdout=-1) as other:
        other.stdout.readline()  # it has opened it
        status, text = one(spec, "users")
        other.stdin.close()
    assert status == "ok"
    assert f"open in the processes {other.pid} (sh)" in text


def test_tasks_of_another_environment_in_the_queue_are_said(monkeypatch, tmp_path):
    ring = keyring()
    url = f"sqlite:///{tmp_path}/q.db"
    staging = make_app(keyring=ring, queue=url, environment="staging")
    staging.defer(len, [])
    staging.close()
    status, text = one(app_of(monkeypatch, keyring=ring, queue=url, environment="prod"), "users")
    assert status == "warn"
    assert "tasks of the environment staging are in it, which do not run in prod" in text


def test_the_version_of_pgqueuer_is_said_for_a_postgresql_queue(monkeypatch):
    app = SimpleNamespace(queue=SimpleNamespace(statements=object()))
    assert [each.status for each in check_pgqueuer(app)] == ["ok"]
    monkeypatch.setattr("safedefer.cli.surroundings.version", lambda _: "9.9")
    ((name, status, text),) = [(each.name, each.status, each.text) for each in check_pgqueuer(app)]
    assert (name, status) == ("pgqueuer", "warn")
    assert "pgqueuer 9.9 is newer" in text


@contextlib.asynccontextmanager
async def handler(app, **options):
    """Serve the handler of an App; give its address."""
    web_app = web.Application()
    web_app.add_routes([] if app is None else app.routes())
    runner = web.AppRunner(web_app, **{"auto_decompress": False, **options})
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://127.0.0.1:{}".format(runner.addresses[0][1])
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(("ours", "status", "said"), [
    (True, "ok", "answers as a handler: 403 refused"), (False, "error", "no handler of ours"),
])  # fmt: skip
async def test_a_handler_is_asked_whether_it_is_one_of_ours(ours, status, said):
    app = make_app()
    async with handler(app if ours else None) as address:
        (found,) = await asyncio.to_thread(lambda: [*check_target(app, address)])
    assert (found.name, found.status) == ("target", status)
    assert said in found.text
    await asyncio.to_thread(app.close)


@pytest.mark.parametrize(("inflates", "status"), [(True, "warn"), (False, "ok")])
async def test_a_server_that_inflates_what_the_handler_refuses_is_seen_from_outside(inflates, status):
    app = make_app()
    async with handler(app, auto_decompress=inflates) as address:
        (found,) = await asyncio.to_thread(lambda: [*check_target(app, address)])
    assert (found.name, found.status) == ("target", status)
    assert ("AppRunner(web_app, auto_decompress=False)" in found.text) is inflates
    await asyncio.to_thread(app.close)


@pytest.mark.parametrize(("address", "said"), [
    ("http://u:cAnArY@127.0.0.1:1", "http://127.0.0.1:1 does not answer (ConnectionRefusedError"), ("nonsense", "--to must begin with http"),
])  # fmt: skip
def test_a_handler_that_is_not_there_is_said(monkeypatch, address, said):
    (found,) = [each for each in examine(app_of(monkeypatch), [address]) if each.name == "target"]
    assert found.status == "error"
    assert said in found.text
    assert "cAnArY" not in found.text


def test_variables_that_an_app_made_in_code_does_not_read_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SAFEDEFER_KEYS", KEY)
    monkeypatch.setenv("SAFEDEFER_POLICY", "tests.sample_tasks")
    monkeypatch.setenv("SAFEDEFER_ENVIRONMENT", "prod")
    monkeypatch.setenv("SAFEDEFER_QUEUE", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setenv("SAFEDEFER_OUTBOXES", f"sqlite:///{tmp_path}/shop.db")
    in_code = {"environment": "staging", "queue": f"sqlite:///{tmp_path}/q.db"}
    status, text = one(app_of(monkeypatch, **in_code), "settings")
    assert status == "warn"
    assert text.startswith("SAFEDEFER_ENVIRONMENT, SAFEDEFER_OUTBOXES, SAFEDEFER_QUEUE: set, but")
    same = {
        "environment": "prod",
        "queue": f"sqlite:///{tmp_path}/other.db",
        "outboxes": [f"sqlite:///{tmp_path}/shop.db"],
    }
    assert find(app_of(monkeypatch, **same), "settings") == []
    assert find(None, "settings") == []


def test_an_app_made_in_code_is_told_of_its_argument_and_not_of_a_variable(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = find(app_of(monkeypatch, queue="sqlite:///q.db"), "queue")
    assert "set queue= of App(...) to sqlite:////" in dict(found)["warn"]


@contextlib.contextmanager
def server(answer):
    """Serve by a function of a connection; give the address."""
    over = threading.Event()

    def work():
        with contextlib.suppress(OSError):  # it is closed
            while True:
                connection = listening.accept()[0]
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection):
        with connection, contextlib.suppress(OSError):
            answer(connection, over)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=work, daemon=True).start()
        try:
            yield "http://127.0.0.1:{}".format(listening.getsockname()[1])
        finally:
            over.set()
            listening.shutdown(socket.SHUT_RDWR)


def only_interim_answers(connection, over):
    while not over.wait(0.01):  # later releases of Python take a hundred at most
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def a_byte_now_and_then(connection, over):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while not over.wait(0.01):
        connection.sendall(b"a")


@pytest.mark.parametrize("answer", [only_interim_answers, a_byte_now_and_then], ids=lambda answer: answer.__name__)
def test_a_server_that_never_ends_its_answer_is_not_waited_for(monkeypatch, answer):
    monkeypatch.setattr(surroundings, "_WHOLE", 0.2)
    app = make_app()
    with server(answer) as address:
        (found,) = check_target(app, address)
    assert found.status == "error"
    assert "does not answer (TimeoutError: no whole answer in" in found.text
    app.close()


def takes_no_encoding(connection, over):
    """Refuse a body that is encoded, and close, as some firewalls do."""
    reader = connection.makefile("rb")
    while line := reader.readline():
        headers = [line]
        while headers[-1].strip():
            headers.append(reader.readline())
        text = b"".join(headers).lower()
        reader.read(int(text.partition(b"content-length:")[2].split()[0]))
        if b"/safedefer-doctor-" not in line:
            connection.sendall(b"HTTP/1.1 403 No\r\nSafedefer-Outcome: refused\r\nContent-Length: 0\r\n\r\n")
        elif b"gzip" in text:
            connection.sendall(b"HTTP/1.1 415 No\r\nContent-Length: 0\r\n\r\n")
            return
        else:
            connection.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")


def test_a_server_that_takes_no_encoded_body_is_not_said_to_inflate_it():
    app = make_app()
    with server(takes_no_encoding) as address:
        (found,) = check_target(app, address)
    assert (found.status, found.text.endswith("403 refused to what is no token")) == ("ok", True)
    app.close()
