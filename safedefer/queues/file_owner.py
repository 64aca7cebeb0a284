"""Who may change a file that this process trusts: its owner, its mode, and the folders on the way to it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_OTHERS_WRITE = stat.S_IWOTH
#: Parts of a way, with those of the links on it. The system itself follows 40 links.
_MOST_PARTS: Final = 4_096


def trouble_with_owner(what: str, path: str, status: os.stat_result) -> str | None:
    """Return what is wrong if a file or folder belongs to a user other than root and this one; else None.

    Args:
        what: Its name in the message, such as ``the key file``.
        path: Its path, for the message.
        status: What ``stat`` says of it.
    """
    if status.st_uid in {0, os.geteuid()}:
        return None
    return (
        f"{what} {path!a} belongs to the user {status.st_uid}, who can change it; make it this process's own "
        f"(`chown {os.geteuid()} {path!a}`), or run as that user"
    )


def trouble_with_folders(path: str) -> str | None:
    """Return what is wrong if others may replace a file, by any folder on the way to it; else None.

    A folder is fine if it belongs to root or to this user, and others may not write there, or only delete what is theirs
    (the sticky bit, as of ``/tmp``). The way through symbolic links and the way behind them are both judged, and the owners of
    the links: whoever has one chooses the file.
    """
    for link, status in _links(path):
        owner = trouble_with_owner("the symbolic link", link, status)
        if owner is not None:
            return owner
    folders = dict.fromkeys([*Path(path).absolute().parents, *Path(os.path.realpath(path)).parents])
    for folder in folders:
        try:
            status = folder.stat()
        except OSError:  # it is reported by who opens the file
            continue
        owner = trouble_with_owner("the folder", str(folder), status)
        if owner is not None:
            return owner
        if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX:
            return f"the folder {str(folder)!a} of {path!a} may be changed by others; run `chmod o-w {str(folder)!a}`"
    return None


def _links(path: str) -> Iterator[tuple[str, os.stat_result]]:
    """Yield each symbolic link on the way to a file, with what ``lstat`` says of it."""
    rest = list(reversed(Path(path).absolute().parts))
    here = Path(rest.pop())
    for _ in range(_MOST_PARTS):
        if not rest:
            return
        part = rest.pop()
        here = here.parent if part == ".." else here / part
        try:
            status = here.lstat()
        except OSError:  # it is reported by who opens the file
            return
        if stat.S_ISLNK(status.st_mode):
            yield str(here), status
            target = Path(here.parent, here.readlink())
            rest += reversed(target.parts[1:])
            here = Path(target.parts[0])
