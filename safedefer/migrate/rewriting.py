"""A call of another library that becomes one of ``deferred.defer``: what RQ's and Celery's have in common."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Final

from safedefer.migrate.edits import CallArguments, CallEdit, Piece
from safedefer.migrate.notes import Level
from safedefer.migrate.project import CodeFile, OldTask, Project
from safedefer.migrate.sites import judge_call, judge_queue, spelled_out

NO_RETRIES: Final = (
    "{0} runs a failing task once, and safedefer tries it again until it is a dead letter: limit it in queue.yaml "
    "(retry_parameters: task_retry_limit: 0), or with _retry_options, unless it may run twice"
)


#: Stands for the name of safedefer's ``deferred`` in the file of a call.
DEFERRED: Final = "{deferred}"


def ordered(arguments: CallArguments, kept: list[Piece], options: list[Piece]) -> Iterator[Piece]:
    """Give the arguments of the task, then options, as Python wants them: positional ones first."""
    yield from (each for each in kept if each.how in {"keep", "elements", "star"})
    yield from (each for each in options if each.how == "keep")
    yield from (each for each in kept if each.how == "items")
    yield from (each for each in options if each.how != "keep")
    yield from (each for each in kept if each.how == "stars")
    yield from (Piece("keep", n) for n in arguments.double)


def finish(
    project: Project,
    file: CodeFile,
    call: ast.Call,
    func: ast.expr | None,
    pieces: list[Piece],
    options: dict[str, str],
    arguments: CallArguments,
) -> None:
    """Rewrite a call, judge it, and say what its result was."""
    given = {piece.keyword for piece in pieces}
    new = [Piece("new", keyword=name, text=text) for name, text in options.items() if name not in given]
    # Behind keywords, before **.
    at = next(
        (
            n
            for n, piece in enumerate(pieces)
            if piece.how == "stars" or (piece.how == "keep" and piece.at in arguments.double)
        ),
        len(pieces),
    )
    deferred = file.deferred()
    whole = [each._replace(text=each.text.replace(DEFERRED, deferred)) for each in (*pieces[:at], *new, *pieces[at:])]
    file.edits.calls[file.places.span(call)] = CallEdit(f"{deferred}.defer", whole)
    file.unused_imports("rq", "django_rq")
    if "_queue" in options:
        judge_queue(file, ast.copy_location(ast.Constant(ast.literal_eval(options["_queue"])), call))
    used = {piece.at for piece in pieces if piece.how in {"keep", "elements", "items"}}
    args = [value for n, value in arguments.positional if n in used and value is not func]
    kwargs = {
        name: value for name, (n, value) in arguments.keywords.items() if n in used and name not in {"args", "kwargs"}
    }
    args += [value for name, (n, value) in arguments.keywords.items() if n in used and name in {"args", "kwargs"}]
    _note_underscores(project, file, pieces, kwargs, arguments)
    if func is not None:
        judge_call(project, file, call, func, args, kwargs)
    for n in arguments.double:
        file.note(
            arguments.all[n],
            Level.NOTE,
            "double-star",
            "options among these are handed to the callable, not taken as options",
        )
    note_result(file, call)


def _note_underscores(
    project: Project, file: CodeFile, pieces: list[Piece], kwargs: dict[str, ast.expr], arguments: CallArguments
) -> None:
    """Note arguments of the callable that ``defer`` would take for its options."""
    spread = {piece.at for piece in pieces if piece.how == "stars"} | set(arguments.double)
    spreads = (each for n, each in enumerate(arguments.all) if n in spread)
    dicts = [each.value if isinstance(each, ast.keyword) else each for each in spreads]
    own = [(name, file, value) for name, value in kwargs.items()]
    for name, home, value in (*own, *(found for each in dicts for found in spelled_out(project, file, each))):
        if name.startswith("_"):
            home.note(
                value,
                Level.REFUSED,
                "unknown-option",
                f"{name}= begins with _, as options of defer() do; app.options(...).defer takes it",
            )


def note_result(file: CodeFile, call: ast.Call) -> None:
    """Say that a call's result is used, which is another object now."""
    parent = file.names.parents.get(call)
    if isinstance(parent, ast.Expr | ast.Lambda):
        return
    file.note(
        call, Level.NOTE, "result-used",
        "the result is a safedefer.Task (id, name, eta), not a job: it has no result, status or get(); let the task store its outcome",
    )  # fmt: skip


def note_reference(project: Project, file: CodeFile, node: ast.Attribute, task: OldTask) -> None:
    """Note ``f.delay`` that is handed on and not called: ``on_commit(partial(f.delay, 1))``."""
    parent = file.names.parents.get(node)
    if isinstance(parent, ast.Call) and parent.func is node:
        return
    file.note(
        node,
        Level.BY_HAND,
        "handed-on",
        f"{ast.unparse(node)} is handed on; hand lambda: deferred.defer({task.node.name}, ...) on, or use app.transaction(connection)",
    )
    project.keep(task, file, node)
