"""What is public: the names that ``docs/reference/api`` documents. Documents name no others."""

import importlib
import re
from pathlib import Path

import pytest

import safedefer

ROOT = Path(__file__).resolve().parents[1]
API = sorted((ROOT / "docs/reference/api").glob("*.md"))
#: Modules that are public as a whole, and what is public of others.
MODULES = (
    *("safedefer", "safedefer.deferred", "safedefer.errors", "safedefer.events", "safedefer.testing"),
    "safedefer.migrate.app_engine",
)
NAMES = ("safedefer.delivery.Response", "safedefer.queues.base.DeadFilter")
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
    ROOT / "schema/README.md",
]
#: Dotted, and no names of Python: a check of Django's, a logger, a Celery task, a file, tables, an entry-point group.
OTHERS = {
    "safedefer.W001",
    "safedefer.audit",
    "safedefer.db",
    "safedefer.deliver",
    "safedefer.pgqueuer_log",
    "safedefer.settings",
    "safedefer.types",
}

#: Made when it is asked for, of a Django project's settings.
MADE = "safedefer.frameworks.django.app"

DOCUMENTED = [name for page in API for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]


def found(path):
    """Return the object that a dotted path leads to."""
    if path == MADE:
        path = f"{path.removesuffix('app')}__getattr__"
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"{path} leads nowhere")


def public():
    """Return every public path, without the members of classes."""
    paths = {*MODULES, *NAMES, *DOCUMENTED}
    return paths | {f"{module}.{name}" for module in MODULES for name in found(module).__all__}


def is_public(path):
    """Whether a path is public, or names a member without underscores of what is."""
    known = public()
    parts = path.removesuffix(".__all__").split(".")
    own = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), 0)
    rest = parts[own:]
    in_a_module = ".".join(parts[:own]) in MODULES and bool(rest)
    return own > 0 and not in_a_module and not any(part.startswith("_") for part in rest)


def named(text):
    """Yield the dotted paths of safedefer that a document names, and those that its examples import."""
    yield from re.findall(r"(?<![\w./@-])(?<!from )safedefer(?:\.[A-Za-z_]\w*)+", text)
    for module, names in re.findall(r"^\s*from (safedefer[\w.]*) import (\([^)]*\)|[^#\n]+)", text, re.MULTILINE):
        for name in re.findall(r"(\w+)(?: as \w+)?", names):
            yield f"{module}.{name}"


@pytest.mark.parametrize("path", DOCUMENTED)
def test_what_the_reference_documents_is_there(path):
    assert found(path) is not None


@pytest.mark.parametrize("path", sorted(public()))
def test_what_is_public_is_documented(path):
    """By itself, or with its module; a name of ``safedefer`` may be documented where it comes from."""
    module, _, name = path.rpartition(".")
    whole = [each for each in DOCUMENTED if each in MODULES]
    again = [each for each in whole if name in found(each).__all__ and found(f"{each}.{name}") is found(path)]
    assert path in DOCUMENTED or module in whole or again or path == "safedefer"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_what_is_public_and_nothing_else(document):
    paths = set(named(document.read_text())) - OTHERS
    for path in paths:
        found(path)
    assert {path for path in paths if not is_public(path)} == set()


def test_the_reading_of_documents_sees_imports_and_dotted_names():
    text = "`safedefer.app.App`\n    from safedefer.codecs.typed import (TypedCodec,\n    CallData as Data)\nfrom safedefer import App  # x\n"
    assert set(named(text)) == {
        "safedefer.app.App", "safedefer.codecs.typed.TypedCodec",
        "safedefer.codecs.typed.CallData", "safedefer.App",
    }  # fmt: skip
    assert [is_public(path) for path in ("safedefer.app.App", "safedefer.App.defer", "safedefer.App._build")] == [
        False,
        True,
        False,
    ]
    assert not is_public("safedefer.queues.base")
    assert is_public("safedefer.errors.__all__")


def test_nothing_private_is_exported():
    assert [name for name in safedefer.__all__ if name.startswith("_")] == []
