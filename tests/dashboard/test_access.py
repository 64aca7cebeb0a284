"""Login tokens, sessions and form fields: what is ours, for whom, and until when."""

import pytest

from safedefer.dashboard.access import LOGIN_SECONDS, SESSION_SECONDS, Access, Sessions
from safedefer.keys import Key, Keyring

RING = Keyring(Key("a", bytes(range(32))))
ADMIN = Access(user="ann", read=True, act=True)


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(clock):
    return Sessions(RING, environment="prod", clock=clock)


def test_a_login_token_is_good_once(sessions):
    token = sessions.new_login(ADMIN)
    assert sessions.is_login(token)
    assert sessions.log_in(token).access == ADMIN
    assert not sessions.is_login(token)
    assert sessions.log_in(token) is None


def test_a_login_token_is_over_after_five_minutes(sessions, clock):
    token = sessions.new_login(ADMIN)
    clock.now += LOGIN_SECONDS + 1
    assert sessions.log_in(token) is None


def test_a_session_is_over_after_its_hours_and_when_it_is_ended(sessions, clock):
    session = sessions.log_in(sessions.new_login(ADMIN))
    cookie = sessions.write(session)
    assert sessions.read(cookie) == session
    sessions.end(session)
    assert sessions.read(cookie) is None
    other = sessions.write(sessions.new(ADMIN))
    clock.now += SESSION_SECONDS + 1
    assert sessions.read(other) is None


def test_what_was_used_is_forgotten_when_it_is_over(sessions, clock):
    for _ in range(5):
        sessions.log_in(sessions.new_login(ADMIN))
    clock.now += SESSION_SECONDS * 2
    sessions.log_in(sessions.new_login(ADMIN))
    assert len(sessions._used) == 1


def test_no_kind_is_taken_for_another(sessions):
    login, session = sessions.new_login(ADMIN), sessions.new(ADMIN)
    cookie, field = sessions.write(session), sessions.form_field(session, "ann")
    assert sessions.read(login) is None
    assert sessions.read(field) is None
    assert not sessions.is_login(cookie)
    assert not sessions.is_login(field)
    assert not sessions.is_form_field(session, "ann", cookie)
    assert not sessions.is_form_field(session, "ann", login)


def test_a_form_field_is_of_one_session_and_one_person(sessions):
    session = sessions.new(ADMIN)
    field = sessions.form_field(session, "ann")
    assert sessions.is_form_field(session, "ann", field)
    assert not sessions.is_form_field(session, "bob", field)
    assert not sessions.is_form_field(sessions.new(ADMIN), "ann", field)


def test_another_environment_or_key_is_another_dashboard(sessions, clock):
    cookie, login = sessions.write(sessions.new(ADMIN)), sessions.new_login(ADMIN)
    for other in (
        Sessions(RING, environment="staging", clock=clock),
        Sessions(Keyring(Key("a", bytes(range(50, 82)))), environment="prod", clock=clock),
    ):
        assert other.read(cookie) is None
        assert other.log_in(login) is None


@pytest.mark.parametrize("text", ["", "a", "a.b.c", "é", "a" * 10_000, "a..", "a.W10.", "\0", "a.b.c.d"])
def test_what_is_none_of_ours_is_nothing(sessions, text):
    assert sessions.read(text) is None
    assert sessions.log_in(text) is None
    assert not sessions.is_form_field(sessions.new(ADMIN), "ann", text)


def test_the_rights_of_a_token_are_those_of_the_session(sessions):
    access = Access(user="é" * 300, read=["mail"], act=["mail", "img"])
    read = sessions.read(sessions.write(sessions.log_in(sessions.new_login(access)))).access
    assert read.may_read("mail")
    assert not read.may_read("img")
    assert read.may_act("mail")
    assert not read.may_act("img")
    assert not read.reads_all


@pytest.mark.parametrize(
    ("access", "reads", "acts"),
    [
        (Access(user="a"), True, False),
        (Access(user="a", read=False, act=True), False, False),
        (Access(user="a", read=True, act=True), True, True),
        (Access(user="a", read=True, act={"mail"}), True, True),
        (Access(user="a", read={"img"}, act={"mail"}), False, False),
        (Access(user="a", read="mail", act="mail"), False, False),  # a text is no collection of names
        (Access(user="a", read=1, act=1), False, False),
    ],
)
def test_what_is_not_allowed_is_forbidden(access, reads, acts):
    assert (access.may_read("mail"), access.may_act("mail")) == (reads, acts)
