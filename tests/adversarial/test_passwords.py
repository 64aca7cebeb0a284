"""The password in a database's URL is in no error, no cause of one, no ``repr`` and no log, whatever is wrong with the URL."""

import logging
import sys
import traceback

import pytest

from safedefer.errors import ConfigurationError, Error
from safedefer.queues import migrate_queue, open_queue
from safedefer.queues.addresses import check_url, place, redacted
from safedefer.queues.postgres import producers
from safedefer.settings import Settings
from safedefer.transactions.databases import opener_of
from safedefer.transactions.outbox import Outbox
from tests.unit.apps import make_app

CANARY = "cAnArY-77"
#: Nobody listens on port 1.
URLS = [
    f"postgresql://u:{CANARY}@127.0.0.1:1/db",
    f"postgres://u:{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:a/{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:a?{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:a#{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:@{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:[{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:a:{CANARY}@127.0.0.1:1/db",
    f"postgresql://u:{CANARY}@[::1/db",
    f"postgresql://u:{CANARY}@127.0.0.1:port/db",
    f"postgresql://u:{CANARY}\u2100@127.0.0.1:1/db",
    f"postgresql://u:{CANARY}\n@127.0.0.1:1/db",
    f"postgresql://u:{CANARY}%zz@127.0.0.1:1/db",
    f"postgresql://u:{CANARY}%00@127.0.0.1:1/db",
    f"postgresql://127.0.0.1:1/db?user=u&password={CANARY}",
    f"postgresql://127.0.0.1:1/db?user=u&pasword={CANARY}",
    f"postgresql://127.0.0.1:1/db?{CANARY}",
    f"postgresq://u:{CANARY}@h/db",
    f"u:{CANARY}@h/db",
    f"host=127.0.0.1 port=1 password={CANARY}",
    f"mysql+none://u:{CANARY}@h/db",
    f"postgresql+psycopg://u:{CANARY}@127.0.0.1:1/db",
    f"postgresql+psycopg://u:a/{CANARY}@127.0.0.1:one/db",
    f"postgresql+psycopg://u:{CANARY}",
    f"mysql+pymysql://u:{CANARY}/db",
    f"postgresql+psycopg://u:{CANARY} x@127.0.0.1:1/db",
    f"sqlite://u:{CANARY}@h/x",
    f"memory://u:{CANARY}@h",
    f"//u:{CANARY}\u2100@h/x",
]


def outbox(url):
    """Sweep an outbox that cannot be reached: what is logged names the database."""
    Outbox(lambda: None, environment="test", urls=[url], clock=lambda: 0.0).sweep()


WAYS = {
    "stats": lambda url: open_queue(url).stats(now=0),
    "enqueue": lambda url: open_queue(url).enqueue_many([]),
    "repr": lambda url: logging.getLogger("safedefer").warning("%r", open_queue(url)),
    "migrate": migrate_queue,
    "identity": lambda url: logging.getLogger("safedefer").warning("%r", opener_of(url)[0]),
    "outbox": outbox,
    "app": lambda url: make_app(queue=url).queue.stats(now=0),
    "outbox of an app": lambda url: make_app(outboxes=[url]).outbox.sweep(),
}


@pytest.mark.parametrize("drivers", ["all", "no psycopg", "asyncpg alone", "none"])
@pytest.mark.parametrize("way", WAYS)
def test_the_password_is_in_no_error_and_no_log(way, drivers, monkeypatch, caplog):
    monkeypatch.setattr(producers, "PATIENCE", 0.1)
    missing = {
        "no psycopg": ["psycopg"],
        "asyncpg alone": ["psycopg", "sqlalchemy"],
        "none": ["psycopg", "sqlalchemy", "asyncpg"],
    }
    for package in missing.get(drivers, ()):
        monkeypatch.setitem(sys.modules, package, None)
    failed = 0
    for url in URLS:
        try:
            with caplog.at_level(logging.DEBUG):
                WAYS[way](url)
        except Exception as error:  # noqa: BLE001
            failed += 1
            assert isinstance(error, Error), (url, error)
            text = "".join(traceback.format_exception(error))
            lines = [line for line in text.splitlines() if CANARY in line]
            assert lines == [], url
            assert CANARY not in repr(vars(error))
    assert failed > 5
    assert CANARY not in caplog.text
    assert not any(CANARY in repr(vars(record)) for record in caplog.records)


@pytest.mark.parametrize(("url", "shown"), [
    ("postgresql://u:secret@db.example:5432/shop?sslmode=require", "postgresql://db.example:5432/shop"),
    ("postgresql://u@db/shop", "postgresql://db/shop"),
    ("postgresql:///shop?host=/run", "postgresql:///shop"),
    ("sqlite:////var/lib/tasks@home.db", "sqlite:////var/lib/tasks@home.db"),
    ("memory://", "memory://"),
    ("postgresql://u:a@b@db/shop", "postgresql://..."),
    ("postgresql://u:a/b@db/shop", "postgresql://..."),
    ("postgresql://u:secret", "postgresql://..."), ("postgresql://u:12345678", "postgresql://..."),
    ("postgresql://db:54321", "postgresql://db:54321"),
    ("secret", "..."), ("a b://u:secret@x", "..."), ("", "..."),
])  # fmt: skip
def test_an_address_is_shown_without_user_password_and_parameters(url, shown):
    assert place(url) == shown


@pytest.mark.parametrize("url", [
    "postgresql://u:a%40b@db/shop", "postgresql:///shop?host=/run", "postgresql://u@h1:1,h2:2/shop", "postgresql://u:p@[::1]:5432/shop",
    "postgresql://db/shop?options=-c%20x%3Dy", "postgresql+psycopg://u:p@db/shop",
])  # fmt: skip
def test_a_url_that_everybody_reads_alike_is_taken(url):
    assert check_url(url) == url


def test_the_refusal_of_an_ambiguous_url_says_how_to_write_it():
    with pytest.raises(ConfigurationError, match="write @ as %40"):
        check_url("postgresql://u:a@b@db/shop")


def test_pieces_of_a_password_are_blanked_too():
    url = "postgresql://u:abc%2Fdefgh@db/shop?password=other-one"
    text = redacted('no port "defgh", no "abc/defgh", "abc%2Fdefgh", other-one; database shop', url)
    assert text == 'no port "...", no "...", "...", ...; database shop'
    assert redacted("nothing of it", "postgresql://u@db/nothing") == "nothing of it"


@pytest.mark.parametrize("password", [
    f"{CANARY},x", f"x,{CANARY}", f"x {CANARY}", f"12345678,{CANARY}", f"{CANARY},12345678", f"x,//{CANARY}:1", f"x,host={CANARY}",
])  # fmt: skip
@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgresql+asyncpg", "mysql+pymysql"])
def test_a_comma_or_a_space_in_a_password_does_not_cut_it_into_addresses(scheme, password, monkeypatch, caplog):
    url = f"{scheme}://u:{password}@127.0.0.1:1/db"
    monkeypatch.setenv("SAFEDEFER_OUTBOXES", f"sqlite:///a.db, {url},postgresql://u@h/d")
    assert Settings.load().outboxes == ["sqlite:///a.db", url, "postgresql://u@h/d"]
    with pytest.raises(Error) as caught:
        outbox_or_error(url)
    assert CANARY not in str(caught.value) + caplog.text
    assert "12345678" not in str(caught.value) + caplog.text


def outbox_or_error(url):
    """Sweep; a URL that is understood only fails when it is used."""
    outbox(url)
    raise ConfigurationError("it was understood")


def test_a_list_of_hosts_is_one_url(monkeypatch):
    monkeypatch.setenv("SAFEDEFER_OUTBOXES", "postgresql://u@h1:1,h2:2/d  sqlite:///a.db,")
    assert Settings.load().outboxes == ["postgresql://u@h1:1,h2:2/d", "sqlite:///a.db"]


def test_the_settings_show_no_address(monkeypatch):
    for name in ("QUEUE", "OUTBOXES"):
        monkeypatch.setenv(f"SAFEDEFER_{name}", f"postgresql://u:{CANARY}@h/d")
    settings = Settings.load()
    assert CANARY in settings.queue
    assert CANARY not in f"{settings!r} {settings} {traceback.TracebackException.from_exception(ValueError(settings))}"
