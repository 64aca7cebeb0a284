"""Sessions: ``nox -s quick`` before a commit, ``full`` before a pull request, ``docs`` for the site."""

from __future__ import annotations

import nox

nox.needs_version = ">=2026.4"
nox.options.sessions = ["quick"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

PINS = {"PIP_CONSTRAINT": ".ci/constraints.txt", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
#: What finds most mistakes in the least time: the trust core, and the shape of the package.
QUICK = (
    "tests/test_architecture.py", "tests/test_public.py", "tests/unit/test_token.py", "tests/unit/test_keys.py",
    "tests/unit/test_claims.py", "tests/unit/test_refs.py", "tests/unit/test_policy.py", "tests/unit/test_signing.py",
    "tests/unit/test_options.py", "tests/unit/test_settings.py", "tests/unit/test_typed_examples.py", "tests/unit/test_app.py",
    "tests/unit/test_deferred.py",
)  # fmt: skip


@nox.session
def quick(session: nox.Session) -> None:
    """Lint, formatting and the unit tests of the trust core and the facade: under a minute once it is installed."""
    session.install("-e", ".[dev]", env=PINS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "-m", "pytest", "-q", "-n", "4", *(session.posargs or QUICK))


@nox.session
def types(session: nox.Session) -> None:
    """The type checkers and the import contracts."""
    session.install("-e", ".[dev]", env=PINS)
    session.run("mypy")
    session.run("pyright")
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """Every test, on the Python that runs nox: ``nox -s tests -- tests/unit`` for some."""
    session.install("-e", ".[test]", env=PINS)
    session.run("python", "-m", "pytest", "-q", "-n", "4", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """The long forms too: tests marked ``nightly``, and searches of thousands of examples. Hours."""
    session.install("-e", ".[test]", env=PINS)
    profile = {"HYPOTHESIS_PROFILE": "nightly"}
    session.run("python", "-m", "pytest", "-q", "-n", "4", "-o", "timeout=14400", *session.posargs, env=profile)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Everything that must hold on main, in a clean checkout of the last commit: some twenty minutes."""
    session.run("bash", ".ci/run", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation in site/; a broken link or a missing name is an error."""
    session.install("-e", ".[docs]", env=PINS)
    session.run("mkdocs", "build", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})
