"""Celery in the user's code: ``f.delay``, ``f.apply_async``, and functions decorated as tasks."""

from __future__ import annotations

import ast
from typing import Final

from safedefer.migrate.edits import CallArguments, Piece, spread
from safedefer.migrate.notes import Level
from safedefer.migrate.project import CodeFile, OldTask, Project
from safedefer.migrate.rewriting import NO_RETRIES, finish, note_reference, ordered
from safedefer.migrate.sites import judge_eta, judge_queue

_SHARED: Final = frozenset(
    {"celery.shared_task", "celery.app.shared_task", "celery.task", "celery.task.task", "celery.decorators.task"}
)
_APPS: Final = frozenset({"celery.Celery", "celery.app.Celery", "celery.app.base.Celery"})
_LIKELY_APPS: Final = frozenset({"app", "celery", "celery_app", "capp"})
#: Options of a decorator that change nothing of what runs here.
_SILENT: Final = frozenset({"name", "ignore_result", "acks_late", "track_started", "serializer", "store_errors_even_if_ignored", "typing", "trail",
                            "send_events", "compression", "acks_on_failure_or_timeout", "reject_on_worker_lost", "shared", "lazy"})  # fmt: skip
_NOTED: Final = {
    "autoretry_for": "every exception is tried again but PermanentTaskFailure, which the task raises for those that are final",
    "dont_autoretry_for": "raise PermanentTaskFailure for these",
    "retry_backoff": "the wait doubles from min_backoff_seconds on: queue.yaml, or _retry_options",
    "retry_backoff_max": "max_backoff_seconds in queue.yaml, or _retry_options",
    "retry_jitter": "waits have jitter",
    "retry_kwargs": "task_retry_limit in queue.yaml, or _retry_options",
    "max_retries": "task_retry_limit in queue.yaml, or _retry_options",
    "default_retry_delay": "min_backoff_seconds in queue.yaml, or _retry_options",
    "rate_limit": "rate in queue.yaml, which is one for all processes",
    "expires": "a task waits for up to 31 days; check the time in the task",
    "throws": "raise PermanentTaskFailure for what is final",
    "priority": "use a queue of its own",
}
_STAYS: Final = {
    "bind": "bind=True hands the task to it as self: take that parameter out, and raise an exception in place of self.retry(); "
    "safedefer.current_task() has id and retry_count",
    "base": "base= is a class of tasks: use App(around=[...])",
    "pydantic": "pydantic=True: annotate the parameters with models, which defer() carries as they are",
    "after_return": "use App(observers=[...])",
    "on_failure": "use App(observers=[...])",
    "on_success": "use App(observers=[...])",
}
#: Options of a call.
_CALL_DROPPED: Final = {
    "retry": "defer() stores the task or raises",
    "retry_policy": "defer() stores the task or raises",
    "serializer": "the codec is one",
    "compression": "large arguments are stored apart",
    "priority": "use a queue of its own",
    "ignore_result": "results are not kept",
    "expires": "a task waits for up to 31 days; check the time in the task",
    "shadow": "tasks are listed by callable and name",
    "producer": "the queue is that of the App",
    "connection": "the queue is that of the App",
    "publisher": "the queue is that of the App",
    "add_to_parent": "there are no trees of results",
    "argsrepr": "logs have no arguments",
    "kwargsrepr": "logs have no arguments",
    "soft_time_limit": "one deadline is for both: _deadline",
}
_CALL_BY_HAND: Final = {
    "link": "defer the next task at the end of this one",
    "link_error": "observe dead letters: App(observers=[...])",
    "chord": "count in the database, and let the last task defer the next",
    "group_id": "count in the database",
    "exchange": "queues have names alone: _queue",
    "routing_key": "queues have names alone: _queue",
    "reply_to": "let the task store its outcome",
    "headers": "pass what the task reads as arguments",
}
_CANVAS: Final = frozenset({"s", "si", "signature", "subtask", "map", "starmap", "chunks"})
_CANVAS_FUNCTIONS: Final = frozenset({f"celery.{n}" for n in ("chain", "group", "chord", "signature", "chunks", "xmap")} | {
    f"celery.canvas.{n}" for n in ("chain", "group", "chord", "signature", "chunks")})  # fmt: skip
#: Names of the positional arguments of ``apply_async``.
_POSITIONS: Final = ("args", "kwargs", "task_id", "producer", "link", "link_error", "shadow")
_COMPOSED: Final = "tasks are not composed; let each defer the next, or use app.defer_many"
_SENDS: Final = frozenset({"delay", "apply_async", "delay_on_commit", "apply_async_on_commit"})


def collect(project: Project) -> None:
    """Find the functions that a decorator made tasks."""
    for file in project.files:
        for node in ast.walk(file.names.tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for decorator in node.decorator_list:
                func = decorator.func if isinstance(decorator, ast.Call) else decorator
                if _is_task(project, file, func):
                    options, stays = _decorated(file, node, decorator)
                    project.tasks[f"{file.names.module}.{node.name}"] = OldTask(
                        file, node, decorator, "celery", options, stays
                    )


def _is_task(project: Project, file: CodeFile, func: ast.expr) -> bool:
    if file.names.dotted(func) in _SHARED:
        return True
    if not isinstance(func, ast.Attribute) or func.attr not in {"task", "periodic_task"}:
        return False
    home, made = project.value(file, func.value)
    if isinstance(made, ast.Call):
        return home.names.dotted(made.func) in _APPS
    # Imported from a file that was not given: by its usual names.
    origin = file.names.dotted(func.value) or ""
    return (
        origin.rpartition(".")[2] in _LIKELY_APPS and "celery" in origin and isinstance(made, ast.Name | ast.Attribute)
    )


def _decorated(
    file: CodeFile, node: ast.FunctionDef | ast.AsyncFunctionDef, decorator: ast.expr
) -> tuple[dict[str, str], str | None]:
    """Return the options that a decorator stands for, and why it stays if it does."""
    options: dict[str, str] = {}
    if not isinstance(file.names.scope(node), ast.Module):
        return options, "it is no function at the top level of a module"
    for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
        name, value = keyword.arg, keyword.value
        off = isinstance(value, ast.Constant) and value.value in {None, False}
        if off or name in _SILENT:
            continue
        if name in _STAYS:
            return options, _STAYS[name]
        if name == "queue" and isinstance(value, ast.Constant):
            options |= {} if value.value == "default" else {"_queue": repr(value.value)}
        elif (
            name in {"time_limit", "soft_time_limit"}
            and isinstance(value, ast.Constant)
            and isinstance(value.value, int)
        ):
            if name == "time_limit" or "_deadline" not in options:
                options["_deadline"] = str(value.value)
        elif name in _NOTED:
            file.note(value, Level.NOTE, "task-option", f"{name}= of {node.name} is left out: {_NOTED[name]}")
        else:
            return options, f"{name}= is not known, or not written out"
    return options, None


def visit(project: Project, file: CodeFile) -> None:
    """Decide what becomes of a file."""
    rewritten = 0
    for task in project.tasks.values():
        if task.file is file and task.kind == "celery":
            rewritten += _visit_task(file, task)
    for node in ast.walk(file.names.tree):
        if isinstance(node, ast.Call):
            rewritten += _visit_call(project, file, node)
        elif isinstance(node, ast.Attribute) and node.attr in _SENDS:
            sent = project.task(file, node.value)
            if sent is not None and sent.kind == "celery":
                note_reference(project, file, node, sent)
    if rewritten:
        file.unused_imports("celery")
        file.note(file.names.tree, Level.NOTE, "retries", NO_RETRIES.format("Celery"))


def _visit_task(file: CodeFile, task: OldTask) -> bool:
    if task.stays is not None:
        file.note(
            task.decorator,
            Level.BY_HAND,
            "decorator",
            f"the decorator of {task.node.name} stays, and calls of it: {task.stays}",
        )
        return False
    file.edits.decorators.add(file.places.span(task.decorator))
    # Names of apps go with their last decorator, where an import brought them.
    if isinstance(task.decorator, ast.Attribute | ast.Call):
        func = task.decorator.func if isinstance(task.decorator, ast.Call) else task.decorator
        if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
            file.edits.maybe_unused.add(func.value.id)
    return True


def _visit_call(project: Project, file: CodeFile, call: ast.Call) -> bool:
    func = call.func
    if file.names.dotted(func) in _CANVAS_FUNCTIONS:
        file.note(call, Level.BY_HAND, "canvas", f"{ast.unparse(func)}: {_COMPOSED}")
        return False
    if not isinstance(func, ast.Attribute):
        return False
    task = project.task(file, func.value)
    if task is None:
        _note_unknown(file, call, func)
        return False
    if task.kind != "celery":
        return False
    if func.attr in {"delay", "apply_async"} and task.stays is None:
        done = _visit_send(project, file, call, func, task)
        if not done:
            project.keep(task, file, call)
        return done
    if func.attr in _CANVAS:
        code, text = "canvas", f"{ast.unparse(func)}: {_COMPOSED}"
    elif func.attr in {"delay_on_commit", "apply_async_on_commit"}:
        code, text = "on-commit", "defer inside with app.transaction(connection): the task goes with the commit"
    elif func.attr in {"apply", "run", "retry", "AsyncResult", "signature"}:
        code = "task-method"
        text = f"{func.attr} is Celery's: call the function, or raise an exception to have it tried again"
    else:
        return False
    file.note(call, Level.BY_HAND, code, text)
    project.keep(task, file, call)
    return False


def _note_unknown(file: CodeFile, call: ast.Call, func: ast.Attribute) -> None:
    if func.attr == "send_task":
        file.note(
            call, Level.BY_HAND, "send-task", "send_task names a task by a text; import the function, and defer it"
        )
    elif func.attr == "apply_async" or (func.attr == "delay" and _is_imported(file, func.value)):
        made = file.names.value(func.value)
        canvas = made.func if isinstance(made, ast.Call) else None
        if canvas is not None and (
            file.names.dotted(canvas) in _CANVAS_FUNCTIONS or getattr(canvas, "attr", "") in _CANVAS
        ):
            return  # said of the signature
        file.note(
            call, Level.BY_HAND, "unknown-task",
            f"{ast.unparse(func.value)} is no task of these files; give the whole program at once, or write deferred.defer(f, ...)",
        )  # fmt: skip


def _is_imported(file: CodeFile, expr: ast.expr) -> bool:
    """Whether a name comes from another file: there, it may be a task."""
    root = expr
    while isinstance(root, ast.Attribute):
        root = root.value
    found = file.names.look_up(root.id, root) if isinstance(root, ast.Name) else None
    return found is not None and any(each.imported is not None for each in found[1])


def _visit_send(project: Project, file: CodeFile, call: ast.Call, func: ast.Attribute, task: OldTask) -> bool:
    arguments = CallArguments(call)
    own = dict(task.options)
    head = Piece("new", text=ast.unparse(func.value))
    if func.attr == "delay":
        pieces = [head, *(Piece("keep", n) for n in range(len(arguments.all)))]
        finish(project, file, call, func.value, pieces, own, arguments)
        return True
    if arguments.stars or arguments.double or len(arguments.positional) > len(_POSITIONS):
        file.note(
            call,
            Level.BY_HAND,
            "spread-options",
            "apply_async with * or **: write deferred.defer(f, *args, _queue=..., **kwargs)",
        )
        return False
    arguments.keywords.update({_POSITIONS[n]: each for n, each in enumerate(arguments.positional)})
    options = _options(file, arguments, own)
    if options is None:
        return False
    kept = list(spread(arguments.keywords.get("args"), arguments.keywords.get("kwargs")))
    finish(project, file, call, func.value, [head, *ordered(arguments, kept, options)], own, arguments)
    return True


def _options(file: CodeFile, arguments: CallArguments, own: dict[str, str]) -> list[Piece] | None:
    """Return what becomes of the options of ``apply_async``; None if a person must rewrite the call."""
    pieces: list[Piece] = []
    refused = False
    for name, (n, value) in arguments.keywords.items():
        if name in {"args", "kwargs"} or ast.unparse(value) == "None":
            continue
        if name in {"countdown", "eta", "queue", "task_id"}:
            option = "_name" if name == "task_id" else f"_{name}"
            own.pop(option, None)
            pieces.append(Piece("rename", n, option))
            if name == "eta":
                judge_eta(file, value)
            elif name == "queue":
                judge_queue(file, value)
        elif name == "time_limit":
            own.pop("_deadline", None)
            pieces.append(Piece("rename", n, "_deadline"))
        elif name in _CALL_DROPPED:
            file.note(value, Level.NOTE, "option-left-out", f"{name}= is left out: {_CALL_DROPPED[name]}")
        else:
            file.note(
                value,
                Level.BY_HAND,
                "option",
                f"{name}= has no counterpart: {_CALL_BY_HAND.get(name, 'it is not known')}",
            )
            refused = True
    return None if refused else pieces
