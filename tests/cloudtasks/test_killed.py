"""kill -9 of the handler and of the emulator while tasks run: each in a process of its own, on files. Lost: none."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from safedefer import App
from safedefer.cli.text import plain
from safedefer.queues.base import DeadFilter
from safedefer.settings import Settings
from tests.cloudtasks.emulated import PARENT, new_client, wait_for
from tests.cloudtasks.killed_tasks import lines, note
from tests.ports import ReservedPort

ROOT = Path(__file__).resolve().parents[2]
QUEUE = f"{PARENT}/queues/default"
TASKS = 8


class Place:
    """The two processes, each of which can be killed and started again on what it left."""

    def __init__(self, path):
        self.path = path
        self.ports = {"emulator": ReservedPort(), "handler": ReservedPort()}
        self.emulator_url, self.handler_url = (port.url for port in self.ports.values())
        (path / "queue.yaml").write_text(
            "queue: [{name: default, rate: 500/s, bucket_size: 500, max_concurrent_requests: 4}]"
        )
        queue = (
            f"cloudtasks://p-1/europe-west1?endpoint={self.emulator_url}&address={self.handler_url}"
            "&service_account=tasks@p-1.iam.gserviceaccount.com"
        )
        settings = {
            "KEYS": "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8", "POLICY": "tests.cloudtasks.killed_tasks", "QUEUE": queue,
            "STORE": f"sqlite:///{path}/store.db", "ENVIRONMENT": "test", "LEASE_SECONDS": "2",
        }  # fmt: skip
        self.settings = {f"SAFEDEFER_{name}": value for name, value in settings.items()}
        self.environment = {**os.environ, **self.settings}
        self.processes = {}

    def start(self, who):
        port = str(self.ports[who].number)
        command = {
            "emulator": [
                "cloudtasks-emulator", "--port", port, "--data", "tasks.jsonl", "--queue-yaml", "queue.yaml", "--location", PARENT,
            ],
            "handler": ["serve", "--port", port],
        }[who]  # fmt: skip
        environment = {**self.environment, "PYTHONPATH": str(ROOT)}
        with (self.path / f"{who}.log").open("ab") as log:
            self.processes[who] = subprocess.Popen(
                [sys.executable, "-m", "safedefer", *command],
                cwd=self.path, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: self.answers(port), f"the {who}", 120.0)

    def answers(self, port):
        try:
            socket.create_connection(("127.0.0.1", int(port)), timeout=5).close()
        except OSError:
            return False
        return True

    def kill(self, who):
        process = self.processes.pop(who)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self):
        for who in list(self.processes):
            self.kill(who)
        for port in self.ports.values():
            port.close()


def test_kill_9_of_handler_and_emulator_in_the_middle_of_tasks_loses_none(tmp_path, monkeypatch):
    place = Place(tmp_path)
    for name, value in place.settings.items():
        monkeypatch.setenv(name, value)
    ran = tmp_path / "ran.txt"
    app = App.from_settings(Settings.load())
    try:
        place.start("emulator")
        place.start("handler")
        app.defer_many([(note, (str(ran), number), {}) for number in range(TASKS)], atomic=False)
        for who in ("handler", "emulator"):
            before = len(lines(ran))
            wait_for(lambda before=before: len(lines(ran)) > before, "another run", 120.0)
            place.kill(who)
            place.start(who)
        client = new_client(place.emulator_url)
        wait_for(lambda: not list(client.list_tasks(parent=QUEUE)), "the end of all tasks", 300.0)
        client.transport.close()
        ended = [line.removeprefix("end ") for line in lines(ran) if line.startswith("end ")]
        assert set(ended) == {str(number) for number in range(TASKS)}
        begun = sum(line.startswith("begin ") for line in lines(ran))
        assert begun >= TASKS
        assert [plain(letter.reason or "") for letter in app.queue.dead_letters(DeadFilter())] == []
    finally:
        place.close()
        app.close()
