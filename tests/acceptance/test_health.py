"""``--health``, systemd and the log of real processes."""

import json
import os
import queue
import re
import signal
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.acceptance.test_supervisor import workers


def get(url):
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def value(url, name, **labels):
    """Return a sample of an exposition, None if it has none."""
    _, text = get(f"{url}/metrics")
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if (sample.name, sample.labels) == (name, labels):
                return sample.value
    return None


def health_url(process):
    """Return the address that a process says on standard error."""
    for line in process.stderr:
        match = re.search(r"health: (http://127\.0\.0\.1:[0-9]+)/healthz", line)
        if match is not None:
            return match[1]
    raise AssertionError("the process ended")


@pytest.fixture
def systemd(project, tmp_path):
    """Return what reads the first line of the next message, from a socket that is read all the time, as systemd's is."""
    said = queue.SimpleQueue()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as closer,
    ):
        server.bind(str(tmp_path / "notify"))

        def read():
            while message := server.recv(4096):
                said.put(message.decode().split("\n")[0])

        reader = threading.Thread(target=read)
        reader.start()
        project.environment |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000"}
        try:
            yield lambda: said.get(timeout=120)
        finally:
            closer.sendto(b"", str(tmp_path / "notify"))
            reader.join()


def test_a_supervisor_serves_the_health_of_all_workers_and_tells_systemd(project, systemd):
    process, _ = project.start("run", "--port", "0", "--processes", "2", "--health", "0", "--drain", "60")
    url = health_url(process)
    assert get(f"{url}/healthz") == (200, "alive\n")
    project.until(lambda: get(f"{url}/readyz") == (200, "ready\n2 of 2 worker processes take tasks\n"))
    project.python("import shop_tasks as t; from safedefer import defer; [defer(t.work, n) for n in range(20)]")
    project.until(lambda: value(url, "safedefer_attempts_total", queue="default", outcome="succeeded", reason="") == 20)
    project.until(lambda: value(url, "safedefer_queue_tasks", queue="default", state="waiting") in {0, None})
    assert value(url, "safedefer_attempt_seconds_count", callable="shop_tasks:work") == 20
    assert value(url, "safedefer_outbox_rows") == 0
    first, second = workers(process)
    os.kill(first, signal.SIGKILL)
    project.until(lambda: second in (now := workers(process)) and first not in now and len(now) == 2)
    project.until(lambda: value(url, "safedefer_worker_processes", state="ready") == 2)
    assert value(url, "safedefer_attempts_total", queue="default", outcome="succeeded", reason="") == 20
    project.python("import shop_tasks as t; from safedefer import defer; defer(t.held, 1)")
    project.until((project.folder / "started-1").exists)
    process.send_signal(signal.SIGTERM)
    said = [systemd()]
    while said[-1] != "STOPPING=1":
        said.append(systemd())
    assert "READY=1" in said
    assert set(said) == {"READY=1", "STOPPING=1", "WATCHDOG=1"}
    assert get(f"{url}/readyz") == (503, "not ready: it is stopping, and takes no more tasks\n")
    (project.folder / "let-go").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert re.search(r"waiting for 1 task in worker process \d+, 60 s at most", err)


def test_a_dispatcher_shows_that_its_target_is_down_and_logs_lines_of_json(project):
    project.python("import shop_tasks as t; from safedefer import defer; defer(t.work, 1)")
    process, _ = project.start(
        "--log-format", "json", "dispatch", "--to", "http://127.0.0.1:1", "--health", "0", wait_for_line=False
    )
    url = health_url(process)
    project.until(lambda: value(url, "safedefer_target_down", target="http://127.0.0.1:1") == 1)
    assert get(f"{url}/readyz") == (200, "ready\n")
    status, _, err = project.terminate(process)
    assert status == 0
    lines = [json.loads(line) for line in err.splitlines()]
    assert any(line["message"].startswith("safedefer dispatch: the queue is in ") for line in lines)
    (down,) = [line for line in lines if line.get("event") == "TargetDown"]
    assert (down["level"], down["address"]) == ("WARNING", "http://127.0.0.1:1")
