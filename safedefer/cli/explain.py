"""``safedefer explain``: whether a callable may be deferred, by which pattern, else why not and what to do."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import FunctionType, MethodDescriptorType, MethodType
from typing import Any, Final, cast

import click

from safedefer.app import App
from safedefer.callables.wrappers import unwrapped
from safedefer.cli.common import app_option, load_app
from safedefer.cli.options import TEXT
from safedefer.cli.references import prove
from safedefer.cli.text import plain
from safedefer.errors import Error, NotDeferrable, PolicyViolation
from safedefer.keys import Key, KeyState
from safedefer.policy_cache import Gate
from safedefer.refs import CallableRef, find, find_member, reference

_NAME: Final = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", re.ASCII)
_MOST: Final = 255
_HOW: Final = {"method": "as a method of an object", "builtin_method": "as a method of an object"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is said of a name."""

    name: str
    deferrable: bool
    kind: str | None
    """``function``, ``class``, ``method``, ...; None if that is not known."""
    patterns: Sequence[str] = ()
    """Those of the policy that admit the name."""
    reason: str | None = None
    """A slug, where it may not be deferred."""
    text: str
    keys: Sequence[dict[str, Any]] = field(default_factory=list)
    """Of each key that is not revoked: ``kid``, ``state``, whether it may name this (``admits``), and ``queues``, if limited."""


@click.command()
@app_option
@click.argument("name", type=TEXT)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def explain(*, app: str | None, name: str, as_json: bool) -> None:
    """Say whether NAME, a module:name, may be deferred, and why not. Exit status 1 if it may not.

    Imports the module if the policy admits the name, or counts marks of @deferrable. Runs nothing.
    """
    match = _NAME.fullmatch(name)
    if match is None or max(map(len, match.groups())) > _MOST:
        raise click.ClickException(f"{plain(name)} is not module:name; write for example shop.tasks:send_receipt")
    found = explained(load_app(app), name, match[1], match[2])
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        click.echo(plain(found.text))
        for key in found.keys:
            click.echo(f"  {_key_line(key)}")
    if not found.deferrable:
        sys.exit(1)


def explained(app: App, name: str, module: str, qualname: str) -> Explanation:
    """Ask the policy, within the limits of the active key, as ``defer()`` does."""
    app.policy.load()
    active = app.keyring.active
    gate: Gate = app.policy if active.patterns is None else app.policy.restricted(active.patterns)
    kind: str | None = None
    try:
        _refuse_by_name(app, module, qualname)
        ref = _named(gate, module, qualname)
        kind = ref.kind
    except NotDeferrable as error:
        return _refused(name, kind, error.reason, error)
    except Error as error:
        return _refused(name, kind, error.slug, error)
    patterns = [pattern for pattern in app.policy.patterns if _admits(app.policy.only(pattern), ref)]
    by = f"by the pattern {', '.join(patterns)}" if patterns else "by its mark, @deferrable"
    how = f" {_HOW[kind]}" if kind in _HOW else ""
    text = f"{ref} may be deferred{how}: a {kind}, {by}"
    return Explanation(
        name=name,
        deferrable=True,
        kind=kind,
        patterns=patterns,
        text=text,
        keys=[_limits(app, k, ref) for k in _keys(app)],
    )


def _refused(name: str, kind: str | None, reason: str, error: Error) -> Explanation:
    return Explanation(
        name=name, deferrable=False, kind=kind, reason=reason, text=f"{name} may not be deferred: {error}"
    )


def _refuse_by_name(app: App, module: str, qualname: str) -> None:
    """Refuse a name of a module that nothing has imported, before it is imported, where no mark in it could help.

    Raises:
        PolicyViolation: No pattern admits it.
    """
    if module in sys.modules or not app.policy.is_settled:
        return
    owner, _, member = qualname.rpartition(".")
    candidates = [reference("function", module, qualname, None)]
    if owner and not member.startswith("__"):
        candidates.append(reference("method", module, owner, member))
    if not any(_admits(app.policy, each) for each in candidates):
        app.policy.check(candidates[-1])


def _named(gate: Gate, module: str, qualname: str) -> CallableRef:
    """Return the reference of what a name leads to, proved and admitted as by ``defer()``.

    Raises:
        NotDeferrable: It may not be deferred.
        RejectedTask: It is not found, or a method that may not run.
    """
    owner, dot, member = qualname.rpartition(".")
    cls = find(module, owner) if dot else None
    if not issubclass(type(cls), type):
        return gate.callable_ref(unwrapped(find(module, qualname)))
    _, raw = find_member(cast("type", cls), member)
    if type(raw) is classmethod:
        return gate.callable_ref(MethodType(raw.__func__, cls))
    if type(raw) is FunctionType and not member.startswith("__"):
        ref = reference("method", module, owner, member)
    elif type(raw) is MethodDescriptorType:
        ref = reference("builtin_method", module, owner, member)
    else:
        return gate.callable_ref(raw.__func__ if type(raw) is staticmethod else raw)
    prove(gate, ref)
    return ref


def _admits(gate: Gate, ref: CallableRef) -> bool:
    try:
        gate.check(ref)
    except PolicyViolation:
        return False
    return True


def _keys(app: App) -> list[Key]:
    return [key for key in app.keyring.keys if key.state is not KeyState.REVOKED]


def _limits(app: App, key: Key, ref: CallableRef) -> dict[str, Any]:
    admits = key.patterns is None or _admits(app.policy.only(*key.patterns), ref)
    queues = None if key.queues is None else sorted(key.queues)
    return {"kid": key.kid, "state": str(key.state), "admits": admits, "queues": queues}


def _key_line(key: dict[str, Any]) -> str:
    may = "may sign it" if key["admits"] else "may not name it: its patterns do not admit it"
    queues = "" if key["queues"] is None else f", for the queues {', '.join(key['queues'])} only"
    return f"key {key['kid']} ({key['state']}) {may}{queues if key['admits'] else ''}"
