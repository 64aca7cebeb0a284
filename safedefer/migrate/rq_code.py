"""RQ in the user's code: ``queue.enqueue`` and its relatives, and functions decorated ``@job``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final, TypeAlias

from safedefer.migrate.edits import CallArguments, Piece, spread
from safedefer.migrate.notes import Level
from safedefer.migrate.project import CodeFile, OldTask, Project
from safedefer.migrate.rewriting import DEFERRED, NO_RETRIES, finish, note_reference, ordered
from safedefer.migrate.sites import judge_eta

_Keywords: TypeAlias = dict[str, tuple[int, ast.expr]]
_QUEUES: Final = frozenset({"rq.Queue", "rq.queue.Queue"})
_GETTERS: Final = frozenset({"django_rq.get_queue", "django_rq.queues.get_queue"})
_FUNCTIONS: Final = frozenset({"django_rq.enqueue", "django_rq.queues.enqueue"})
_DECORATORS: Final = frozenset({"rq.decorators.job", "django_rq.job", "django_rq.decorators.job"})
_RETRY: Final = frozenset({"rq.Retry", "rq.job.Retry"})
_METHODS: Final = frozenset({"enqueue", "enqueue_call", "enqueue_in", "enqueue_at"})
#: Options without counterpart that change nothing of what runs.
_DROPPED: Final = {
    "result_ttl": "results are not kept: the task stores what is needed",
    "failure_ttl": "a task that failed for good is a dead letter until it is deleted: safedefer dead purge --days",
    "ttl": "a task waits for up to 31 days; check the time in the task",
    "description": "tasks are listed by callable and name",
    "at_front": "the queue is in the order of due times; use a queue of its own",
    "job_class": "there are no classes of tasks",
    "connection": "the queue is that of the App",
    "default_result_ttl": "results are not kept",
    "enqueue_at_front_on_retry": "the queue is in the order of due times",
}
#: Options that a person has to replace.
_BY_HAND: Final = {
    "depends_on": "let the first task defer the second at its end",
    "on_success": "defer the next task at the end of this one",
    "on_failure": "observe dead letters: App(observers=[...])",
    "on_stopped": "observe cancellations: App(observers=[...])",
    "meta": "pass what the task reads as arguments; it stores its own progress",
    "pipeline": "use app.defer_many, or one transaction",
    "rate_limit": "limit the queue in queue.yaml: rate, max_concurrent_requests",
    "repeat": "let the task defer itself again, with _countdown",
    "unique": "use app.options(unique=True).defer(...)",
    "webhooks": "observe the ends of tasks: App(observers=[...])",
}
#: What ``enqueue``, ``enqueue_in`` and ``enqueue_at`` take as options; any other keyword is the callable's.
_TAKEN: Final = frozenset(
    {"job_timeout", "job_id", "retry", "description", "result_ttl", "ttl", "failure_ttl", "at_front", *_BY_HAND}
)
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def collect(project: Project) -> None:
    """Find the functions that ``@job`` made tasks."""
    for file in project.files:
        for node in ast.walk(file.names.tree):
            for decorator in getattr(node, "decorator_list", ()):
                func = decorator.func if isinstance(decorator, ast.Call) else decorator
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and file.names.dotted(func) in _DECORATORS:
                    task = OldTask(file, node, decorator, "rq", *_decorated(project, file, node, decorator))
                    project.tasks[f"{file.names.module}.{node.name}"] = task


def _decorated(
    project: Project, file: CodeFile, node: ast.AST, decorator: ast.expr
) -> tuple[dict[str, str], str | None]:
    """Return the options that ``@job(...)`` stands for, and why it stays if it does."""
    options: dict[str, str] = {}
    if not isinstance(file.names.scope(node), ast.Module):
        return options, "it is no function at the top level of a module"
    if not isinstance(decorator, ast.Call):
        return options, None
    arguments = CallArguments(decorator)
    queue = arguments.value("queue") or next((value for _, value in arguments.positional), None)
    if queue is not None:
        name = _queue_name(project, file, queue)
        if name is None:
            return options, f"the name of its queue is not seen: {ast.unparse(queue)}"
        options |= {} if name == "'default'" else {"_queue": name}
    return options, next(filter(None, (_job_option(file, options, *each) for each in arguments.keywords.items())), None)


def _job_option(file: CodeFile, options: dict[str, str], keyword: str, found: tuple[int, ast.expr]) -> str | None:
    """Take an option of ``@job(...)``, or return why the decorator stays."""
    value = found[1]
    if keyword in {"timeout", "job_timeout"}:
        seconds = _seconds(file.names.value(value))
        if seconds is None:
            file.note(
                value,
                Level.NOTE,
                "timeout",
                f"{keyword}={ast.unparse(value)} is left out: a deadline is 1 to 86,400 seconds",
            )
        else:
            options["_deadline"] = seconds
    elif keyword in _BY_HAND:
        return f"{keyword}= has no counterpart: {_BY_HAND[keyword]}"
    elif keyword == "retry":
        text = retry_options(file, value)
        if any(isinstance(each, ast.Name) for each in ast.walk(ast.parse(text.replace(DEFERRED, "0")))):
            return "retry= is not written out in numbers"
        options |= {"_retry_options": text} if text else {}
    elif keyword in _DROPPED:
        file.note(value, Level.NOTE, "option-left-out", f"{keyword}= is left out: {_DROPPED[keyword]}")
    elif keyword != "queue":
        return f"{keyword}= is not known"
    return None


_CURRENT: Final = frozenset({"rq.get_current_job", "rq.job.get_current_job"})


def visit(project: Project, file: CodeFile) -> None:
    """Decide what becomes of a file."""
    rewritten = 0
    for task in project.tasks.values():
        if task.file is file and task.kind == "rq":
            if task.stays is None:
                file.edits.decorators.add(file.places.span(task.decorator))
                file.unused_imports("rq", "django_rq")
                rewritten += 1
            else:
                file.note(
                    task.decorator,
                    Level.BY_HAND,
                    "decorator",
                    f"@job of {task.node.name} stays, and calls of it: {task.stays}",
                )
    for node in ast.walk(file.names.tree):
        if isinstance(node, ast.Call):
            rewritten += _visit_call(project, file, node)
        elif isinstance(node, ast.Attribute) and node.attr == "delay":
            sent = project.task(file, node.value)
            if sent is not None and sent.kind == "rq":
                note_reference(project, file, node, sent)
    if rewritten:
        file.note(file.names.tree, Level.NOTE, "retries", NO_RETRIES.format("RQ"))


def _visit_call(project: Project, file: CodeFile, call: ast.Call) -> bool:
    func = call.func
    if file.names.dotted(func) in _CURRENT:
        file.note(
            call, Level.BY_HAND, "current-job", "get_current_job() is None in a task of safedefer; write safedefer.current_task()"
        )  # fmt: skip
        return False
    if file.names.dotted(func) in _QUEUES | _GETTERS:
        _note_sync(file, call)
        return False
    if file.names.dotted(func) in _FUNCTIONS:
        return _visit_enqueue(project, file, call, "enqueue", {})
    if not isinstance(func, ast.Attribute):
        return False
    if func.attr == "delay":
        task = project.task(file, func.value)
        return task is not None and task.kind == "rq" and _visit_delay(project, file, call, task)
    if func.attr not in _METHODS and func.attr != "enqueue_many":
        return False
    options = queue_options(project, file, func.value)
    if options is None:
        if _imports(file, "rq", "django_rq", "flask_rq2", "flask_rq") or re.search(
            r"queue|(^|\.|_)q\b", ast.unparse(func.value)
        ):
            file.note(
                call, Level.BY_HAND, "unknown-queue",
                f"{ast.unparse(func)} looks like RQ's, but its queue is not made in these files; write deferred.defer(f, ..., _queue=...)",
            )  # fmt: skip
        return False
    if func.attr == "enqueue_many":
        file.note(call, Level.BY_HAND, "enqueue-many", "enqueue_many has a counterpart of another form: app.defer_many")
        return False
    return _visit_enqueue(project, file, call, func.attr, options)


def _note_sync(file: CodeFile, made: ast.Call) -> None:
    """Note a queue whose jobs run where they are enqueued."""
    value = CallArguments(made).value("is_async")
    if value is not None and not (isinstance(value, ast.Constant) and value.value):
        file.note(
            value, Level.NOTE, "not-async",
            "is_async=False has RQ run jobs at once, and defer() stores them; in tests write TestApp(..., inline=True)",
        )  # fmt: skip


def _imports(file: CodeFile, *modules: str) -> bool:
    return any(
        (each.imported or "").partition(".")[0] in modules
        for scope in file.names.bindings.values() for bindings in scope.values() for each in bindings
    )  # fmt: skip


def queue_options(project: Project, file: CodeFile, expr: ast.expr) -> dict[str, str] | None:
    """Return the options that a queue of RQ stands for; None if the expression is none that is seen."""
    home, made = project.value(file, expr)
    if not isinstance(made, ast.Call) or home.names.dotted(made.func) not in _QUEUES | _GETTERS:
        return None
    arguments = CallArguments(made)
    name = arguments.value("name") or next((value for _, value in arguments.positional), None)
    options: dict[str, str] = {}
    if name is not None:
        found = _queue_name(project, home, name)
        if found is None:
            return None
        options |= {} if found == "'default'" else {"_queue": found}
    timeout = arguments.value("default_timeout")
    seconds = None if timeout is None else _seconds(home.names.value(timeout))
    return options if seconds is None else {**options, "_deadline": seconds}


def _queue_name(project: Project, file: CodeFile, expr: ast.expr) -> str | None:
    """Return the source of a queue's name: a text, or the queue whose name is meant."""
    home, value = project.value(file, expr)
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return repr(value.value)
    options = queue_options(project, home, value) if isinstance(value, ast.Call) else None
    return None if options is None else options.get("_queue", "'default'")


def _number(expr: ast.expr) -> object:
    """Return the value of a constant, or of a product of numbers: ``60 * 60``."""
    if isinstance(expr, ast.BinOp) and isinstance(expr.op, ast.Mult):
        left, right = _number(expr.left), _number(expr.right)
        return left * right if isinstance(left, int | float) and isinstance(right, int | float) else None
    if isinstance(expr, ast.UnaryOp) and isinstance(expr.op, ast.USub):
        value = _number(expr.operand)
        return -value if isinstance(value, int | float) else None
    return expr.value if isinstance(expr, ast.Constant) else None


def _seconds(expr: ast.expr) -> str | None:
    """Return the source of a length of time in seconds: RQ takes numbers, and texts such as ``1h``."""
    value = _number(expr)
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)([smhd]?)", value.lower())):
        value = int(match[1]) * _UNITS.get(match[2], 1)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value) if 1 <= value <= 86_400 else None  # noqa: PLR2004  # options.MAX_DEADLINE
    return None


def _visit_delay(project: Project, file: CodeFile, call: ast.Call, task: OldTask) -> bool:
    assert isinstance(call.func, ast.Attribute)
    if task.stays is not None:
        return False
    arguments = CallArguments(call)
    func = call.func.value
    pieces = [Piece("new", text=ast.unparse(func)), *(Piece("keep", n) for n in range(len(arguments.all)))]
    finish(project, file, call, func, pieces, task.options, arguments)
    return True


def _visit_enqueue(project: Project, file: CodeFile, call: ast.Call, method: str, options: dict[str, str]) -> bool:
    """Rewrite ``enqueue``, ``enqueue_call``, ``enqueue_in`` and ``enqueue_at``."""
    arguments = CallArguments(call)
    positional = list(arguments.positional)
    when = positional.pop(0) if method in {"enqueue_in", "enqueue_at"} and positional else None
    func = arguments.keywords.get("func" if method == "enqueue_call" else "f") or (
        positional.pop(0) if positional else None
    )
    if func is None or isinstance(func[1], ast.Starred) or (when is not None and isinstance(when[1], ast.Starred)):
        file.note(
            call,
            Level.BY_HAND,
            "unknown-callable",
            f"the callable of {method} is not seen; write deferred.defer(f, ...)",
        )
        return False
    if method == "enqueue_call":
        extra = {"args": positional[0]} if positional else {}
        extra |= {"kwargs": positional[1]} if len(positional) > 1 else {}
        if len(positional) > 2:  # noqa: PLR2004  # args and kwargs
            file.note(call, Level.BY_HAND, "positional-options", "enqueue_call with options by their place; name them")
            return False
        arguments.keywords.update(extra)
        positional = []
    callee = _callee(project, file, func[1])
    own = dict(options)
    given = {
        name: each for name, each in arguments.keywords.items() if each is not func and name not in {"args", "kwargs"}
    }
    taken = _TAKEN if method != "enqueue_call" else given.keys()
    pieces = _options(file, {name: each for name, each in given.items() if name in taken}, own)
    others = _handed_on(file, {name: each for name, each in given.items() if name not in taken})
    if callee is None or pieces is None or others is None:
        return False
    pieces += others
    kept = [Piece("keep", n) for n, _ in positional]
    if "args" in arguments.keywords or "kwargs" in arguments.keywords:
        kept += spread(arguments.keywords.get("args"), arguments.keywords.get("kwargs"))
    head = Piece("new", text=callee) if callee else Piece("positional" if func[0] >= 0 else "keep", func[0])
    timing = _when(file, when)
    finish(
        project,
        file,
        call,
        func[1] if not callee else None,
        [head, *ordered(arguments, kept, pieces), *timing],
        own,
        arguments,
    )
    return True


def _when(file: CodeFile, when: tuple[int, ast.expr] | None) -> list[Piece]:
    """Return the option of ``enqueue_in`` or ``enqueue_at``: the first takes a timedelta, and the second a datetime."""
    if when is None:
        return []
    value = file.names.value(when[1])
    parent = file.names.parents[when[1]]
    method = parent.func.attr if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Attribute) else ""
    if method == "enqueue_at":
        judge_eta(file, value)
        return [Piece("rename", when[0], "_eta")]
    plain = isinstance(value, ast.Call) and not value.args and [k.arg for k in value.keywords] == ["seconds"]
    if plain and value is when[1] and file.names.dotted(value.func) == "datetime.timedelta":  # type: ignore[attr-defined]  # a call, by `plain`
        return [Piece("new", keyword="_countdown", text=ast.unparse(value.keywords[0].value))]  # type: ignore[attr-defined]  # as above
    return [Piece("seconds", when[0], "_countdown")]


def _callee(project: Project, file: CodeFile, func: ast.expr) -> str | None:
    """Return the source of a callable that RQ is told by its dotted name; empty if it is told itself; None if neither is seen."""
    value = file.names.value(func)
    if isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.BinOp | ast.Call) and isinstance(func, ast.JoinedStr | ast.BinOp)
    ):
        file.note(
            func,
            Level.BY_HAND,
            "dynamic-callable",
            f"{ast.unparse(func)} is known when it runs; choose from a dict of functions",
        )
        return None
    if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        return ""
    name = value.value
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        file.note(func, Level.BY_HAND, "dynamic-callable", f"{name!r} is no dotted name of a function")
        return None
    module, _, last = name.rpartition(".")
    if module.rpartition(".")[2][:1].isupper():
        file.note(
            func, Level.BY_HAND, "dotted-method", f"{name!r} names a method of a class; defer a function that calls it"
        )
        return None
    home = project.module(module)
    if home is file:
        return last
    file.edits.need(f"import {module}")
    return name


def _handed_on(file: CodeFile, given: _Keywords) -> list[Piece] | None:
    """Return the keywords of an ``enqueue`` that are the callable's; None if a person must rewrite the call."""
    if "timeout" in given:
        file.note(
            given["timeout"][1], Level.BY_HAND, "option",
            "timeout= is the function's since RQ 1.0, and was job_timeout= before; pass it on, or write _deadline=",
        )  # fmt: skip
        return None
    return [Piece("keep", n) for n, _ in given.values()]


def _options(file: CodeFile, given: _Keywords, own: dict[str, str]) -> list[Piece] | None:
    """Return what becomes of the options of an ``enqueue``; None if a person must rewrite the call."""
    pieces: list[Piece] = []
    refused = False
    for name, (n, value) in given.items():
        if name in _BY_HAND and ast.unparse(value) != "None":
            file.note(value, Level.BY_HAND, "option", f"{name}= has no counterpart: {_BY_HAND[name]}")
            refused = True
        elif name in _DROPPED or name in _BY_HAND:
            file.note(
                value, Level.NOTE, "option-left-out", f"{name}= is left out: {_DROPPED.get(name, 'it says nothing')}"
            )
        elif name in {"job_timeout", "timeout"}:
            own.pop("_deadline", None)
            pieces += _timeout(file, name, n, value)
        elif name == "job_id":
            pieces.append(Piece("rename", n, "_name"))
            file.note(
                value, Level.NOTE, "job-id", "a name is not free again for days after its task ended, and a second task of it is refused "
                "(TaskAlreadyExistsError, TombstonedTaskError); RQ replaced the job",
            )  # fmt: skip
        elif name == "retry":
            text = retry_options(file, value)
            if text:
                pieces.append(Piece("new", keyword="_retry_options", text=text))
        else:
            pieces.append(Piece("keep", n))
    return None if refused else pieces


def _timeout(file: CodeFile, name: str, n: int, value: ast.expr) -> Iterator[Piece]:
    known = file.names.value(value)
    seconds = _seconds(known)
    if isinstance(known, ast.Constant) and isinstance(known.value, str) and seconds is not None:
        yield Piece("new", keyword="_deadline", text=seconds)
    elif seconds is not None or _number(known) is None:
        yield Piece("rename", n, "_deadline")
    else:
        file.note(
            value, Level.NOTE, "timeout", f"{name}={ast.unparse(value)} is left out: a deadline is 1 to 86,400 seconds"
        )


def retry_options(file: CodeFile, value: ast.expr) -> str:
    """Return the source of the retry options that ``Retry(max=..., interval=...)`` stands for; empty if it is not seen."""
    made = file.names.value(value)
    if not isinstance(made, ast.Call) or file.names.dotted(made.func) not in _RETRY:
        if ast.unparse(value) != "None":
            file.note(
                value,
                Level.BY_HAND,
                "retry",
                f"retry={ast.unparse(value)} is left out; write _retry_options=deferred.TaskRetryOptions(...)",
            )
        return ""
    arguments = CallArguments(made)
    most = arguments.value("max") or next((each for _, each in arguments.positional), None)
    interval = arguments.value("interval")
    parts = [] if most is None else [f"task_retry_limit={ast.unparse(most)}"]
    if isinstance(interval, ast.Constant) and isinstance(interval.value, int) and interval.value:
        parts += [f"min_backoff_seconds={interval.value}", f"max_backoff_seconds={interval.value}"]
    elif interval is not None and ast.unparse(interval) != "0":
        file.note(
            interval,
            Level.NOTE,
            "retry",
            f"interval={ast.unparse(interval)} is left out: the wait doubles from min_backoff_seconds on",
        )
    file.unused_imports("rq", "django_rq")
    return f"{DEFERRED}.TaskRetryOptions({', '.join(parts)})"
