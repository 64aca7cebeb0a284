"""The bell beside a SQLite queue: what is heard, what is not, and what somebody gains who rings it or puts something in its place."""

import os
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import apsw
import pytest

from safedefer.errors import QueueUnavailable
from safedefer.queues.sqlite import SQLiteQueue, bell, watch
from tests.queues.contract import make_task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the bell rings on Linux")
FDS = Path("/proc/self/fd")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "q.db")


@pytest.fixture
def queue(path):
    queue = SQLiteQueue(path)
    assert queue.lease(owner="o", limit=1, seconds=60.0, now=time.time()) == []
    yield queue
    queue.close()


@pytest.fixture
def rare(monkeypatch):
    """Looks that nobody rings for come so rarely that the test would fail for its time."""
    monkeypatch.setattr(watch, "INTERVAL", 300.0)
    monkeypatch.setattr(watch, "RELAXED", 300.0)


class Waiting:
    """A thread that waits for a task."""

    def __init__(self, queue, timeout=120.0):
        self.looks = 0
        self.heard = None
        looking = queue._watch._look

        def look(*args, **kwargs):
            self.looks += 1
            return looking(*args, **kwargs)

        queue._watch._look = look
        self.thread = threading.Thread(target=lambda: setattr(self, "heard", queue.wait(timeout)))

    def __enter__(self):
        self.thread.start()
        until(lambda: self.looks)
        return self

    def __exit__(self, *exception):
        self.thread.join(60.0)
        assert not self.thread.is_alive()


def until(condition):
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_task_of_another_queue_object_is_heard(queue, path, rare):
    other = SQLiteQueue(path)
    with Waiting(queue) as waiting:
        other.enqueue_many([make_task()])
    assert waiting.heard is True
    other.close()


ENQUEUE = "import sys; from tests.queues.contract import make_task; from safedefer.queues.sqlite import SQLiteQueue; SQLiteQueue(sys.argv[1]).enqueue_many([make_task()])"


def test_a_task_of_another_process_is_heard(queue, path, rare):
    with Waiting(queue) as waiting:
        subprocess.run([sys.executable, "-c", ENQUEUE, path], cwd=ROOT, check=True, timeout=60)
    assert waiting.heard is True


def test_a_wait_of_this_process_is_ended_by_wake_and_by_its_own_task(queue, rare):
    with Waiting(queue) as waiting:
        queue.wake()
    assert waiting.heard is True
    with Waiting(queue) as waiting:
        queue.enqueue_many([make_task()])
    assert waiting.heard is True


def test_several_workers_all_have_it_by_their_looks_if_one_alone_hears_it(queue, path):
    others = [SQLiteQueue(path) for _ in range(3)]
    waiting = [Waiting(each) for each in others]
    for each in waiting:
        each.__enter__()
    queue.enqueue_many([make_task()])
    for each in waiting:
        each.__exit__()
        assert each.heard is True
    for each in others:
        each.close()


def test_the_pipe_is_its_owners_and_hidden_and_carries_nothing(queue, path, rare):
    with Waiting(queue):
        place = Path(bell.bell_path(path))
        assert place.name == ".q.db-wake"
        mode = place.stat().st_mode
        assert (stat.S_ISFIFO(mode), stat.S_IMODE(mode)) == (True, 0o600)
        queue.wake()
    assert sorted(each.name for each in Path(path).parent.glob("*.*") if not each.name.startswith(".")) == [
        "q.db", "q.db-shm", "q.db-wal",
    ]  # fmt: skip


def test_ringing_waits_for_nobody_and_leaves_nothing(path):
    bell.ring(bell.bell_path(path))
    assert not Path(bell.bell_path(path)).exists()
    os.mkfifo(bell.bell_path(path))
    before = len(list(FDS.iterdir()))
    for _ in range(100):
        bell.ring(bell.bell_path(path))
    assert len(list(FDS.iterdir())) == before
    ear = bell.listen(bell.bell_path(path), os.geteuid())
    assert ear.wait(0.0, others=True) is False
    full = os.open(bell.bell_path(path), os.O_WRONLY)
    os.write(full, bytes(65_536))
    os.close(full)
    bell.ring(bell.bell_path(path))  # there is no room for it
    assert ear.wait(0.0, others=True) is True
    assert ear.wait(0.0, others=True) is False
    ear.close()


def file(place):
    place.write_bytes(b"kept")


def link(place):
    target = place.with_name("target")
    os.mkfifo(target)
    place.symlink_to(target)


def listening(place):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(place))


@pytest.mark.parametrize("put", [file, link, Path.mkdir, listening], ids=lambda put: put.__name__)
def test_what_somebody_puts_in_its_place_is_not_written_to_and_tasks_are_found(queue, path, put):
    place = Path(bell.bell_path(path))
    put(place)
    other = SQLiteQueue(path)
    with Waiting(queue) as waiting:
        other.enqueue_many([make_task()])
    assert waiting.heard is True
    assert put is not file or place.read_bytes() == b"kept"
    other.close()


def test_without_pipes_a_wait_is_ended_by_this_process_and_by_looks(queue, path, monkeypatch):
    monkeypatch.setattr(bell.sys, "platform", "another")
    other = SQLiteQueue(path)
    for end in (queue.wake, lambda: other.enqueue_many([make_task()])):
        with Waiting(queue) as waiting:
            end()
        assert waiting.heard is True
    assert not Path(bell.bell_path(path)).exists()
    other.close()


def test_no_link_is_followed(path):
    place = Path(bell.bell_path(path))
    link(place)
    end = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    bell.ring(str(place))
    assert select.select([end], [], [], 0)[0] == []
    os.close(end)
    ear = bell.listen(str(place), os.geteuid())
    assert ear.is_deaf
    ear.close()


def test_a_path_longer_than_that_of_a_socket_is_no_trouble(tmp_path, rare):
    folder = tmp_path.joinpath(*["f" * 100] * 3)
    folder.mkdir(parents=True)
    queue, other = SQLiteQueue(folder / "q.db"), SQLiteQueue(folder / "q.db")
    assert queue.lease(owner="o", limit=1, seconds=60.0, now=time.time()) == []
    with Waiting(queue) as waiting:
        other.enqueue_many([make_task()])
    assert waiting.heard is True
    queue.close()
    other.close()


def test_a_task_that_nobody_rings_for_is_found_and_the_next_ones_sooner(queue, path, monkeypatch):
    monkeypatch.setattr(bell, "ring", lambda path: None)
    other = SQLiteQueue(path)
    with Waiting(queue) as waiting:
        until(lambda: waiting.looks > 1)  # the first one, after which a wait counts rings, is over
        other.enqueue_many([make_task()])
    assert waiting.heard is True
    assert queue._watch._often_until > time.monotonic() - 60
    other.close()


def test_whoever_rings_without_end_causes_few_looks(queue, path, rare):
    """Each ring is a reason to look; a process that had nothing else to do would have no time left."""
    over = threading.Event()

    def ring():
        while not over.is_set():
            bell.ring(bell.bell_path(path))

    ringing = threading.Thread(target=ring)
    with Waiting(queue) as waiting:
        ringing.start()
        try:
            until(lambda: waiting.looks >= watch._FALSE_ALARMS + 1)
            for _ in range(2_000):
                bell.ring(bell.bell_path(path))
            assert waiting.looks == watch._FALSE_ALARMS + 1
        finally:
            over.set()
            ringing.join()
            queue.wake()
    assert waiting.heard is True


def test_a_child_that_is_forked_while_a_thread_waits_hears_nothing_of_it(queue, path, rare):
    with Waiting(queue) as waiting:
        ears = len(queue._watch._ears)
        child = os.fork()
        if not child:
            held = [str(place.readlink()) for place in FDS.iterdir() if place.is_symlink()]
            os._exit(any("-wake" in place for place in held))
        assert ears == 1
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        SQLiteQueue(path).enqueue_many([make_task()])
    assert waiting.heard is True


LOCK = "import apsw, sys; apsw.Connection(sys.argv[1]).execute('BEGIN IMMEDIATE')"


@pytest.mark.parametrize(
    "use", [bell.ring, lambda place: bell.listen(place, os.geteuid()).close()], ids=["ring", "listen"]
)
def test_a_hard_link_to_the_files_own_locks_in_its_place_does_not_drop_them(queue, path, use):
    """A file that is opened and closed loses the locks that this process has by another descriptor (POSIX)."""
    os.link(f"{path}-shm", bell.bell_path(path))
    with queue._writer._handle.use() as connection:
        connection.execute("BEGIN IMMEDIATE")
        use(bell.bell_path(path))
        other = subprocess.run([sys.executable, "-c", LOCK, path], stderr=subprocess.PIPE, text=True, timeout=60)
        connection.execute("ROLLBACK")
    assert "BusyError" in other.stderr


def test_a_pipe_that_has_another_name_is_another_programs(path):
    place = Path(bell.bell_path(path))
    theirs = place.with_name("theirs")
    os.mkfifo(theirs)
    os.link(theirs, place)
    end = os.open(theirs, os.O_RDWR | os.O_NONBLOCK)
    os.write(end, b"theirs")
    bell.ring(str(place))
    ear = bell.listen(str(place), os.geteuid())
    assert ear.is_deaf
    ear.close()
    assert os.read(end, 100) == b"theirs"
    os.close(end)


def test_the_bell_belongs_to_the_owner_of_the_file_or_is_not_listened_to(path):
    """Else those could not ring it who may write the file, and whoever has it could keep them from being heard."""
    place = Path(bell.bell_path(path))
    ear = bell.listen(str(place), os.geteuid() + 1)
    assert ear.is_deaf
    ear.close()
    assert not place.exists()
    os.mkfifo(place)
    ear = bell.listen(str(place), os.geteuid() + 1)
    assert ear.is_deaf
    ear.close()


def test_everybody_who_listens_hears_each_ring(path):
    """Who hears it may be of other queues, or have no room: then the task would wait for the look of another."""
    place = bell.bell_path(path)
    ears = [bell.listen(place, os.geteuid()) for _ in range(3)]
    for _ in range(3):
        bell.ring(place)
        assert [ear.wait(60.0, others=True) for ear in ears] == [True] * 3
        assert [ear.wait(0.0, others=True) for ear in ears] == [False] * 3
    bell.ring(place)
    late = bell.listen(place, os.geteuid())
    late.wait(0.0, others=True)
    assert [ear.wait(0.0, others=True) for ear in ears] == [True] * 3
    for ear in (*ears, late):
        ear.close()


def test_a_child_never_has_what_a_wait_opens_or_closes_during_the_fork(queue, rare):
    """A child that lives long would keep them, and more of them with each generation."""
    over = threading.Event()

    def waits():
        """What a wait opens, and the event loops of other tests."""
        held = {place.name: str(place.readlink()) for place in FDS.iterdir() if place.is_symlink()}
        return {number for number, place in held.items() if "-wake" in place or "event" in place}

    def wait():
        while not over.is_set():
            queue.wait(0.0)

    before = waits()

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    kept = []
    for _ in range(40):
        child = os.fork()
        if not child:
            os._exit(min(len(waits() - before), 99))
        kept.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    over.set()
    for thread in threads:
        thread.join()
    assert kept == [0] * 40


def test_a_task_is_found_though_a_look_failed_and_the_file_was_opened_anew(queue, path, monkeypatch):
    """The numbers of changes that SQLite gives begin anew with each connection."""
    other = SQLiteQueue(path)
    other.enqueue_many([make_task()])
    assert queue.wait(60.0) is True

    def fail(connection):
        monkeypatch.undo()
        raise apsw.IOError

    monkeypatch.setattr(watch.operations, "newest_seq", fail)
    with other._reader.use() as connection:
        # A commit that is no task: the look goes beyond the number of changes.
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(QueueUnavailable):
        queue.wait(60.0)
    other.enqueue_many([make_task()])
    assert queue.wait(60.0) is True
    other.close()


def test_who_can_take_no_task_that_it_hears_of_rests_until_the_next_look(queue, path, monkeypatch):
    """Each ring would cost it a transaction, which others wait for; one that takes a task hears every ring again."""
    other = SQLiteQueue(path)

    def hear(queues):
        other.enqueue_many([make_task()])
        began = time.monotonic()
        assert queue.wait(250.0) is True
        took = time.monotonic() - began
        return took, len(queue.lease(owner="o", limit=100, seconds=60.0, now=time.time(), queues=queues))

    monkeypatch.setattr(watch, "INTERVAL", 300.0)
    for _ in range(watch._FALSE_ALARMS):
        assert hear(["another"])[1] == 0
    monkeypatch.setattr(watch, "INTERVAL", 0.2)
    took, leased = hear(["another"])
    assert took >= 0.2
    assert leased == 0
    assert hear(None)[1] == watch._FALSE_ALARMS + 2
    monkeypatch.setattr(watch, "INTERVAL", 300.0)
    assert hear(None)[1] == 1
    other.close()


def test_who_can_hear_the_bell_seldom_asks_sqlite_in_vain(queue, monkeypatch):
    """An idle worker does it all day: each time takes locks."""
    queue.enqueue_many([make_task()])
    queue.wait(0.0)
    asked, use = [], queue._watch._handle.use
    monkeypatch.setattr(queue._watch._handle, "use", lambda: asked.append(1) or use())
    queue._watch._alert_until = 0.0
    assert not queue.wait(1.2)
    assert len(asked) <= 4
