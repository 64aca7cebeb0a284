"""Call sites of ``defer()``, those that were rewritten included: what of them is refused, and what behaves otherwise."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from safedefer.deferred import OPTION_HINTS, OPTIONS
from safedefer.migrate.edits import CallArguments
from safedefer.migrate.judge import judge_argument, judge_callable, swallowed_by, under_main
from safedefer.migrate.notes import Level
from safedefer.migrate.project import CodeFile, Project
from safedefer.migrate.times import is_naive

_QUEUE_CHARACTERS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.-")
_NAME_CHARACTERS: Final = (_QUEUE_CHARACTERS - {"."}) | {"_"}
_RESERVED: Final = (
    "host",
    "content-type",
    "content-length",
    "connection",
    "x-appengine-",
    "x-cloudtasks-",
    "x-google-",
    "safedefer-",
)
#: Options of other libraries, which ``defer()`` hands to the callable.
FOREIGN: Final = frozenset(
    {
        "job_timeout",
        "result_ttl",
        "failure_ttl",
        "job_id",
        "depends_on",
        "at_front",
        "on_success",
        "on_failure",
        "retry_options",
    }
    | {"apply_async", "countdown", "eta", "queue", "transactional"}
)


def judge_call(
    project: Project,
    file: CodeFile,
    call: ast.Call,
    func: ast.expr,
    args: Iterable[ast.expr],
    kwargs: Mapping[str, ast.expr],
) -> None:
    """Note what is refused of the callable and the arguments of a call, and what hides a refusal."""
    names = file.names
    for each in judge_callable(names, func):
        file.note(func, *each)
    definition = names.definition(func)
    if definition is None and isinstance(func, ast.Name | ast.Attribute):
        for other, named in _elsewhere(project, file, func):
            for each in judge_callable(other.names, named):
                file.note(func, *each)
            definition = other.names.definition(named)
    if (
        definition is not None
        and isinstance(names.scope(definition), ast.Module)
        and definition in names.tree.body
        and under_main(names, call)
    ):
        file.note(
            func, Level.REFUSED, "main-module",
            f"{ast.unparse(func)} is {'a module-level name of __main__ where'} this file runs as a program, which no other process has; "
            "move it to a module that both import",
        )  # fmt: skip
    for value in [*args, *kwargs.values()]:
        for each in judge_argument(names, value):
            file.note(value, *each)
    _judge_parameters(file, definition, kwargs)
    handler = swallowed_by(names, call)
    if handler is not None:
        file.note(
            handler, Level.NOTE, "swallowed",
            f"this except hides that defer() in line {call.lineno} refuses a call: the task would be gone without a word; "
            "catch safedefer.DeferError apart, or let it through",
        )  # fmt: skip


def _elsewhere(project: Project, file: CodeFile, func: ast.expr) -> Iterator[tuple[CodeFile, ast.expr]]:
    """Give the other file that a name leads to, and the name there: that of a definition, or of a method of a class."""
    dotted = project.canonical(file.names.dotted(func))
    home, _, last = dotted.rpartition(".")
    other = project.module(home)
    if other is not None and other is not file:
        yield other, _top_name(other, last)
        return
    home, _, cls = project.canonical(home).rpartition(".")
    other = project.module(home)
    if other is not None and other is not file:
        yield other, ast.Attribute(_top_name(other, cls), last, ast.Load())


def _top_name(file: CodeFile, name: str) -> ast.Name:
    """Return a name as it is read at the top level of a file."""
    found = ast.Name(name, ast.Load())
    file.names.parents[found] = file.names.tree
    return found


def _judge_parameters(file: CodeFile, definition: ast.AST | None, kwargs: Mapping[str, ast.expr]) -> None:
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    own = {each.arg for each in (*definition.args.args, *definition.args.kwonlyargs)}
    for name in sorted((FOREIGN & set(kwargs)) - own):
        file.note(
            kwargs[name], Level.REFUSED if definition.args.kwarg is None else Level.NOTE, "foreign-option",
            f"{name}= is handed to {definition.name}, and is no option of defer(): those begin with _ ({', '.join(OPTIONS)})",
        )  # fmt: skip


def parameters_of(project: Project, file: CodeFile, func: ast.expr) -> frozenset[str]:
    """Return the names of the parameters of a function of the program; none where it is not known."""
    definition = file.names.definition(func)
    if definition is None and isinstance(func, ast.Name | ast.Attribute):
        for other, named in _elsewhere(project, file, func):
            definition = other.names.definition(named)
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef):
        return frozenset()
    return frozenset(each.arg for each in (*definition.args.args, *definition.args.kwonlyargs))


def judge_options(project: Project, file: CodeFile, arguments: CallArguments, own: frozenset[str]) -> None:
    """Note what is refused of the options of ``deferred.defer``, and what they need here; ``own`` are the callable's."""
    given = {name: (home, value) for name, home, value in options_of(project, file, arguments) if name.startswith("_")}
    for name, (home, value) in given.items():
        if name not in OPTIONS:
            if name in own:
                continue
            hint = OPTION_HINTS.get(
                name, f"App Engine's defer() handed it to the callable; those that it takes are {', '.join(OPTIONS)}"
            )
            home.note(value, Level.REFUSED, "unknown-option", f"defer() has no option {name}: {hint}")
        elif name == "_eta":
            judge_eta(home, value, project)
        elif name == "_queue":
            judge_queue(home, value)
        else:
            _judge_option(home, name, value)
    if {"_countdown", "_eta"} <= {name for name, (_, value) in given.items() if ast.unparse(value) != "None"}:
        home, value = given["_eta"]
        home.note(value, Level.REFUSED, "eta", "_countdown and _eta are given together; leave one out")


def options_of(project: Project, file: CodeFile, arguments: CallArguments) -> Iterator[tuple[str, CodeFile, ast.expr]]:
    """Give the keywords of a call, those of dicts behind ``**`` that the code shows too, with the file and the value of each."""
    for name, (_, value) in arguments.keywords.items():
        yield name, file, value
    for n in arguments.double:
        behind = arguments.all[n]
        yield from spelled_out(project, file, behind.value if isinstance(behind, ast.keyword) else behind)


def spelled_out(project: Project, file: CodeFile, expr: ast.expr) -> Iterator[tuple[str, CodeFile, ast.expr]]:
    """Give the names of a dict that the code shows, with the file and the value of each: a literal, or ``dict(...)``."""
    home, made = project.value(file, expr)
    if isinstance(made, ast.Dict):
        pairs = zip(made.keys, made.values, strict=True)
        constants = [(key.value, each) for key, each in pairs if isinstance(key, ast.Constant)]
        yield from ((name, home, each) for name, each in constants if isinstance(name, str))
    elif isinstance(made, ast.Call) and home.names.dotted(made.func) == "builtins.dict":
        yield from ((each.arg, home, each.value) for each in made.keywords if each.arg)


def judge_eta(file: CodeFile, value: ast.expr, project: Project | None = None) -> None:
    """Note a time without a zone, or one of a stored property that has none."""
    home, made = (file, value) if project is None else project.value(file, value)
    stored = frozenset() if project is None else project.naive_properties
    if is_naive(file.names, value) or (home is not file and is_naive(home.names, made)):
        file.note(
            value, Level.REFUSED, "naive-eta",
            f"{ast.unparse(value)} has no time zone, which App Engine took for UTC or local time; write datetime.now(timezone.utc) + "
            "timedelta(...), or use _countdown",
        )  # fmt: skip
    elif is_naive(file.names, value, stored):
        file.note(
            value, Level.NOTE, "naive-eta",
            f"{ast.unparse(value)} is read from a DateTimeProperty, if that of a model here is meant: UTC without a time zone, which is refused; "
            "write .replace(tzinfo=timezone.utc) behind the property",
        )  # fmt: skip


def judge_queue(file: CodeFile, value: ast.expr) -> None:
    """Note the name of a queue that cannot be one."""
    if (
        isinstance(value, ast.Constant)
        and isinstance(value.value, str)
        and not (value.value and set(value.value) <= _QUEUE_CHARACTERS)
    ):
        file.note(
            value,
            Level.REFUSED,
            "queue-name",
            f"{value.value!r} is no name of a queue: letters, digits, . and -; rename it",
        )


def _judge_option(file: CodeFile, name: str, value: ast.expr) -> None:
    constant = value.value if isinstance(value, ast.Constant) else None
    if name == "_transactional" and constant is not False:
        file.note(
            value, Level.NOTE, "transactional",
            "_transactional needs a transaction: inside @ndb.transactional() of google-cloud-ndb it stays as it is; with a SQL "
            "database put the call into with app.transaction(connection):",
        )  # fmt: skip
    elif name == "_target" and isinstance(constant, str):
        file.note(
            value,
            Level.NOTE,
            "target",
            f"the dispatcher must know the address of {constant!r}: SAFEDEFER_TARGETS={constant}=URL, or App(targets={{{constant!r}: URL}})",
        )
    elif name == "_url" and isinstance(constant, str):
        if not constant.startswith("/") or "?" in constant or "#" in constant:
            file.note(
                value, Level.REFUSED, "url", f"{constant!r} is no path without query; pass what it says as arguments"
            )
        else:
            file.note(
                value,
                Level.NOTE,
                "url",
                f"the handler must serve {constant}: app.routes() has the queues' URLs and the default alone",
            )
    elif name == "_headers" and isinstance(value, ast.Dict):
        for key in value.keys:
            text = key.value if isinstance(key, ast.Constant) else ""
            if isinstance(text, str) and text.lower().startswith(_RESERVED):
                file.note(
                    key or value,
                    Level.REFUSED,
                    "headers",
                    f"the header {text} is written by the delivery; leave it out, or use _target",
                )
    elif name == "_name" and isinstance(constant, str) and not (constant and set(constant) <= _NAME_CHARACTERS):
        file.note(value, Level.REFUSED, "task-name", f"{constant!r} is no name of a task: 1 to 500 of A-Z a-z 0-9 _ -")
