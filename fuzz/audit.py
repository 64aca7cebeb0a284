"""An audit hook that notes what must never happen while untrusted bytes are read.

CPython raises audit events (PEP 578) from C, whatever Python code was reached: an import of a module that is not
loaded yet, compiling or running code, opening a file, a socket, a process.
"""

import operator
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from zoneinfo import TZPATH, ZoneInfo, ZoneInfoNotFoundError

_WATCHED = (
    "import", "exec", "compile", "code.__new__", "function.__new__", "open", "socket.", "subprocess.", "os.system", "os.exec", "os.fork",
    "os.posix_spawn", "os.spawn", "os.startfile", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
    "os.chown", "os.truncate", "os.putenv", "os.kill", "pty.", "shutil.", "tempfile.", "ctypes.", "pickle.find_class", "marshal.",
    "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "telnetlib.", "sqlite3.", "signal.", "sys._getframe_raise", "winreg.", "cpython._PySys_ClearAuditHooks",
)  # fmt: skip

#: Where time zones are read from: files of the system, and those of tzdata.
_ZONES = [Path(folder) for folder in TZPATH]

_seen: list[str] = []


def _hook(event: str, args: tuple[object, ...]) -> None:
    if not event.startswith(_WATCHED):
        return
    if event == "open" and _is_harmless_file(args):
        return
    if event == "import" and str(args[0]).partition(".")[0] == "tzdata":  # zoneinfo looks for a zone's file there
        return
    if event == "compile" and args[1] == "<unknown>":  # ast.parse, for the marks under a traceback's lines
        return
    if (
        event == "open" and args[0] == "<unknown>"
    ):  # of the same: from 3.13 on, the parser looks there for a faulty line
        return
    _seen.append(f"{event} {args[0]!r:.200}" if args else event)


def _is_harmless_file(args: tuple[object, ...]) -> bool:
    """Say whether it is a zone of the time zone database, or source for a traceback: files that are only read."""
    path, mode = Path(str(args[0])), args[1] if len(args) > 1 else "r"
    if (mode is not None and set(str(mode)) & set("wax+")) or ".." in path.parts:
        return False
    return path.suffix == ".py" or any(map(path.is_relative_to, ["/proc/self", *_ZONES]))


# Where the machine has no time zone database, zoneinfo imports the packages of this one as it finds zones.
with suppress(ModuleNotFoundError):
    _tzdata = import_module("tzdata").__path__
    _ZONES += map(Path, _tzdata)
    for _package in pkgutil.walk_packages(_tzdata, "tzdata."):
        import_module(_package.name)

# Where a zone is not found, it imports what reads the resources of packages.
with suppress(ZoneInfoNotFoundError):
    ZoneInfo("Europe/Nowhere")

#: An audit hook stays for good. One of Python code lets other threads run within ``sys.settrace``, which before Python 3.12 then
#: refuses a thread that begins under coverage. So while nothing is watched, this calls a function in C that looks at nothing.
_gate = partial(operator.is_)
sys.addaudithook(_gate)


def _let_through(to: Callable[[str, tuple[object, ...]], object]) -> None:
    _gate.__setstate__((to, (), {}, {}))  # type: ignore[attr-defined]


class Reached(AssertionError):
    """Untrusted bytes had an effect."""


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Raise ``Reached`` at the end if the body imported, ran, opened or started anything, in whichever thread."""
    _seen.clear()
    _let_through(_hook)
    try:
        yield
    finally:
        _let_through(operator.is_)
    if _seen:
        raise Reached("; ".join(_seen[:5]))
