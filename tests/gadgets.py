"""Which callables of the standard library reach a sink: run it for a new Python (``python -m tests.gadgets``).

A sink runs a command, code, an import by name or a pickle. The sources are read, not imported: every function and method
whose body calls a sink, or calls one of its own module that does. Prints those that ``safedefer.gadgets`` does not list:
classes first, because a class of the application that inherits its construction from one would be admitted.
"""

import ast
import re
import sys
import sysconfig
from pathlib import Path

from safedefer.gadgets import is_gadget

SINKS = {
    "exec", "eval", "compile", "__import__", "importlib.import_module", "importlib.__import__", "importlib.util.spec_from_file_location",
    "runpy.run_path", "runpy.run_module", "os.system", "os.popen", "os.posix_spawn", "os.posix_spawnp", "os.fork", "os.forkpty", "pty.spawn",
    "subprocess.Popen", "subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output", "subprocess.getoutput",
    "subprocess.getstatusoutput", "_posixsubprocess.fork_exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.Unpickler",
    "marshal.load", "marshal.loads", "ctypes.CDLL", "ctypes.PyDLL", "shelve.open", "code.interact", "types.FunctionType", "types.CodeType",
    *(f"os.{kind}{how}" for kind in ("exec", "spawn") for how in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
}  # fmt: skip
_SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "__pycache__",
    "ensurepip",
    "tkinter",
    "config",
}


_WORTH = re.compile(rb"\b(exec|eval|compile|__import__|import_module|run_path|run_module|system|popen|posix_spawn\w*|fork\w*|spawn\w*"
                    rb"|exec[lv]p?e?|Popen|subprocess|Unpickler|pickle|marshal|CDLL|shelve|interact|FunctionType|CodeType)\b")  # fmt: skip


def _bodies(node):
    """Yield what stands in a body, also under a condition."""
    for each in node.body:
        if isinstance(each, ast.If | ast.Try):
            yield from _bodies(each)
            yield from each.orelse
        else:
            yield each


def modules():
    """Yield the name and the tree of every module of the standard library that is written in Python."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0].split("-")[0] in sys.stdlib_module_names and not _SKIPPED & set(parts):
            source = path.read_bytes()
            if not _WORTH.search(source):
                continue
            try:
                yield ".".join(parts).removesuffix(".__init__"), ast.parse(source)
            except SyntaxError:  # of another Python
                continue


def reaching(module, tree):
    """Return the qualified names of a module's functions and methods that reach a sink."""
    names = _imports(tree)
    calls = {}
    for owner in [tree, *(node for node in _bodies(tree) if isinstance(node, ast.ClassDef))]:
        prefix = "" if owner is tree else f"{owner.name}."
        for node in _bodies(owner):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                calls[prefix + node.name] = {
                    _resolved(call.func, names, prefix) for call in ast.walk(node) if isinstance(call, ast.Call)
                }
    sinks = SINKS | {name.removeprefix(f"{module}.") for name in SINKS if name.startswith(f"{module}.")}
    found = {name for name, called in calls.items() if called & sinks or name in sinks}
    while more := {
        name for name, called in calls.items() if name not in found and (called & found or _makes(called, found))
    }:
        found |= more
    return found


def _makes(called, found):
    return any(f"{name}.__init__" in found or f"{name}.__new__" in found for name in called)


def _imports(tree):
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.partition(".")[0]: alias.name
                if alias.asname
                else alias.name.partition(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _resolved(func, names, prefix):
    if isinstance(func, ast.Name):
        return names.get(func.id, func.id)
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        base = func.value.id
        return prefix + func.attr if base in {"self", "cls"} else f"{names.get(base, base)}.{func.attr}"
    return ""


def scan():
    """Return ``module:qualname`` of every function and method that reaches a sink."""
    return sorted(f"{name}:{qualname}" for name, tree in modules() for qualname in reaching(name, tree))


def made_by_sinks(found):
    """Return the classes that reach a sink when they are made."""
    return sorted(name.rpartition(".")[0] for name in found if name.endswith((".__init__", ".__new__")))


def unlisted(names):
    """Return the names that are on no list of gadgets."""
    return [name for name in names if not is_gadget(*name.split(":"))]


if __name__ == "__main__":
    every = scan()
    print(f"{len(every)} reach a sink in Python {sys.version.split()[0]}")
    print("classes that are not listed:", *unlisted(made_by_sinks(every)), sep="\n    ")
    print(
        "functions and methods that are not listed (exact patterns alone admit the standard library):",
        *unlisted(every),
        sep="\n    ",
    )
