"""The Datastore server in memory, as google-cloud-ndb sees it."""

import threading

import pytest
from google.api_core import exceptions as api
from google.cloud import ndb

from tests.datastore.store import EXPIRES, IDLE


class Account(ndb.Model):
    owner = ndb.StringProperty()
    balance = ndb.IntegerProperty()
    note = ndb.TextProperty()
    photo = ndb.BlobProperty()


def test_what_is_put_is_found_by_key_and_by_query_until_it_is_deleted(server, context):
    first = Account(owner="ann", balance=1).put()
    second = Account(owner="ann", balance=2, id="two", parent=first).put()
    Account(owner="bob", balance=3, namespace="other").put()
    assert isinstance(first.id(), int)
    assert [each.balance for each in ndb.get_multi([first, second])] == [1, 2]
    assert [each.balance for each in Account.query(Account.owner == "ann").order(-Account.balance)] == [2, 1]
    assert Account.query(Account.owner == "ann", Account.balance > 1).count() == 1
    assert Account.query(ancestor=first).fetch(keys_only=True) == [first, second]
    assert [each.owner for each in Account.query(namespace="other")] == ["bob"]
    server.batch = 1
    assert len(Account.query().fetch()) == 2
    page, cursor, more = Account.query().fetch_page(1)
    assert (page[0].key, more) == (first, True)
    assert Account.query().fetch_page(1, start_cursor=cursor)[0][0].key == second
    first.delete()
    assert first.get(use_cache=False) is None


def test_a_transaction_sees_what_was_when_it_began_and_commits_all_or_nothing(server, context):
    key = Account(balance=1, id="a").put()

    def change():
        account = key.get()
        account.balance = 2
        account.put()
        Account(id="b").put()
        assert len(server.store.entities) == 1
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ndb.transaction(change)
    assert key.get(use_cache=False).balance == 1
    assert len(server.store.entities) == 1
    assert server.store.transactions == {}


@pytest.mark.parametrize("read", [lambda key: key.get(), lambda key: Account.query(ancestor=key).fetch()])
def test_one_of_two_that_read_and_write_the_same_is_aborted_and_run_again(server, context, read):
    key = Account(balance=0, id="a").put()
    runs = []

    def add():
        read(key)
        account = key.get()
        if not runs:
            # In another thread: it has a context of its own.
            other = threading.Thread(target=_set, args=(server.client, 10))
            other.start()
            other.join()
        runs.append(account.balance)
        account.balance += 1
        account.put()

    ndb.transaction(add)
    assert runs == [0, 10]
    assert key.get(use_cache=False).balance == 11


def _set(client, balance):
    with client.context():
        Account(balance=balance, id="a").put()


def test_one_that_lasts_too_long_or_is_idle_has_expired(server, context):
    def lasts(seconds):
        def wait():
            server.store.now += seconds
            Account().put()

        return wait

    ndb.transaction(lasts(IDLE - 1), retries=0)
    for seconds in (IDLE + 1, EXPIRES + 1):
        with pytest.raises(api.InvalidArgument, match="expired"):
            ndb.transaction(lasts(seconds), retries=0)


@pytest.mark.parametrize("entity", [
    lambda: Account(photo=b"x" * 1_048_488), lambda: Account(note="x" * 1_048_500), lambda: Account(id="x" * 7000),
])  # fmt: skip
def test_limits_of_the_service_are_its_own(server, context, entity):
    with pytest.raises(api.InvalidArgument):
        ndb.transaction(lambda: entity().put(), retries=0)


def test_a_commit_may_have_10_mib(server, context):
    def put(count):
        for number in range(count):
            Account(id=str(number), photo=b"x" * 1_000_000).put()

    ndb.transaction(lambda: put(10), retries=0)
    with pytest.raises(api.InvalidArgument, match="limit"):
        ndb.transaction(lambda: put(11), retries=0)


def test_a_read_only_transaction_writes_nothing(server, context):
    with pytest.raises(api.InvalidArgument, match="read-only"):
        ndb.transaction(lambda: Account().put(), retries=0, read_only=True)
