"""Fuzz targets. Run as ``python -m fuzz.fuzz_<target>``, they import the library under atheris's eyes."""

import sys


def _import_instrumented() -> None:
    try:
        import atheris
    except ImportError:
        return
    with atheris.instrument_imports(include=["safedefer"]):
        import safedefer.app
        import safedefer.codecs.pickled
        import safedefer.deferred
        import safedefer.queues.memory.queue  # noqa: F401


if any(arg.startswith("fuzz.fuzz_") for arg in sys.orig_argv):
    _import_instrumented()
