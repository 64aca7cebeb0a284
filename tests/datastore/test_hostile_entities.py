"""Whoever can write entities to Datastore, without a key: what they put into the outbox's kinds."""

import json
import time
import zlib

import pytest
from google.cloud import datastore_v1

from safedefer.transactions.outbox import Outbox
from safedefer.transactions.rows import to_text
from tests.datastore.store import key_bytes
from tests.queues.contract import make_task, oversize_task

KIND, PIECE = "SafedeferOutbox", "SafedeferOutboxPiece"


@pytest.fixture
def outbox(queue, server):
    outbox = Outbox(lambda: queue, environment="test", urls=["datastore://p"], clock=time.time)
    yield outbox
    outbox.close()


def write(server, path, **properties):
    """Write an entity by the service itself, as any client may."""
    place = datastore_v1.PartitionId(project_id="p")
    key = datastore_v1.Key(partition_id=place, path=path)
    entity = datastore_v1.Entity(key=key, properties=properties)
    server.store.entities[key_bytes(key)] = (1, entity)


def text(value, **more):
    return datastore_v1.Value(string_value=value, **more)


def blob(value, **more):
    return datastore_v1.Value(blob_value=value, exclude_from_indexes=True, **more)


def number(value):
    return datastore_v1.Value(integer_value=value, exclude_from_indexes=True)


def genuine(task):
    payload = to_text(task).encode()
    return {
        "environment": text("test"), "payload": blob(payload), "text_bytes": number(len(payload)), "pieces": number(1),
    }  # fmt: skip


def write_task(server, task, name=None, **changes):
    properties = {**genuine(task), **changes}
    write(server, [{"kind": KIND, "name": name or task.id}], **{k: v for k, v in properties.items() if v is not None})


def changed(task, **members):
    payload = json.dumps({**json.loads(to_text(task)), **members}).encode()
    return {"payload": blob(payload), "text_bytes": number(len(payload))}


def check_that_others_go(server, outbox, queue, odd):
    honest = [make_task(id=f"{place}{'f' * 31}") for place in "0z"]  # before and after all others
    for task in honest:
        write_task(server, task)
    before = len(server.store.entities)
    assert outbox.sweep() == 2
    assert {view.id for view in queue.tasks()} == {task.id for task in honest}
    assert before - len(server.store.entities) == 2
    assert {entity.key.path[0].name for entity in server.store.kind(KIND)} >= odd


@pytest.mark.parametrize("changes", [
    {"payload": None}, {"payload": text("{}")}, {"payload": blob(b"")}, {"payload": blob(b"\xff{")}, {"payload": blob(b"[" * 500_000)},
    {"text_bytes": None}, {"text_bytes": number(-1)}, {"text_bytes": number(2**63 - 1), "payload": blob(b"x")}, {"text_bytes": text("5")},
    {"pieces": None}, {"pieces": number(0)}, {"pieces": number(-1)}, {"pieces": number(11)}, {"pieces": number(2**62)}, {"pieces": number(10)},
    {"pieces": datastore_v1.Value(double_value=1.0)},
])  # fmt: skip
def test_an_entity_that_is_no_task_stays_and_stops_no_other(server, outbox, queue, caplog, changes):
    odd = make_task()
    write_task(server, odd, **changes)
    check_that_others_go(server, outbox, queue, {odd.id})
    outbox.sweep()
    assert len([record for record in caplog.records if odd.id in record.getMessage()]) == 1


@pytest.mark.parametrize("members", [
    {"name": "receipt-42"}, {"unique_key": "k" * 64}, {"id": "another"}, {"eta": 1e400}, {"audience": "test"}, {"blob": ["b\0", "x"]},
])  # fmt: skip
def test_a_text_that_is_no_transactional_task_stays(server, outbox, queue, members):
    odd = make_task()
    write_task(server, odd, **changed(odd, **members))
    check_that_others_go(server, outbox, queue, {odd.id})


def test_a_property_that_says_it_is_compressed_is_not_decompressed(server, outbox, queue):
    """ndb would: a property of 1 MiB can be a gigabyte then. Its sign is the meaning 22."""
    odd = make_task()
    payload = to_text(odd).encode()
    write_task(server, odd, payload=blob(zlib.compress(payload), meaning=22))
    check_that_others_go(server, outbox, queue, {odd.id})


def test_a_task_whose_pieces_are_missing_is_read_once(server, outbox, queue):
    odd = oversize_task()
    write_task(server, odd, pieces=number(10))
    outbox.sweep()
    looked = server.calls["Lookup"]
    assert looked <= 1 + 1 + 1  # the task, its first piece, and whether the task is still there
    outbox.sweep()
    assert server.calls["Lookup"] == looked


def test_keys_that_are_none_of_ours_stand_in_nobodys_way(server, outbox, queue, monkeypatch):
    """More of each kind than are read at once: numbers are before names, and children after their parent."""
    monkeypatch.setattr("safedefer.transactions.databases.datastore._KEYS", 5)
    task = make_task()
    for count in range(1, 12):
        write(server, [{"kind": KIND, "id": count}], **genuine(task))
        write(server, [{"kind": KIND, "name": "0" * 31}, {"kind": KIND, "id": count}], **genuine(task))
    write_task(server, task, name="x" * 65)
    write_task(server, task, name="ü" * 600)
    check_that_others_go(server, outbox, queue, set())


def test_a_task_of_another_environment_is_not_taken_for_what_a_property_says(server, outbox, queue):
    write_task(server, make_task(audience="prod:default:default:/"))
    assert outbox.sweep() == 0


def test_an_id_forges_no_line_of_the_log(server, outbox, queue, caplog):
    write_task(server, make_task(), name="x\r\nERROR forged\x1b[31m")
    outbox.sweep()
    (record,) = [record for record in caplog.records if "no task" in record.getMessage()]
    assert not {"\n", "\r", "\x1b"} & set(record.getMessage())


def test_a_forged_task_is_refused_by_the_handler(server, context):
    from tests import sample_tasks
    from tests.unit.apps import handle, make_app

    mine, theirs = (make_app(outboxes=["datastore://p"]) for _ in range(2))
    sent = theirs.defer(sample_tasks.add, 1)
    (stored,) = (lease.task for lease in theirs.queue.lease(owner="o", limit=1, seconds=60, now=time.time() + 1))
    write_task(server, stored)
    assert mine.outbox.sweep() == 1
    (lease,) = mine.queue.lease(owner="o", limit=1, seconds=60, now=time.time() + 1)
    answer = handle(mine, lease.task.token)
    assert (lease.task.id, answer.status) == (sent.id, 403)
    for app in (mine, theirs):
        app.close()


def test_two_relays_that_read_the_same_large_task_say_nothing_of_it(server, outbox, queue, monkeypatch, caplog):
    """One has moved it, while the other was about to read its second piece."""
    task = oversize_task()
    write_task(server, task, pieces=number(2))
    read = "safedefer.transactions.databases.datastore.EntityReader.payload"

    def gone(self, row):
        server.store.entities.clear()

    monkeypatch.setattr(read, gone)
    assert outbox.sweep() == 0
    assert caplog.text == ""
