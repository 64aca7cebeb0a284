"""The command line, in real processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import apsw
import pytest

from tests.acceptance.processes import ROOT
from tests.postgres.server import fresh_database, shared_server


def post(url, data):
    request = urllib.request.Request(
        f"{url}/_ah/queue/deferred", data=data, headers={"Content-Type": "application/jose"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers["Safedefer-Outcome"]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Safedefer-Outcome"]


def test_a_new_key_is_a_line_for_the_environment(project):
    line = project.run("keys", "new").stdout.decode().strip()
    name, _, value = line.partition("=")
    assert name == "SAFEDEFER_KEYS"
    assert re.fullmatch(r"k\d{8}-[0-9a-f]{4}:[A-Za-z0-9_-]{43}", value)
    project.environment["SAFEDEFER_KEYS"] = value
    project.defer("t.work, 1")
    assert project.run("keys", "new").stdout != project.run("keys", "new").stdout


def test_a_new_key_is_a_file_too(project):
    path = project.folder / "keys.json"
    path.write_bytes(project.run("keys", "new", "--jwk", "--kid", "mine").stdout)
    del project.environment["SAFEDEFER_KEYS"]
    path.chmod(0o600)
    project.environment["SAFEDEFER_KEYS_FILE"] = str(path)
    project.defer("t.work, 1")
    assert json.loads(path.read_text())["keys"][0]["kid"] == "mine"


@pytest.mark.parametrize("kid", ["a:b", "a,b", "a b", "", "k\u00e9y", "k\n", b"k\xff", "k" * 65], ids=ascii)
@pytest.mark.parametrize("form", [[], ["--jwk"]], ids=["line", "jwk"])
def test_a_key_whose_name_could_not_be_loaded_is_not_made(project, kid, form):
    done = project.run("keys", "new", "--kid", kid, *form, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"1 to 64 characters of A-Z a-z 0-9 _ -; choose such a name, or leave --kid out" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_longest_name_of_a_key_is_loaded(project):
    line = project.run("keys", "new", "--kid", "-" + "k" * 63).stdout.decode().strip()
    project.environment["SAFEDEFER_KEYS"] = line.removeprefix("SAFEDEFER_KEYS=")
    project.defer("t.work, 1")


@pytest.mark.parametrize(
    "command", [["tasks", "list"], ["tasks", "list", "--json"], ["queues", "list"], ["keys", "new"]]
)
def test_a_command_whose_reader_has_left_ends_without_a_word(project, command):
    project.defer("t.work, 1, _countdown=3600")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "safedefer", *command], cwd=project.folder, env=project.environment,
            stdout=output, stderr=subprocess.PIPE, timeout=120, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")


def test_serve_prints_its_url_and_stops_at_sigterm(project):
    server, url = project.start("serve", "--port", "0")
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", url)
    token = project.python(
        "import shop_tasks as t; from safedefer import serialize; print(serialize(t.work, 7).decode())"
    )
    assert post(url, token.encode()) == (200, "succeeded")
    assert post(url, token.encode()) == (200, "duplicate")
    assert post(url, token[:-1].encode()) == (403, "refused")
    assert project.results() == [7]
    status, out, err = project.terminate(server)
    assert (status, out) == (0, "")
    assert "Traceback" not in err
    assert token[-20:] not in err


def test_serve_and_dispatch_work_together_and_stop_with_what_runs_finished(project):
    server, url = project.start("serve", "--port", "0")
    dispatcher, _ = project.start("dispatch", "--to", url, wait_for_line=False)
    project.defer("t.held, 1")
    project.until((project.folder / "started-1").exists)
    project.defer("t.work, 2, _countdown=3600")
    assert project.terminate(dispatcher, holds=True)[0] == 0
    assert project.results() == [1]
    assert project.terminate(server)[0] == 0
    listed = [json.loads(line) for line in project.run("tasks", "list", "--json").stdout.splitlines()]
    assert [(one["state"], one["attempt_count"]) for one in listed] == [("waiting", 0)]


def test_dispatch_sends_nothing_that_somebody_wrote_into_the_storage(project):
    odd = project.defer("t.work, 1, _countdown=1")
    connection = apsw.Connection(str(project.folder / "tasks.db"))
    connection.execute("UPDATE safedefer_tasks SET url = '/admin', headers = json('{\"Cookie\": \"sid=1\"}')")
    connection.close()
    server, url = project.start("serve", "--port", "0")
    dispatcher, _ = project.start("dispatch", "--to", url, wait_for_line=False)
    project.defer("t.work, 2")
    project.until(lambda: project.results() == [2])
    project.until(lambda: json.loads(project.run("tasks", "show", odd).stdout)["reason"] == "storage-mismatch")
    status, _, err = project.terminate(dispatcher)
    assert status == 0
    assert f"task '{odd}' is parked: the url that is stored is not what was signed" in err
    assert project.terminate(server)[0] == 0
    project.run("tasks", "retry", odd)
    process, _ = project.start("run", "--port", "0")
    project.until(lambda: sorted(project.results()) == [1, 2])
    assert project.terminate(process)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_is_both_in_one_process(project, number):
    process, url = project.start("run", "--port", "0")
    assert url.startswith("http://127.0.0.1:")
    project.defer("t.work, 1")
    project.defer("t.work_async, 2")
    project.until(lambda: project.results() == [1, 2])
    project.defer("t.held, 3")
    project.until((project.folder / "started-3").exists)
    assert project.terminate(process, number=number, holds=True)[0] == 0
    assert project.results() == [1, 2, 3]
    assert project.run("tasks", "list").stdout.decode().strip() == "no tasks"


def test_a_task_that_outlasts_the_drain_is_tried_again(project):
    process, _ = project.start("run", "--port", "0", "--drain", "0.2")
    task = project.defer("t.held, 1")
    project.until((project.folder / "started-1").exists)
    status, _, err = project.terminate(process)
    assert status == 0
    assert "will be tried again" in err
    assert json.loads(project.run("tasks", "show", task).stdout)["state"] == "waiting"


def test_an_app_of_ones_own_is_named(project):
    (project.folder / "shop_app.py").write_text(
        "import os\nfrom safedefer import App, Keyring, Policy\n"
        "app = App(keyring=Keyring.from_text(os.environ['KEYS']), policy=Policy('shop_tasks'), queue='sqlite:///own.db')\n"
    )
    project.environment["KEYS"] = project.environment.pop("SAFEDEFER_KEYS")
    token = project.python("import shop_app, shop_tasks; print(shop_app.app.serialize(shop_tasks.work, 7).decode())")
    _, url = project.start("serve", "shop_app:app", "--port", "0")
    assert post(url, token.encode()) == (200, "succeeded")
    assert b"shop_tasks:work" in project.run("inspect", "--app", "shop_app:app", token).stdout


def test_tasks_are_listed_shown_cancelled_and_retried(project):
    waiting = project.defer("t.work, 1, _countdown=3600, _queue='mail', _name='receipt'")
    dead = project.defer("t.permanent")
    process, _ = project.start("run", "--port", "0")
    project.until(lambda: b"dead" in project.run("tasks", "list").stdout)
    project.terminate(process)
    lines = project.run("tasks", "list").stdout.decode().splitlines()
    assert len(lines) == 2
    assert any(waiting in line and "waiting" in line and "mail" in line for line in lines)
    assert any(dead in line and line.endswith("shop_tasks:permanent  permanent-task-failure") for line in lines)
    assert dead.encode() not in project.run("tasks", "list", "--queue", "mail").stdout
    shown = json.loads(project.run("tasks", "show", dead).stdout)
    assert (shown["state"], shown["reason"]) == ("dead", "permanent-task-failure")
    assert [record["outcome"] for record in shown["attempts"]] == ["failed"]
    assert "PermanentTaskFailure: never" in shown["attempts"][0]["traceback"]
    assert project.run("tasks", "cancel", waiting).stdout.decode().strip() == f"cancelled {waiting}"
    again = re.fullmatch(
        rf"{dead} runs again as ([0-9a-f]{{32}})", project.run("tasks", "retry", dead).stdout.decode().strip()
    )
    assert json.loads(project.run("tasks", "show", again[1]).stdout)["state"] == "waiting"
    assert project.run("tasks", "list", "--state", "cancelled").stdout.decode().split()[0] == waiting


def test_inspect_verifies_and_runs_nothing(project):
    token = project.python(
        "import shop_tasks as t; from safedefer import serialize; print(serialize(t.work, 7).decode())"
    )
    for done in (project.run("inspect", token), project.run("inspect", "-", data=token.encode() + b"\n")):
        document = json.loads(done.stdout)
        assert (document["calls"], document["args"], document["signed_by"]) == ("shop_tasks:work", [7], "k1")
        assert document["expired"] is False
    assert project.results() == []
    for call, why in (("7, 8", "takes other arguments now"), ("7, colour=8", "takes other arguments now")):
        wrong = project.python(
            f"import shop_tasks as t; t.work = None; exec('def work(*a, **k): ...', vars(t)); "
            f"from safedefer import serialize; print(serialize(t.work, {call}).decode())"
        )
        done = project.run("inspect", wrong, check=False)
        assert done.returncode == 1
        assert json.loads(done.stdout)["calls"] == "shop_tasks:work"
        assert re.fullmatch(rf"Error: unresolvable-callable: .*{why}.*\n", done.stderr.decode())
    refused = project.run("inspect", token[:-2], check=False)
    assert refused.returncode == 1
    assert re.fullmatch(r"Error: (bad-signature|malformed-token): .*\n", refused.stderr.decode())


def test_inspect_follows_a_pointer(project):
    token = project.python(
        "import shop_tasks as t; from safedefer import defer; print(defer(t.work, 'x' * 20000).payload.decode())"
    )
    document = json.loads(project.run("inspect", token).stdout)
    assert document["blob"]["found"] is True
    assert (document["calls"], document["args"]) == ("shop_tasks:work", ["x" * 20_000])


ERRORS = [
    (["serve"], {"SAFEDEFER_KEYS": ""}, "safedefer keys new"),
    (["serve"], {"SAFEDEFER_POLICY": ""}, "no policy"),
    (["serve"], {"SAFEDEFER_POLICY": "nowhere"}, "the module nowhere, which cannot be imported"),
    (["serve", "nowhere:app"], {}, "the module nowhere is not found"),
    (["serve", "shop_tasks"], {}, "is not module:name"),
    (["serve", "shop_tasks:work"], {}, "is not a safedefer.App"),
    (["serve", "--host", "192.0.2.1", "--port", "0"], {}, "start again"),
    (["dispatch", "--to", "127.0.0.1:80"], {}, "--to must begin with http"),
    (["dispatch", "--to", "http://"], {}, "--to has the host '', which is none; write a name or an IP address"),
    (["dispatch", "--to", "http://127.0.0.1:99999"], {}, "write one from 1 to 65535"),
    (["dispatch", "--to", "http://[::1"], {}, "write http://[::1]:8080"),
    (["dispatch", "--to", "http://1.2.3.4.5"], {}, "--to has the host '1.2.3.4.5', which is none"),
    (["serve"], {"SAFEDEFER_TARGETS": "mail=http://[::1"}, "the address of the target mail has a bracket"),
    (["serve"], {"SAFEDEFER_TARGETS": "mail=http://1.2.3.4.5"}, "the address of the target mail has the host"),
    (["tasks", "show", "nothing\x1b[31m"], {}, "there is no task nothing\ufffd[31m"),
    (["tasks", "cancel", "nothing"], {}, "no task nothing waits"),
    (["tasks", "retry", "nothing"], {}, "there is no dead letter nothing"),
    (
        ["tasks", "list"],
        {"SAFEDEFER_QUEUE": "sqlite:////nonexistent/x.db"},
        "the queue's file /nonexistent/x.db failed",
    ),
    (["inspect", b"\xff"], {}, "malformed-token"),
]


@pytest.mark.parametrize(("arguments", "environment", "text"), ERRORS, ids=lambda value: str(value)[:30])
def test_an_error_is_one_helpful_line(project, arguments, environment, text):
    done = project.run(*arguments, check=False, **environment)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1
    if lines[0].startswith("the queue's file") and "does not exist" in lines[0]:  # where it looked
        del lines[0]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert text in lines[0]


@pytest.mark.parametrize("command", [["serve"], ["dashboard"]])
def test_a_port_that_is_taken_is_one_line_that_names_it(project, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = project.run(*command, "--port", port, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert port in line
    assert "give another port: 0 takes a free one" in line


@pytest.mark.parametrize(
    "arguments",
    [["run", "--concurrency", "0"], ["run", "--lease", "0"], ["run", "--drain", "-1"], ["serve", "--port", "65536"]],
)
def test_a_number_out_of_range_is_a_usage_error(project, arguments):
    assert project.run(*arguments, check=False).returncode == 2


def test_help_names_every_command():
    done = subprocess.run(
        [sys.executable, "-m", "safedefer", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("demo", "dispatch", "inspect", "keys", "run", "serve", "tasks"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


OWN_APP = (
    "from safedefer import App, Keyring, Policy\nimport os\n"
    "app = App(keyring=Keyring.from_text(os.environ['SAFEDEFER_KEYS']), policy=Policy('shop_tasks'), environment='test',\n"
    "    queue='sqlite:///tasks.db', concurrency=24)\n"
)
MANY_AT_ONCE = {  # the command lines of the processes, and settings
    "run, the option": ([["run", "--port", "0", "--concurrency", "24"]], {}),
    "run, the setting": ([["run", "--port", "0"]], {"SAFEDEFER_CONCURRENCY": "24"}),
    "run, in code": ([["run", "shop_app:app", "--port", "0"]], {}),
    "serve and dispatch, the option": (
        [["serve", "--port", "0", "--concurrency", "24"], ["dispatch", "--concurrency", "24"]],
        {},
    ),
    "serve and dispatch, the setting": ([["serve", "--port", "0"], ["dispatch"]], {"SAFEDEFER_CONCURRENCY": "24"}),
    "the option before the setting": (
        [["run", "--port", "0", "--concurrency", "24"]],
        {"SAFEDEFER_CONCURRENCY": "4"},
    ),
}


#: The others have their option and their setting read by the same two lines of code.
AT_NIGHT = {"run, the option", "serve and dispatch, the setting"}


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=[pytest.mark.nightly] * (label in AT_NIGHT)) for label in MANY_AT_ONCE]
)
def test_concurrency_is_one_number_for_slots_and_deliveries(project, label):
    commands, settings = MANY_AT_ONCE[label]
    project.environment |= settings
    (project.folder / "shop_app.py").write_text(OWN_APP)
    project.python(
        "import shop_tasks as t; from safedefer import defer\nfor number in range(30): defer(t.held, number)"
    )
    _, url = project.start(*commands[0])
    if len(commands) > 1:
        project.start(*commands[1], "--to", url, wait_for_line=False)
    project.until(lambda: len(list(project.folder.glob("started-*"))) >= 24)
    assert project.results() == []  # all of them at once
    assert len(list(project.folder.glob("started-*"))) == 24


@pytest.mark.parametrize(
    "command", [["run", "--port", "0"], ["dispatch", "--to", "http://127.0.0.1:1"]], ids=lambda c: c[0]
)
def test_a_queue_that_is_not_declared_ends_a_process_before_it_says_that_it_is_ready(project, command):
    done = project.run(*command, "--queue", "mail", "--queue", "maill", check=False, SAFEDEFER_QUEUES="mail")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.splitlines()[-1].startswith(b"Error: there is no queue maill; declare it, or use ")


@pytest.mark.parametrize("command", ["run", "serve", "dispatch"])
def test_a_database_without_tables_ends_a_process_before_it_says_that_it_is_ready(project, command):
    server = shared_server()
    with fresh_database(server) as database:
        arguments = [command, "--to", "http://127.0.0.1:1"] if command == "dispatch" else [command, "--port", "0"]
        done = project.run(*arguments, check=False, SAFEDEFER_QUEUE=server.dsn(database))
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"run `safedefer migrate`") == 1
    assert b"trying again" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [["run", "--processes", "2"], ["run"], ["serve"], ["dispatch", "--to", "http://127.0.0.1:1"]],
    ids=" ".join,
)
def test_a_process_says_once_where_its_file_is(project, command):
    project.environment["SAFEDEFER_QUEUE"] = "sqlite:///own.db"
    port = [] if command[0] == "dispatch" else ["--port", "0"]
    process, _ = project.start(*command, *port, wait_for_line=bool(port))
    project.until((project.folder / "own.db").exists)
    if not port:
        project.until(lambda: "own.db" in process.stderr.readline())
        assert project.terminate(process)[0] == 0
        return
    status, _, err = project.terminate(process)
    assert status == 0
    several = " in each of 2 processes" if "2" in command else ""
    expected = (
        f"safedefer {command[0]}: the queue is in {os.path.realpath(project.folder)}/own.db; environment test; "
        f"policy shop_tasks; keys k1 (active); 16 tasks at once{several}"
    )
    assert err.splitlines() == [expected]
