"""Who may see the dashboard and act on it: what a person may do, login tokens, sessions, and the field that forms carry.

Tokens, sessions and form fields are sealed by the key ring, each for a purpose of its own, and name the environment: none is
taken for another, nor for one of another deployment. Does no IO.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Final

from safedefer.dashboard.seals import seal, unseal
from safedefer.errors import MalformedToken
from safedefer.keys import Keyring

LOGIN_SECONDS: Final = 300
"""Seconds for which a login token can be used, once."""
SESSION_SECONDS: Final = 8 * 3_600
"""Seconds after which a person logs in again."""
_LOGIN: Final = b"safedefer dashboard login 1"
_SESSION: Final = b"safedefer dashboard session 1"
_FORM: Final = b"safedefer dashboard form 1"
_ID_BYTES: Final = 16
#: A browser keeps 4,096 bytes of a cookie.
_MOST_BYTES: Final = 3_500
_MOST_NAME: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a person may do: what ``authorize`` of ``App.dashboard`` returns.

    Args:
        user: The name that the audit log gives to what the person does.
        read: True: everything. A collection of names: these queues alone, and neither keys nor targets. False: nothing.
        act: The same of retrying, discarding, cancelling, pausing and purging; what may not be read may not be acted on.
    """

    user: str
    read: bool | Collection[str] = True
    act: bool | Collection[str] = False

    def may_read(self, queue: str) -> bool:
        """Whether the tasks of a queue may be seen, with their arguments."""
        return self.read is True or queue in _names(self.read)

    def may_act(self, queue: str) -> bool:
        """Whether something may be done in a queue."""
        return (self.act is True or queue in _names(self.act)) and self.may_read(queue)

    @property
    def reads_something(self) -> bool:
        """Whether there is anything that may be seen."""
        return self.read is True or bool(_names(self.read))

    @property
    def acts_somewhere(self) -> bool:
        """Whether there may be anything that may be done."""
        return self.act is True or bool(_names(self.act))

    @property
    def reads_all(self) -> bool:
        """Whether everything may be seen: also what belongs to no queue."""
        return self.read is True


def _names(queues: bool | Collection[str]) -> Collection[str]:
    # One text is a collection of its letters, and "in" looks for a part of it.
    return queues if isinstance(queues, Collection) and not isinstance(queues, str | bytes) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A browser that has logged in, or that ``authorize`` has let in."""

    id: str
    access: Access | None
    """None: ``authorize`` says it at every request."""
    expires: int


class Sessions:
    """Seals and reads login tokens, sessions and form fields.

    Args:
        keyring: The keys.
        environment: The App's.
        clock: Seconds since the epoch.

    Raises:
        ConfigurationError: The active key is limited to queues or patterns.
    """

    def __init__(self, keyring: Keyring, *, environment: str, clock: Callable[[], float]) -> None:
        seal(keyring, _FORM, b"")  # now, and not at the first login
        self._keyring = keyring
        self._environment = environment
        self._clock = clock
        self._used: dict[str, int] = {}
        """Ids of login tokens that were used and of sessions that were ended, until they expire. All were sealed by us."""

    def new_login(self, access: Access) -> str:
        """Return a token for one login within ``LOGIN_SECONDS``. Raises ``ConfigurationError`` if the active key is limited."""
        expires = int(self._clock()) + LOGIN_SECONDS
        return self._seal(_LOGIN, Session(id=secrets.token_urlsafe(_ID_BYTES), access=access, expires=expires))

    def is_login(self, token: str) -> bool:
        """Whether a login token is good now; uses it not."""
        return self._read(_LOGIN, token) is not None

    def log_in(self, token: str) -> Session | None:
        """Use a login token up, and return a new session; None if it is none of ours, is over, or was used in this process."""
        login = self._read(_LOGIN, token)
        if login is None or login.access is None:
            return None
        self._use(login)
        return self.new(login.access)

    def new(self, access: Access | None) -> Session:
        """Return a new session."""
        expires = int(self._clock()) + SESSION_SECONDS
        return Session(id=secrets.token_urlsafe(_ID_BYTES), access=access, expires=expires)

    def write(self, session: Session) -> str:
        """Return the value of the cookie."""
        return self._seal(_SESSION, session)

    def read(self, cookie: str) -> Session | None:
        """Return the session of a cookie; None if it is none of ours, is over, or was ended in this process."""
        return self._read(_SESSION, cookie)

    def end(self, session: Session) -> None:
        """Take a session no more."""
        self._use(session)

    def form_field(self, session: Session, user: str) -> str:
        """Return what a form of this session and person carries."""
        return seal(self._keyring, _FORM, self._form_text(session, user)).decode()

    def is_form_field(self, session: Session, user: str, field: str) -> bool:
        """Whether a form was made for this session and person."""
        return self._unsealed(_FORM, field) == self._form_text(session, user)

    def _form_text(self, session: Session, user: str) -> bytes:
        return json.dumps([self._environment, session.id, user]).encode()

    def _use(self, session: Session) -> None:
        now = self._clock()
        for each in [used for used, expires in self._used.items() if expires < now]:
            del self._used[each]
        self._used[session.id] = session.expires

    def _seal(self, purpose: bytes, session: Session) -> str:
        access = None if session.access is None else _written(session.access)
        text = json.dumps([self._environment, session.id, session.expires, access])
        return seal(self._keyring, purpose, text.encode()).decode()

    def _unsealed(self, purpose: bytes, sealed: str) -> bytes | None:
        if len(sealed) > _MOST_BYTES or not sealed.isascii():
            return None
        try:
            return unseal(self._keyring, purpose, sealed.encode())
        except MalformedToken:  # sealed by us it is well formed
            return None

    def _read(self, purpose: bytes, sealed: str) -> Session | None:
        text = self._unsealed(purpose, sealed)
        if text is None:
            return None
        # Written by a holder of a key without limits.
        environment, session_id, expires, written = json.loads(text)
        if environment != self._environment or expires < self._clock() or session_id in self._used:
            return None
        return Session(id=session_id, access=None if written is None else _access(written), expires=expires)


def _written(access: Access) -> list[Any]:
    return [
        access.user[:_MOST_NAME],
        *(each if isinstance(each, bool) else [*each] for each in (access.read, access.act)),
    ]


def _access(written: list[Any]) -> Access:
    user, read, act = written
    return replace(Access(user=user), read=read, act=act)
