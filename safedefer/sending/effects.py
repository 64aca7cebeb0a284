"""The name of an effect that ``app.once`` lets happen exactly once."""

from __future__ import annotations

from typing import Final

from safedefer.errors import BadTransactionStateError, InvalidTaskError

_MAX_EFFECT: Final = 700


def effect_of(name: str | None, running: tuple[str, str | None] | None) -> tuple[str, str | None]:
    """Return what an effect is noted as, and what else counts as it: the task that the running one re-runs.

    Args:
        name: What the caller calls it; None is the task that runs.
        running: The id of that task, of the first one in a chain of re-runs, and the id of the one that it re-runs;
            None if no task runs.

    Raises:
        BadTransactionStateError: There is no name and no task runs.
        InvalidTaskError: The name is empty, too long, or has a character that a database does not take.
    """
    if name is not None:
        _check(name)
        return f"effect:{name}", None
    if running is None:
        raise BadTransactionStateError("no task runs here; name the effect: app.once(connection, 'charge-42')")
    task_id, retry_of = running
    return f"task:{task_id}", None if retry_of is None else f"task:{retry_of}"


def _check(name: str) -> None:
    if type(name) is not str or not 0 < len(name) <= _MAX_EFFECT or "\0" in name or not _is_unicode(name):
        raise InvalidTaskError(f"an effect's name is a text of 1 to {_MAX_EFFECT} characters, without NUL")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
