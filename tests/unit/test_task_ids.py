"""Task ids: UUIDs of version 7 that no two tasks share, in no process."""

import os
import uuid

from safedefer.sending import ids
from safedefer.sending.ids import new_task_id


def test_an_id_is_a_uuid_of_version_7_of_its_time():
    for number in range(200):
        task_id = new_task_id(1_700_000_000.123 + number)
        read = uuid.UUID(task_id)
        assert task_id == read.hex
        assert (read.version, read.variant) == (7, uuid.RFC_4122)
        assert read.int >> 80 == int((1_700_000_000.123 + number) * 1000)


def test_ids_of_one_moment_differ_in_all_other_bits():
    ids = {uuid.UUID(new_task_id(1.0)).int for _ in range(2000)}
    assert len(ids) == 2000
    fixed = (0xF << 76) | (3 << 62) | (0xFFFF_FFFF_FFFF << 80)
    for bit in range(128):
        assert len({number >> bit & 1 for number in ids}) == (1 if fixed >> bit & 1 else 2)


def test_a_forked_process_draws_other_ids():
    while not ids._noise:  # what the child must not draw as well
        new_task_id(1.0)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, " ".join(new_task_id(1.0) for _ in range(100)).encode())
        os._exit(0)
    os.close(writer)
    mine = {new_task_id(1.0) for _ in range(100)}
    with os.fdopen(reader) as pipe:
        theirs = set(pipe.read().split())
    os.waitpid(pid, 0)
    assert len(theirs) == 100
    assert not mine & theirs
