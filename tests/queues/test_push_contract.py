"""The push engine of the tests does what every push engine does, and so does that of the guide."""

import time

import pytest

from tests.queues.push_contract import PushContract
from tests.queues.pushing import PushEngineInMemory
from tests.snippets import fences

GUIDE = next(text for page, _, text in fences("python") if page.endswith("write-an-engine.md"))


class TestInMemory(PushContract):
    @pytest.fixture
    def engine(self):
        return PushEngineInMemory()

    @pytest.fixture
    def deliveries(self, engine):
        def deliver(number):
            assert len(engine.tasks) == number
            return [(engine.headers(task, now=time.time()), task.token) for task in engine.tasks.values()]

        return deliver

    @pytest.fixture
    def stop(self, engine):
        def stop():
            engine.down = True

        return stop


class TestOfTheGuide(PushContract):
    KNOWS_ITS_TASKS = False

    @pytest.fixture
    def folder(self, tmp_path):
        return tmp_path / "outgoing"

    @pytest.fixture
    def engine(self, folder):
        names = {}
        exec(GUIDE, names)
        return names["FolderEngine"](str(folder), "a secret")

    @pytest.fixture
    def deliveries(self, folder):
        def deliver(number):
            files = list(folder.iterdir())
            assert len(files) == number
            return [({"X-Folder-Engine": "a secret", "X-Folder-Task": file.name}, file.read_bytes()) for file in files]

        return deliver

    @pytest.fixture
    def stop(self, folder):
        return folder.rmdir
