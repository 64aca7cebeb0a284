"""The shape of the package: who may import, construct and ask what."""

import ast
import functools
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import safedefer

PACKAGE = Path(safedefer.__file__).parent
ROOT = Path(__file__).parent.parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
TRUST_CORE = (
    "errors.py",
    "refs.py",
    "claims.py",
    "token.py",
    "keys.py",
    "task.py",
    "policy.py",
    "gadgets.py",
    "signing.py",
)


#: What stands at the top level beside the trust core: the doors, and a few modules each of which says its own name.
BESIDE_THE_CORE = {
    *("__init__.py", "__main__.py", "app.py", "deferred.py", "settings.py", "pytest_plugin.py"),
    *("events.py", "options.py", "keyfile.py", "policy_cache.py", "ledger.py", "blobs.py", "headers.py"),
}


def type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@functools.cache
def imports(tree):
    """Return the top-level packages that a module imports when it runs, wherever in it."""
    found, pending = set(), [tree]
    while pending:
        node = pending.pop()
        if type_checking(node):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add((node.module or "").partition(".")[0])
        pending += ast.iter_child_nodes(node)
    return found


def importers(package):
    return {name for name, tree in SOURCES.items() if package in imports(tree)}


@functools.cache
def calls(tree):
    """Return the name that each call in a module calls, by its last part, and the call."""
    return [(_last_part(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _last_part(func):
    return func.id if isinstance(func, ast.Name) else func.attr if isinstance(func, ast.Attribute) else ""


def test_the_contracts_of_the_layers_are_kept():
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports())"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_module_of_the_top_level_is_the_trust_core_or_a_door_and_all_else_is_in_a_room():
    # The wheel has the plugin under another name, beside the package.
    assert {"pytest_plugin.py", *(name for name in SOURCES if "/" not in name)} == {*TRUST_CORE, *BESIDE_THE_CORE}


def test_no_imports_form_a_circle_not_even_those_for_types():
    """A package's ``__init__`` hands names on: what it imports is looked at, what imports it is not."""
    modules = {f"safedefer/{name}".removesuffix(".py").replace("/", "."): tree for name, tree in SOURCES.items()}
    graph = {
        name: {
            imported
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for imported in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            if imported in modules
        }
        for name, tree in modules.items()
    }
    assert sum(map(len, graph.values())) > 3 * len(graph)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(("package", "allowed"), [
    ("hmac", set()),
    ("_hashlib", {"keys.py"}),
    ("pickle", {"codecs/pickled.py"}),
    ("cloudpickle", {"codecs/pickled.py"}),
    ("pickletools", {"codecs/pickled.py"}),
    ("marshal", set()),
    ("ctypes", set()),
    ("apsw", {name for name in SOURCES if name.startswith(("queues/sqlite/", "transactions/databases/"))}),
    ("aiohttp", {
        name for name in SOURCES
        if name in {"dispatcher/transport.py", "dashboard/guard.py", "dashboard/site.py", "frameworks/aiohttp.py", "frameworks/django/dashboard.py"} or name.startswith("web/")
    } | {f"queues/cloudtasks/emulator/{name}.py" for name in ("pusher", "server")}),
    ("fastapi", {"frameworks/fastapi.py"}),
    ("starlette", {"frameworks/fastapi.py"}),
    ("flask", {"frameworks/flask.py"}),
    ("django", {name for name in SOURCES if name.startswith("frameworks/django/")}),
    ("google", {"queues/cloudtasks/client.py", "transactions/databases/datastore.py"}),
    ("grpc", {"transactions/databases/datastore.py"}),
    ("requests", {f"queues/cloudtasks/{name}.py" for name in ("client", "oidc")}),
    ("jwt", {"queues/cloudtasks/emulator/tokens.py", "queues/cloudtasks/oidc.py"}),
    ("cryptography", {"queues/cloudtasks/emulator/tokens.py"}),
    ("asyncpg", {
        "transactions/databases/postgres.py",
        *(f"queues/postgres/{name}.py" for name in ("errors", "listener", "migrations", "pgqueuer", "pools")),
    }),
    ("psycopg", {"transactions/databases/postgres.py", "queues/postgres/producers.py"}),
    ("pgqueuer", {"queues/postgres/pgqueuer.py", "queues/postgres/migrations.py"}),
    ("rich", {"cli/terminal.py"}),
    ("prometheus_client", {"observe/metrics.py"}),
    ("jinja2", {"dashboard/render.py"}),
    ("libcst", {"migrate/edit.py"}),
    ("opentelemetry", {"observe/tracing.py"}),
    ("celery", {"queues/celery/engine.py", "queues/celery/worker.py"}),
    ("kombu", {"queues/celery/engine.py"}),
    ("click", {name for name in SOURCES if name.startswith(("cli/", "demo/"))}),
])  # fmt: skip
def test_a_package_is_imported_only_where_it_belongs(package, allowed):
    assert importers(package) <= allowed


@pytest.mark.parametrize("name", ["eval", "exec", "compile", "__import__", "breakpoint"])
def test_nothing_is_evaluated(name):
    found = {
        source
        for source, tree in SOURCES.items()
        for _, node in calls(tree)
        if isinstance(node.func, ast.Name) and node.func.id == name
    }
    assert found == set()


def _is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


@pytest.mark.parametrize(("cls", "home"), [("VerifiedTask", "signing.py"), ("VerifiedPointer", "signing.py")])
def test_only_the_verifier_makes_verified_values(cls, home):
    # Called, or handed to what could call it.
    made = {
        name
        for name, tree in SOURCES.items()
        for called, node in calls(tree)
        if called == cls or (called not in {"isinstance", "cast"} and any(_is_name(each, cls) for each in node.args))
    }
    assert made == {home}
    assert not {
        name
        for name, tree in SOURCES.items()
        for called, node in calls(tree)
        if called == "replace" and cls in ast.dump(node)
    }


def test_modules_are_imported_by_name_in_the_trust_core_only_by_references_and_the_policy():
    found = {name for name, tree in SOURCES.items() for called, _ in calls(tree) if called == "import_module"}
    assert found & set(TRUST_CORE) == {"refs.py", "policy.py"}


@pytest.mark.parametrize("name", ["refs.py"])
@pytest.mark.parametrize(
    "question", ["isinstance", "getattr", "hasattr", "callable", "vars", "dir", "getmembers", "unwrap", "signature"]
)
def test_references_ask_no_question_that_an_object_of_the_users_could_answer(name, question):
    asked = [ast.unparse(node) for called, node in calls(SOURCES[name]) if called == question]
    assert set(asked) <= {"vars(ModuleType)"}


def test_the_trust_core_reads_no_clock_and_no_randomness():
    for name in TRUST_CORE:
        assert not imports(SOURCES[name]) & {"time", "random", "secrets", "uuid", "os"}, name


def test_the_trust_core_is_one_reviewers_afternoon():
    def lines(name):
        tree = SOURCES[name]
        text = (PACKAGE / name).read_text().splitlines()
        doc = {
            n
            for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            for n in range(node.lineno, node.end_lineno + 1)
        }
        return sum(
            1
            for number, line in enumerate(text, 1)
            if line.strip() and not line.strip().startswith("#") and number not in doc
        )

    assert sum(map(lines, TRUST_CORE)) < 1_450


def fresh(code):
    """Return what a new interpreter prints."""
    # Without what makes coverage measure it: that imports a part of the standard library itself.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True, text=True, check=True)
    return run.stdout.split()


def test_importing_the_package_imports_no_framework():
    loaded = fresh(
        "import sys, safedefer; [getattr(safedefer, n) for n in safedefer.__all__ if n != 'TaskHandler']; print(*sys.modules)"
    )
    assert "safedefer.app" in loaded
    heavy = {
        *(
            "aiohttp",
            "click",
            "celery",
            "google.cloud",
            "cloudpickle",
            "prometheus_client",
            "jinja2",
            "libcst",
            "opentelemetry",
            "ruamel",
            "ruamel.yaml",
            "pydantic_settings",
        ),
        *("sqlite3", "_sqlite3", "apsw", "psycopg", "asyncpg", "pgqueuer", "sqlalchemy", "django"),
        *("fastapi", "starlette", "flask", "safedefer.frameworks"),
        *("asyncio", "ssl"),  # a tenth of the time, and of use to those only who have a loop: they have loaded it
    }
    assert not heavy & set(loaded)


def test_every_module_says_what_it_is_for():
    assert not [name for name, tree in SOURCES.items() if not ast.get_docstring(tree)]


#: Names of two classes. TaskHandler is one public name: what type checkers read, and the view that is made for it.
SHARED_NAMES = {"TaskHandler"}


def classes_by_name(sources):
    found = {}
    for name, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name)
    return found


def long_functions(sources, most):
    return {
        (name, node.name)
        for name, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > most
    }


def test_no_function_has_more_than_60_lines():
    assert long_functions(SOURCES, 60) == set()


def test_no_file_has_more_than_450_lines_unless_its_docstring_says_why_it_is_one_file():
    long = {name for name in SOURCES if (PACKAGE / name).read_text().count("\n") > 450}
    assert not {name for name in long if "Over 450 lines, since" not in ast.get_docstring(SOURCES[name])}


#: Where our own modules are imported late: the doors, and where an extra, or an engine that few choose, is reached.
#: ``events`` reaches an event loop, which an async observer alone needs.
LATE_IMPORTS = {
    "events.py",
    *("app.py", "deferred.py", "settings.py", "pytest_plugin.py", "demo/show.py", "delivery/__init__.py"),
    *(name for name in SOURCES if name.startswith("cli/")),
    *("frameworks/django/__init__.py", "migrate/code.py", "observe/health.py"),
    *(
        "queues/__init__.py",
        "queues/cloudtasks/engine.py",
        "transactions/databases/__init__.py",
        "transactions/datastore.py",
    ),
}


def late_imports(tree):
    """Return the modules of our own that functions import."""
    return {
        node.module
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "safedefer"
    }


def test_our_own_modules_are_imported_late_at_doors_alone():
    late = {name: late_imports(tree) for name, tree in SOURCES.items() if late_imports(tree)}
    assert late.keys() <= LATE_IMPORTS, late
    assert late["app.py"], "the search finds what is there"


def test_no_two_classes_have_one_name():
    assert {name for name, homes in classes_by_name(SOURCES).items() if len(homes) > 1} <= SHARED_NAMES


def test_the_checks_of_length_and_names_find_what_they_look_for():
    tree = ast.parse("class A:\n    def f(self):\n        x = 1\n        return x\nclass A: pass")
    assert long_functions({"m.py": tree}, 2) == {("m.py", "f")}
    assert long_functions({"m.py": tree}, 3) == set()
    assert classes_by_name({"m.py": tree, "n.py": tree}) == {"A": ["m.py", "m.py", "n.py", "n.py"]}


def test_the_public_names_are_those_of_all_and_every_error_is_among_them():
    assert set(safedefer.errors.__all__) <= set(safedefer.__all__)
    assert len(safedefer.__all__) == len(set(safedefer.__all__))
    assert not [name for name in safedefer.__all__ if not hasattr(safedefer, name)]
