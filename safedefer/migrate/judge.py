"""What ``defer()`` refuses, as far as the code says: callables, arguments, and options of a call site.

Only what is certain or nearly so is said: a name whose definition is not seen is not judged. ``safedefer explain`` judges the
running code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from safedefer.migrate.names import Function, Names
from safedefer.migrate.notes import Level


class Judgement(NamedTuple):
    """What is said of an expression."""

    level: Level
    code: str
    text: str


_MOVE: Final = "move it to the top level of a module"
_PARTIALS: Final = frozenset({"functools.partial", "functools.partialmethod"})
_METHODS_WITHOUT_OBJECT: Final = "defer a method of an object (obj.method), or a function"
_REQUEST_BASES: Final = re.compile(
    r"(^|\.)(RequestHandler|BaseHandler|MethodView|View|APIView|BlobstoreUploadHandler|InboundMailHandler)$"
)
_MAKES: Final = {
    "builtins.open": ("open-file", "an open file", "pass its path, and open it in the task"),
    "io.open": ("open-file", "an open file", "pass its path, and open it in the task"),
    "io.StringIO": ("open-file", "a file in memory", "pass its text"),
    "tempfile.NamedTemporaryFile": ("open-file", "an open file", "pass its path, and open it in the task"),
    "tempfile.TemporaryFile": ("open-file", "an open file", "pass its contents"),
    "sqlite3.connect": ("db-handle", "a database connection", "open it in the task"),
    "psycopg.connect": ("db-handle", "a database connection", "open it in the task"),
    "psycopg2.connect": ("db-handle", "a database connection", "open it in the task"),
    "MySQLdb.connect": ("db-handle", "a database connection", "open it in the task"),
    "pymysql.connect": ("db-handle", "a database connection", "open it in the task"),
    "redis.Redis": ("db-handle", "a connection", "open it in the task"),
    "redis.StrictRedis": ("db-handle", "a connection", "open it in the task"),
    "redis.from_url": ("db-handle", "a connection", "open it in the task"),
    "pymongo.MongoClient": ("db-handle", "a connection", "open it in the task"),
    "sqlalchemy.create_engine": ("db-handle", "an engine of a database", "make it in the task"),
    "sqlalchemy.orm.Session": ("db-handle", "a database session", "open it in the task"),
    "requests.Session": ("db-handle", "a session with open connections", "open it in the task"),
    "requests.get": ("response", "a response", "pass what the task needs of it"),
    "requests.post": ("response", "a response", "pass what the task needs of it"),
    "urllib.request.urlopen": ("response", "a response", "pass what the task needs of it"),
    "threading.Lock": ("lock", "a lock", "a task runs in another process: use the database, or app.once"),
    "threading.RLock": ("lock", "a lock", "a task runs in another process: use the database, or app.once"),
    "threading.Event": ("lock", "an event", "a task runs in another process"),
    "threading.Thread": ("lock", "a thread", "a task runs in another process"),
    "socket.socket": ("open-file", "a socket", "open it in the task"),
    "logging.getLogger": ("logger", "a logger", "get it in the task"),
    "builtins.iter": ("iterator", "an iterator", "pass a list"),
    "builtins.map": ("iterator", "an iterator", "pass a list"),
    "builtins.filter": ("iterator", "an iterator", "pass a list"),
    "builtins.zip": ("iterator", "an iterator", "pass a list"),
    "builtins.reversed": ("iterator", "an iterator", "pass a list"),
    "builtins.enumerate": ("iterator", "an iterator", "pass a list"),
    "google.appengine.ext.db.Key": ("db-key", "a key of db", "pass str(key), and make it again in the task: db.Key(text)"),
    "google.appengine.ext.db.Key.from_path": ("db-key", "a key of db", "pass str(key), and make it again in the task: db.Key(text)"),
    "google.appengine.api.users.get_current_user": ("user", "App Engine's User object", "pass user.user_id() or user.email()"),
}  # fmt: skip
_REQUESTS: Final = frozenset(
    {"flask.request", "bottle.request", "webapp2.get_request", "pyramid.threadlocal.get_current_request"}
)
_VIEWS: Final = frozenset({"keys", "values", "items"})
_QUERY: Final = re.compile(r"\.objects\.(all|filter|exclude|order_by)\b|\.query\b.*\.(all|filter)\b")


# --- The callable ---------------------------------------------------------------------------------


def judge_callable(names: Names, expr: ast.expr) -> Iterator[Judgement]:
    """Say why a callable is refused, if the file shows it."""
    if isinstance(expr, ast.Lambda):
        yield _refused(
            "lambda", "a lambda cannot be found by name", "write it as a function at the top level of a module"
        )
        return
    if isinstance(expr, ast.Constant):
        yield _refused("not-callable", f"{expr.value!r} is no callable", "pass the function itself")
        return
    value = names.value(expr)
    if isinstance(value, ast.Call) and names.dotted(value.func) in _PARTIALS:
        yield _refused("partial", "functools.partial objects are not carried", "pass the arguments to defer() instead")
        return
    if isinstance(expr, ast.Call) and isinstance(names.definition(expr.func), ast.FunctionDef | ast.AsyncFunctionDef):
        yield Judgement(
            Level.NOTE,
            "called-at-once",
            f"{ast.unparse(expr)} is called here, and its result is deferred; is the call meant?",
        )
        return
    found = names.definition(expr)
    if isinstance(found, ast.Lambda):
        yield _refused("lambda", "a lambda cannot be found by name, whatever it is assigned to", "write it with def")
    elif isinstance(found, ast.ClassDef):
        yield from _judge_class(names, found)
    elif found is not None:
        yield from _judge_function(names, expr, found)
    yield from _judge_owner(names, expr)


def _judge_function(names: Names, expr: ast.expr, found: ast.AST) -> Iterator[Judgement]:
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    home = names.scope(found)
    decorators = {names.dotted(each) or "" for each in found.decorator_list}
    if "builtins.staticmethod" in decorators:
        yield _refused(
            "static-method", f"{found.name} is a static method", "make it a function at the top level of a module"
        )
    elif isinstance(home, ast.ClassDef):
        if _in_function(names, home):
            yield _refused("nested-class", f"{home.name} is defined inside a function", _MOVE)
        elif isinstance(names.scope(home), ast.ClassDef):
            yield _refused("nested-class", f"{home.name} is a nested class", _MOVE)
        elif "builtins.property" in decorators:
            yield _refused("not-callable", f"{found.name} is a property", "pass what is to be called")
        elif _through_class(names, expr) and "builtins.classmethod" not in decorators:
            yield _refused("unbound-method", f"{found.name} is a method without its object", _METHODS_WITHOUT_OBJECT)
    elif not isinstance(home, ast.Module):
        yield _refused("nested-function", f"{found.name} is nested, and cannot be found by name", _MOVE)
    if found.name.startswith("__") and found.name.endswith("__"):
        yield _refused("dunder", f"{found.name} is a special function", "give it another name")
    if _yields(names, found):
        yield _refused(
            "generator",
            f"{found.name} is a generator function: calling it runs nothing",
            "defer a function that exhausts it",
        )
    yield from _judge_decorators(names, found)


def _judge_decorators(names: Names, found: Function) -> Iterator[Judgement]:
    for each in found.decorator_list:
        decorator = names.definition(each.func if isinstance(each, ast.Call) else each)
        if isinstance(decorator, ast.FunctionDef) and _wraps_without_name(decorator):
            yield _refused(
                "not-found",
                f"{found.name} is decorated by {decorator.name}, whose inner function keeps its own name",
                "decorate the inner function with functools.wraps",
            )


def _wraps_without_name(decorator: ast.FunctionDef) -> bool:
    """Whether a decorator returns a nested function of its own that nothing gives the name of the decorated one."""
    text = ast.unparse(decorator)
    if "wraps" in text or "__name__" in text or "update_wrapper" in text or "decorator" in text.partition("\n")[2]:
        return False
    inner = {each.name for each in decorator.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}
    return any(
        isinstance(each, ast.Return) and isinstance(each.value, ast.Name) and each.value.id in inner
        for each in decorator.body
    )


def _judge_class(names: Names, found: ast.ClassDef) -> Iterator[Judgement]:
    home = names.scope(found)
    if isinstance(home, ast.ClassDef):
        yield _refused("nested-class", f"{found.name} is a nested class", _MOVE)
    elif not isinstance(home, ast.Module):
        yield _refused("nested-class", f"{found.name} is defined inside a function", _MOVE)
    for each in found.keywords:
        name = names.dotted(each.value) if each.arg == "metaclass" else None
        if name not in {None, "abc.ABCMeta", "enum.EnumMeta", "enum.EnumType", "builtins.type"}:
            yield Judgement(
                Level.NOTE, "metaclass",
                f"{found.name} has the metaclass {name}: if that defines __call__, __getattribute__, __eq__ or the like, defer() refuses "
                "the class until Policy(metaclasses=[...]) names it; safedefer explain says it",
            )  # fmt: skip


def _judge_owner(names: Names, expr: ast.expr) -> Iterator[Judgement]:
    """Judge the object of a method, which travels with the task."""
    if not isinstance(expr, ast.Attribute):
        return
    owner = expr.value
    if isinstance(owner, ast.Name) and owner.id == "self":
        cls = names.enclosing_class(expr)
        bases = [] if cls is None else [ast.unparse(base) for base in cls.bases]
        if any(map(_REQUEST_BASES.search, bases)):
            yield _refused(
                "request", f"{ast.unparse(expr)} is a method of a request handler, which holds the request",
                "write it as a function of what it needs",
            )  # fmt: skip
    elif isinstance(owner, ast.Call) and names.dotted(owner.func) == "builtins.super":
        yield _refused(
            "overridden",
            "a method through super() is found again as that of the object's own class",
            "defer self.method",
        )
    else:
        yield from (each for each in judge_argument(names, owner) if each.level is Level.REFUSED)


def _yields(names: Names, found: Function) -> bool:
    return any(isinstance(node, ast.Yield | ast.YieldFrom) and names.scope(node) is found for node in ast.walk(found))


def _in_function(names: Names, node: ast.AST) -> bool:
    return any(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in names.enclosing(node))


def _through_class(names: Names, expr: ast.expr) -> bool:
    return isinstance(expr, ast.Attribute) and isinstance(names.definition(expr.value), ast.ClassDef) and (
        not isinstance(expr.value, ast.Name) or expr.value.id != "self"
    )  # fmt: skip


# --- CallArguments ------------------------------------------------------------------------------------


def judge_argument(names: Names, expr: ast.expr) -> Iterator[Judgement]:
    """Say why an argument is refused, if the file shows it."""
    if isinstance(expr, ast.List | ast.Tuple | ast.Set | ast.Dict):
        for each in expr.values if isinstance(expr, ast.Dict) else expr.elts:
            yield from judge_argument(names, each)
        return
    if not isinstance(expr, ast.Starred):
        yield from _judge_value(names, expr)


def _judge_value(names: Names, expr: ast.expr) -> Iterator[Judgement]:
    shown = ast.unparse(expr)
    if _is_request(names, expr):
        yield _refused("request", f"{shown} is a request", "pass what the task needs of it")
        return
    value = names.value(expr)
    if isinstance(value, ast.Lambda):
        yield _refused("lambda", f"{shown} is a lambda", "pass a function at the top level of a module")
    elif isinstance(value, ast.GeneratorExp):
        yield _refused("iterator", f"{shown} is a generator", "pass a list")
    elif isinstance(value, ast.Call):
        yield from _judge_made(names, shown, value)
    elif isinstance(names.definition(expr), ast.FunctionDef) and not isinstance(
        names.scope(_found(names, expr)), ast.Module | ast.ClassDef
    ):
        yield _refused("nested-function", f"{shown} is a nested function", _MOVE)


def _found(names: Names, expr: ast.expr) -> ast.AST:
    found = names.definition(expr)
    assert found is not None
    return found


def _judge_made(names: Names, shown: str, value: ast.Call) -> Iterator[Judgement]:
    made = names.dotted(value.func) or ""
    known = _MAKES.get(made)
    if known is not None:
        code, what, remedy = known
        yield _refused(code, f"{shown} is {what}", remedy)
    elif made in _PARTIALS:
        yield _refused("partial", f"{shown} is a functools.partial", "pass the function and its arguments")
    elif isinstance(value.func, ast.Attribute) and value.func.attr in _VIEWS and not value.args and not value.keywords:
        yield Judgement(
            Level.NOTE, "view", f"{shown} is a view if it is of a dict, and is refused: write list({shown})"
        )
    elif isinstance(value.func, ast.Attribute) and value.func.attr == "cursor" and not value.args:
        yield Judgement(
            Level.NOTE, "db-handle", f"{shown} may be a database cursor, which is refused: open it in the task"
        )
    elif _QUERY.search(ast.unparse(value)):
        yield Judgement(
            Level.NOTE, "query", f"{shown} looks like a query, which is refused: pass keys, or list(...) of values"
        )


def _is_request(names: Names, expr: ast.expr) -> bool:
    if names.dotted(expr) in _REQUESTS:
        return True
    if isinstance(expr, ast.Name) and expr.id in {"request", "req"}:
        found = names.look_up(expr.id, expr)
        return found is not None and all(isinstance(each.node, ast.arg) for each in found[1])
    owner = expr.value if isinstance(expr, ast.Attribute) else None
    return (
        isinstance(expr, ast.Attribute)
        and expr.attr in {"request", "response"}
        and isinstance(owner, ast.Name)
        and owner.id == "self"
    )


# --- Around the call ------------------------------------------------------------------------------

_WIDE: Final = frozenset({"builtins.Exception", "builtins.BaseException", "builtins.TypeError", "builtins.ValueError"})


def swallowed_by(names: Names, call: ast.Call) -> ast.ExceptHandler | None:
    """Return the handler around a call that would hide a refusal: it catches everything and raises nothing."""
    below: ast.AST = call
    for each in names.enclosing(call):
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return None
        if isinstance(each, ast.Try) and below in each.body:
            for handler in each.handlers:
                types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
                wide = any(kind is None or names.dotted(kind) in _WIDE for kind in types)
                if wide and not any(isinstance(node, ast.Raise) for node in ast.walk(handler)):
                    return handler
        below = each
    return None


def under_main(names: Names, node: ast.AST) -> bool:
    """Whether a node stands in ``if __name__ == "__main__":``, or in a function of the file that is called there."""
    if any(map(_is_main, names.enclosing(node))):
        return True
    function = next((f for f in names.enclosing(node) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)), None)
    if function is None:
        return False
    return any(
        isinstance(each, ast.Call) and names.definition(each.func) is function
        for block in names.tree.body if _is_main(block) for each in ast.walk(block)
    )  # fmt: skip


def _is_main(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return isinstance(test, ast.Compare) and {"'__main__'", "__name__"} <= {
        ast.unparse(e) for e in (test.left, *test.comparators)
    }


def _refused(code: str, problem: str, remedy: str) -> Judgement:
    return Judgement(Level.REFUSED, code, f"{problem}; {remedy}")
