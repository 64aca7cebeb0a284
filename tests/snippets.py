"""Runs the Python of README.md and docs/, as it stands; prints what fails, as JSON.

A program of its own, in an empty folder: examples register types, write modules and configure applications. A fence whose
first line is ``# shop/tasks.py`` is that file; ``>>>`` lines of a console raise what stands below them. After
``<!-- snippet: not run -->`` a fence is compiled, and its names are looked for.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import dis
import importlib
import inspect
import json
import os
import re
import sys
import types
from pathlib import Path

from aiohttp import web

ROOT = Path(__file__).absolute().parents[1]
#: Run with real databases by ``tests/postgres/test_docs.py``, by pytest and Django in ``tests/testing/test_howto.py``, and with
#: real servers in ``tests/frameworks``.
ELSEWHERE = {
    "docs/how-to/transactions.md",
    "docs/how-to/test-your-tasks.md",
    *(f"docs/how-to/{name}.md" for name in ("aiohttp", "fastapi", "flask", "django")),
}
FENCE = re.compile(
    r"^(?P<mark><!-- snippet: not run -->\n+)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
SHOP = {
    "shop/__init__.py": "",
    "shop/jobs/__init__.py": "",
    "shop/tasks.py": "import safedefer\n\napp = safedefer.App.from_settings()\n\ndef send_receipt(order_id, *, copy_to=None): ...\n\n\ndef rebuild_index(shop_id): ...\n"
    "def do_something_later(key, amount): ...\n",
    "shop/checkout.py": "",
    "shop/models.py": "class Order: ...\n",
}


def fences(*kinds):
    """Yield page, mark and text of each fence of these kinds."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        page = str(path.relative_to(ROOT))
        for found in FENCE.finditer(path.read_text()):
            if found["kind"] in kinds:
                yield page, found["mark"] is not None, found["text"]


def write(name, text):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def given():
    """Return what the pages take for granted."""
    import contextlib
    import zlib

    import safedefer

    keyring = safedefer.Keyring.from_text(os.environ["SAFEDEFER_KEYS"])
    policy = safedefer.Policy("shop.tasks")
    app = safedefer.App(keyring=keyring, policy=policy, queue="memory://", environment="test")
    tasks = importlib.import_module("shop.tasks")
    safedefer.configure(safedefer.App.from_settings())  # a page may have configured another one
    return {
        "safedefer": safedefer, "App": safedefer.App, "Keyring": safedefer.Keyring, "Policy": safedefer.Policy,
        "deferred": safedefer.deferred, "os": os, "contextlib": contextlib, "zlib": zlib,
        "keyring": keyring, "policy": policy, "app": app, "web_app": web.Application(),
        "headers": {"Content-Type": "application/jose"}, "body": app.serialize(tasks.send_receipt, 42),
        "send_receipt": tasks.send_receipt, "rebuild_index": tasks.rebuild_index, "do_something_later": tasks.do_something_later,
        "shop_id": 1, "my_key": 1, "order": types.SimpleNamespace(id=1, pk=1, customer_id=1), "Order": object,
        "tasks_app": web.Application(),
    }  # fmt: skip


def globals_of(code):
    """Yield the global names that code uses, and those of the functions in it."""
    for step in dis.get_instructions(code):
        if step.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from globals_of(constant)


def stored(code):
    return {step.argval for step in dis.get_instructions(code) if step.opname in {"STORE_NAME", "STORE_GLOBAL"}}


def run(page, text, names, *, runs=True):
    code = compile(text, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if runs:
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, names))
        else:
            exec(code, names)
    unknown = (
        set(globals_of(code))
        - set(names)
        - stored(code)
        - set(dir(builtins))
        - {"__name__", "__module__", "__qualname__"}
    )
    if unknown:
        raise NameError(f"unknown: {sorted(unknown)}")


def console(page, text, names):
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith(">>> "):
            continue
        expected = re.match(r"([\w.]+): (.*?)(?:, \.\.\.)?$", below)
        try:
            run(page, line[4:], names)
        except Exception as error:
            name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
            if expected is None or (name, str(error)[: len(expected[2])]) != expected.groups():
                raise
        else:
            if expected is not None:
                raise AssertionError(f"{line} raises nothing")


def main():
    failures, pages = [], {}
    sys.path.insert(0, str(Path.cwd()))
    for name, text in SHOP.items():
        write(name, text)
    for page, not_run, text in fences("python", "console"):
        if page in ELSEWHERE:
            continue
        if page not in pages:
            pages[page] = given()
        pages[page]["web_app"] = web.Application()
        try:
            if text.startswith("# ") and (file := re.match(r"# ([\w/]+)\.py\n", text)):
                write(f"{file[1]}.py", text if "/" not in file[1] else text + SHOP[f"{file[1]}.py"].split("\n\n\n")[1])
                run(page, text, dict(pages[page]))
            elif "\n>>> " in f"\n{text}":
                console(page, text, pages[page])
            elif "$ " not in text:
                run(page, text, pages[page], runs=not not_run)
        except BaseException as error:
            failures.append(f"{page}: {type(error).__name__}: {error}\n{text}")
    print(json.dumps({"failures": failures, "pages": len(pages)}))


if __name__ == "__main__":
    main()
