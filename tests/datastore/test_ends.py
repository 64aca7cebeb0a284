"""The end of a Datastore transaction: what a block leaves behind it, and tasks that come too late."""

import asyncio

import grpc
import pytest
from google.api_core import exceptions as api
from google.cloud import ndb

from safedefer.errors import BadTransactionStateError
from safedefer.transactions.datastore import Address
from tests.datastore.helpers import rows, until, waiting
from tests.datastore.store import IDLE, Refused
from tests.queues.contract import make_task, oversize_task


class Order(ndb.Model):
    total = ndb.IntegerProperty(default=0)


def large_task():
    task = oversize_task()
    return task._replace(blob=type(task.blob)(task.blob.id, b"x" * 1_500_000))


# --- What a block leaves in the context ---


def test_an_entity_of_a_block_that_raised_is_read_as_it_was_before(outbox, server):
    key = Order(id="a", total=1).put()
    with pytest.raises(ZeroDivisionError), outbox.transaction(ndb):
        order = key.get()
        order.total = 2
        order.put()
        Order(id="b").put()
        raise ZeroDivisionError
    assert (key.get().total, Order.get_by_id("b")) == (1, None)


@pytest.mark.parametrize("code", [grpc.StatusCode.ABORTED, grpc.StatusCode.INVALID_ARGUMENT])
def test_an_entity_of_a_block_whose_commit_failed_is_read_as_it_was_before(outbox, server, code):
    key = Order(id="a", total=1).put()

    def refuse(_):
        raise Refused(code, "no")

    with pytest.raises(api.GoogleAPICallError), outbox.transaction(ndb):
        order = key.get()
        order.total = 2
        order.put()
        server.before["Commit"] = refuse
    server.before.clear()
    assert key.get().total == 1


def test_an_entity_of_a_block_that_committed_is_in_the_cache(outbox, server):
    with outbox.transaction(ndb):
        key = Order(id="a", total=3).put()
    server.calls.clear()
    assert (key.get().total, server.calls["Lookup"]) == (3, 0)


def test_what_a_block_has_not_changed_stays_in_the_cache_as_it_was(outbox, server):
    mine = Order(id="mine", total=1).put()
    with outbox.transaction(ndb):
        Order(id="other").put()
        with ndb.get_context().new(transaction=None).use():
            Order(id="mine", total=2).put()
    assert mine.get().total == 2


def test_what_a_function_starts_after_the_commit_is_done_at_the_end_of_the_block(outbox, server):
    with outbox.transaction(ndb):
        with_outer = ndb.get_context().new(transaction=None)

        def after():
            with with_outer.use():
                Order(id="after").put_async()

        ndb.get_context().call_on_commit(after)
    assert len(server.store.kind("Order")) == 1


# --- Two blocks in one context ---


def test_two_blocks_in_one_context_commit_by_themselves(outbox, queue, server, client):
    sent = []

    async def place(name, entered, leaves):
        with outbox.transaction(ndb):
            Order(id=name).put()
            task = make_task()
            outbox.put(task)
            sent.append(task.id)
            entered.set()
            await leaves.wait()

    async def main():
        first, second, never = (asyncio.Event() for _ in range(3))
        never.set()
        # The first one ends while the second one is open, and the other way round.
        await asyncio.gather(place("a", first, second), place("b", second, first))
        await asyncio.gather(*(place(str(number), asyncio.Event(), never) for number in range(5)))

    asyncio.run(main())
    until(lambda: waiting(queue) == set(sent))
    until(lambda: rows(server) == 0)
    assert len(server.store.kind("Order")) == len(sent) == 7
    assert server.store.transactions == {}


def test_a_block_that_raises_beside_another_undoes_its_own_alone(outbox, queue, server):
    task = make_task()

    async def fails(entered, leaves):
        with outbox.transaction(ndb):
            Order(id="a").put()
            outbox.put(make_task())
            entered.set()
            await leaves.wait()
            raise ZeroDivisionError

    async def commits(entered, leaves):
        with outbox.transaction(ndb):
            Order(id="b").put()
            outbox.put(task)
            entered.set()
            await leaves.wait()

    async def main():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(fails(first, second), commits(second, first), return_exceptions=True)

    assert isinstance(asyncio.run(main())[0], ZeroDivisionError)
    until(lambda: waiting(queue) == {task.id})
    assert [entity.key.path[0].name for entity in server.store.kind("Order")] == ["b"]


# --- Tasks that come too late ---


def put_late(outbox, seen, make):
    try:
        outbox.put(make())
    except BadTransactionStateError as error:
        seen.append(str(error))
    else:
        seen.append("taken")


def after_commit(late):
    ndb.get_context().call_on_commit(late)


def after_the_end(late):
    ndb.get_context().call_on_transaction_complete(late)


def in_a_tasklet_of_a_function(late):
    @ndb.tasklet
    def run():
        yield ndb.sleep(0.001)
        late()

    ndb.get_context().call_on_commit(run)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("make", [make_task, large_task])
@pytest.mark.parametrize("way", [after_commit, after_the_end, in_a_tasklet_of_a_function])
def test_a_task_that_comes_after_the_commit_is_refused(outbox, queue, server, way, make, before):
    seen, first = [], make_task()

    @ndb.transactional()
    def place():
        way(lambda: put_late(outbox, seen, make))
        if before:
            outbox.put(first)

    place()
    ndb.get_context().flush()
    assert len(seen) == 1
    assert "has ended already" in seen[0]
    until(lambda: waiting(queue) == ({first.id} if before else set()))


def test_a_task_of_an_asyncio_task_that_outlives_the_transaction_is_refused(outbox, queue):
    seen = []

    @ndb.transactional()
    def place():
        async def late():
            put_late(outbox, seen, make_task)

        return [asyncio.create_task(late())]

    async def main():
        await place()[0]

    asyncio.run(main())
    assert len(seen) == 1
    assert "has ended already" in seen[0]


@pytest.mark.parametrize("make", [make_task, large_task])
def test_a_task_of_a_tasklet_that_nobody_waits_for_goes_with_the_commit(outbox, queue, server, make):
    """ndb runs what is left to run before it commits."""
    task = make()

    @ndb.tasklet
    def late():
        yield ndb.sleep(0.01)
        outbox.put(task)

    @ndb.transactional()
    def place():
        Order(id="a").put()
        late()

    place()
    until(lambda: waiting(queue) == {task.id})
    until(lambda: rows(server) == 0)


def test_a_task_after_a_rollback_is_refused(outbox, queue, server):
    seen = []

    @ndb.transactional()
    def place():
        outbox.put(make_task())
        ndb.get_context().call_on_transaction_complete(lambda: put_late(outbox, seen, make_task))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place()
    assert "has ended already" in seen[0]
    outbox.sweep()
    assert (queue.tasks(), rows(server)) == ([], 0)


def test_a_task_of_an_expired_transaction_is_not_sent(outbox, queue, server):
    with pytest.raises(api.InvalidArgument, match="expired"), outbox.transaction(ndb):
        outbox.put(make_task())
        server.store.now += IDLE + 1
    outbox.sweep()
    assert (queue.tasks(), rows(server)) == ([], 0)
    assert not ndb.in_transaction()


# --- Functions of the user's that raise ---


@pytest.mark.parametrize("register", ["call_on_commit", "call_on_transaction_complete"])
@pytest.mark.parametrize("make", [make_task, large_task])
def test_a_function_that_raises_after_the_commit_does_not_delay_the_task(
    outbox, queue, server, monkeypatch, register, make
):
    def fail():
        raise ZeroDivisionError

    outbox._outlet(Address("p"))._next_look = float("inf")
    told = []
    monkeypatch.setattr(outbox._relay, "expect", lambda *_: told.append(1))
    task = make()

    @ndb.transactional()
    def place():
        getattr(ndb.get_context(), register)(fail)
        outbox.put(task)

    with pytest.raises(ZeroDivisionError):
        place()
    assert told
    assert (outbox._relay.sweep(), waiting(queue), rows(server)) == (1, {task.id}, 0)


def test_a_block_whose_commit_succeeded_does_not_raise_what_a_function_has_started(outbox, queue, server, caplog):
    """Who is told of an error takes the transaction for undone, and may do all of it again."""

    def start():
        Order.get_by_id_async("none").add_done_callback(lambda _future: 1 / 0)

    task = make_task()
    with outbox.transaction(ndb):
        key = Order(id="a", total=1).put()
        outbox.put(task)
        ndb.get_context().call_on_commit(start)
    assert "what was started at the end of a transaction failed (ZeroDivisionError)" in caplog.text
    assert key.get().total == 1
    outbox._relay.sweep()
    assert waiting(queue) == {task.id}


def test_a_transaction_that_is_undone_brings_no_refused_task_back(outbox, queue, server):
    """Its end is a reason to look, and none to offer again what the queue has refused a moment ago."""
    outlet = outbox._outlet(Address("p"))
    outlet._pause("refused")
    with pytest.raises(ZeroDivisionError), outbox.transaction(ndb):
        outbox.put(make_task())
        raise ZeroDivisionError
    assert (outlet._next_look, list(outlet._paused)) == (0.0, ["refused"])


# --- Policies, and what is asked of Datastore that it cannot ---


def test_a_policy_that_keeps_entities_from_datastore_is_not_asked(outbox, queue, server, context):
    task = make_task()
    context.set_datastore_policy(lambda key: False)
    with outbox.transaction(ndb):
        outbox.put(task)
    until(lambda: waiting(queue) == {task.id})


def test_once_says_what_to_do_in_datastore(outbox):
    with pytest.raises(BadTransactionStateError, match="needs a SQL database.*entity"), outbox.once(ndb, effect="e"):
        pass


def test_an_awaited_block_says_what_to_write(outbox):
    async def main(block):
        async with block:
            pass

    for block in (outbox.transaction(ndb), outbox.once(ndb, effect="e")):
        with pytest.raises(BadTransactionStateError, match="write `with`|SQL database"):
            asyncio.run(main(block))
