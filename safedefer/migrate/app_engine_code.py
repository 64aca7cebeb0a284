"""App Engine's ``deferred`` in the user's code: imports, exceptions and retry options of ``taskqueue``, and call sites."""

from __future__ import annotations

import ast
from typing import Final

from safedefer import deferred
from safedefer.migrate.edits import CallArguments, ImportEdit
from safedefer.migrate.notes import Level
from safedefer.migrate.project import APP_ENGINE, DJANGAE, OURS, CodeFile, Project
from safedefer.migrate.sites import judge_call, judge_options, options_of, parameters_of

_PACKAGE: Final = "google.appengine.ext"
_LIBRARIES: Final = (*APP_ENGINE, *DJANGAE)
_DEFERS: Final = frozenset(
    {
        *(f"{module}.defer" for module in (*_LIBRARIES, OURS)),
        "safedefer.defer",
        f"{OURS}.defer_async",
        "safedefer.defer_async",
    }
)
_IMPORTS: Final = frozenset({*_LIBRARIES, *_DEFERS, OURS})
_TASKQUEUES: Final = (
    "google.appengine.api.taskqueue",
    "google.appengine.api.taskqueue.taskqueue",
    "google.appengine.api.labs.taskqueue",
)
_RETRY_OPTIONS: Final = frozenset(f"{module}.TaskRetryOptions" for module in _TASKQUEUES)
#: Exceptions of ``taskqueue``, and ours. ``Error`` is wider here: it is the base of the tasks' failures too.
_ERRORS: Final = {
    **{name: name for name in (
        "BadTransactionStateError", "Error", "InvalidEtaError", "InvalidTaskError", "InvalidTaskNameError", "InvalidTaskRetryOptionsError",
        "InvalidUrlError", "TaskAlreadyExistsError", "TaskTooLargeError", "TombstonedTaskError",
    )},
    "DuplicateTaskNameError": "TaskAlreadyExistsError",
    "InvalidQueueError": "UnknownQueueError",
    "InvalidQueueNameError": "UnknownQueueError",
    "UnknownQueueError": "UnknownQueueError",
    "InternalError": "QueueUnavailable",
    "TransientError": "QueueUnavailable",
}  # fmt: skip


#: What surrounds ``deferred`` where it was App Engine's, by dotted name, and means something else here: code, and what is said.
_BESIDE: Final = {
    **{f"{module}.{name}": (
        "taskqueue-add", f"taskqueue.{name} stays as it is and needs App Engine: write the handler of its URL as a function, and defer that",
    ) for module in _TASKQUEUES for name in ("add", "add_async", "Task", "Queue")},
    "google.appengine.runtime.DeadlineExceededError": (
        "deadline", "nothing raises DeadlineExceededError outside of App Engine: stop by the clock, and defer the rest",
    ),
    f"{_PACKAGE}.testbed.TASKQUEUE_SERVICE_NAME": (
        "test-queue", "no task reaches the stub of testbed any more: safedefer.testing.TestApp has run_due() and assert_deferred()",
    ),
}  # fmt: skip


def visit(project: Project, file: CodeFile) -> None:
    """Decide what becomes of a file."""
    found = False
    for node in ast.walk(file.names.tree):
        if isinstance(node, ast.ImportFrom):
            _visit_from(file, node)
        elif isinstance(node, ast.Import):
            _visit_import(file, node)
        elif isinstance(node, ast.Attribute):
            _visit_attribute(file, node)
        elif isinstance(node, ast.Call) and is_defer(file, node):
            found = True
            _visit_defer(project, file, node)
    found = found or any(
        each.imported in _IMPORTS for scope in file.names.bindings.values() for name in scope.values() for each in name
    )
    for node in ast.walk(file.names.tree):
        if isinstance(node, ast.Try):
            _visit_try(file, node)
        elif isinstance(node, ast.Call):
            _visit_wrap(file, node)
        elif found and isinstance(node, ast.Name | ast.Attribute):
            _visit_beside(file, node)


def _visit_wrap(file: CodeFile, call: ast.Call) -> None:
    """Note the handler of the bundled services for Python 3."""
    if not (file.names.dotted(call.func) or "").startswith("google.appengine.api.wrap_wsgi_app"):
        return
    for each in call.keywords:
        if each.arg == "use_deferred" and not (isinstance(each.value, ast.Constant) and not each.value.value):
            file.note(
                each.value, Level.BY_HAND, "task-handler",
                "use_deferred has App Engine's handler unpickle requests: take it out once its queues are empty, and receive tasks by "
                "`safedefer run`, app.wsgi, or safedefer.frameworks.flask",
            )  # fmt: skip


def _visit_beside(file: CodeFile, node: ast.Name | ast.Attribute) -> None:
    said = _BESIDE.get(file.names.dotted(node) or "")
    if said is not None and isinstance(node.ctx, ast.Load):
        file.note(node, Level.NOTE, *said)


def is_defer(file: CodeFile, call: ast.Call) -> bool:
    """Whether a call is one of ``defer``, theirs or ours."""
    return file.names.dotted(call.func) in _DEFERS


def _visit_from(file: CodeFile, node: ast.ImportFrom) -> None:
    origin = file.names.origin(node)
    span = file.places.span(node)
    if origin == _PACKAGE:
        moved = [n for n, alias in enumerate(node.names) if alias.name == "deferred"]
        if moved:
            file.edits.statements[span] = ImportEdit(moved, "safedefer", len(node.names))
    elif origin in _LIBRARIES:
        known = [n for n, alias in enumerate(node.names) if alias.name in {"*", *deferred.__all__}]
        inner = [n for n, alias in enumerate(node.names) if origin == APP_ENGINE[0] and alias.name == "deferred"]
        for n, alias in enumerate(node.names):
            if n not in known and n not in inner:
                file.note(
                    node,
                    Level.BY_HAND,
                    "private-name",
                    f"{alias.name} of {origin} has no counterpart; what is it used for?",
                )
        if inner:
            file.edits.statements[span] = ImportEdit(inner, "safedefer", len(node.names))
        elif known:
            file.edits.statements[span] = ImportEdit(known, OURS, len(node.names))


def _visit_import(file: CodeFile, node: ast.Import) -> None:
    moved = [n for n, alias in enumerate(node.names) if alias.name in _LIBRARIES]
    if moved:
        file.edits.statements[file.places.span(node)] = ImportEdit(moved, OURS, len(node.names))


def _visit_attribute(file: CodeFile, node: ast.Attribute) -> None:
    """Rewrite ``google.appengine.ext.deferred``, spelt out; note what uses a private name, or the handler."""
    if ast.unparse(node) in _LIBRARIES and file.names.dotted(node) in _LIBRARIES:
        parent = file.names.parents[node]
        if not (isinstance(parent, ast.Attribute) and file.names.dotted(parent) in _LIBRARIES):
            file.edits.names[file.places.span(node)] = OURS
    name = file.names.dotted(node) or ""
    module, _, last = name.rpartition(".")
    if module not in _LIBRARIES or name in _LIBRARIES:
        return
    if last in {"TaskHandler", "Handler", "application"}:
        file.note(
            node, Level.BY_HAND, "task-handler",
            f"{last} is no handler of WSGI or webapp here: run `safedefer run`, or mount app.wsgi, app.asgi or app.routes()",
        )  # fmt: skip
    elif last not in deferred.__all__:
        file.note(node, Level.BY_HAND, "private-name", f"{last} of {module} has no counterpart; what is it used for?")


def _visit_defer(project: Project, file: CodeFile, call: ast.Call) -> None:
    arguments = CallArguments(call)
    called = arguments.positional[0][1] if arguments.positional else None
    judge_options(project, file, arguments, frozenset() if called is None else parameters_of(project, file, called))
    for name, home, value in options_of(project, file, arguments):
        if name == "_retry_options":
            _visit_retry(project, home, value)
    given = [value for _, value in arguments.positional]
    kwargs = {name: value for name, (_, value) in arguments.keywords.items() if not name.startswith("_")}
    if given and not isinstance(given[0], ast.Starred):
        judge_call(project, file, call, given[0], given[1:], kwargs)


def _visit_retry(project: Project, file: CodeFile, retry: ast.expr) -> None:
    home, made = project.value(file, retry)
    if isinstance(made, ast.Call) and home.names.dotted(made.func) in _RETRY_OPTIONS:
        _replace(home, made.func, "TaskRetryOptions")


def _replace(file: CodeFile, name: ast.expr, ours: str) -> None:
    """Write ``deferred.<ours>`` in place of a name of ``taskqueue``; of one that was imported by itself, too."""
    file.edits.names[file.places.span(name)] = f"{file.deferred()}.{ours}"
    file.unused_imports(*_TASKQUEUES)


def _visit_try(file: CodeFile, node: ast.Try) -> None:
    calls = [each for part in node.body for each in ast.walk(part) if isinstance(each, ast.Call)]
    defers = [each for each in calls if is_defer(file, each)]
    adds = [each for each in calls if isinstance(each.func, ast.Attribute) and each.func.attr in {"add", "add_async"}
            and (file.names.dotted(each.func) or "").startswith(_TASKQUEUES)]  # fmt: skip
    if not defers:
        return
    for handler in node.handlers:
        if handler.type is None:
            continue
        for kind in handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]:
            module, _, last = (file.names.dotted(kind) or "").rpartition(".")
            if module not in _TASKQUEUES:
                continue
            if adds or last not in _ERRORS:
                why = "the block adds to taskqueue too" if adds else "it has no counterpart"
                file.note(
                    kind,
                    Level.BY_HAND,
                    "taskqueue-error",
                    f"{last}: {why}; catch the errors of safedefer.deferred apart",
                )
                continue
            _replace(file, kind, _ERRORS[last])
            if last == "Error":
                file.note(
                    kind,
                    Level.NOTE,
                    "wider-error",
                    "deferred.Error is the base of PermanentTaskFailure too; DeferError is what defer() raises",
                )
