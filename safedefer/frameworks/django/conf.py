"""The App of a Django project, made of the setting ``SAFEDEFER``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pkgutil import resolve_name
from threading import RLock
from typing import Any, Final

from django.conf import settings

from safedefer.app import App
from safedefer.errors import ConfigurationError
from safedefer.settings import Settings

_APP: Final = "APP"
_lock: Final = RLock()  # reentrant: the module of the App may ask for it
_made: Final[dict[str, App]] = {}


def project_app() -> App:
    """Return the App of the project, the same at every call.

    Raises:
        ConfigurationError: The setting ``SAFEDEFER`` is wrong, or keys or a policy are missing.
    """
    with _lock:
        if _APP not in _made:
            given = getattr(settings, "SAFEDEFER", {})
            _check(given)
            name = given.get(_APP)
            _made[_APP] = App.from_settings(_settings(given)) if name is None else _named(name)
        return _made[_APP]


def _check(given: object) -> None:
    known = [_APP, *(name.upper() for name in Settings.model_fields)]
    if not isinstance(given, Mapping):
        raise ConfigurationError('the setting SAFEDEFER is a dict, such as {"POLICY": ["shop.tasks"]}')
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"SAFEDEFER[{name!a}] is no setting; did you mean {near}?")
    if given.get(_APP) is not None and len(given) > 1:
        raise ConfigurationError('SAFEDEFER["APP"] stands alone: the App that it names has its own arguments')


def _settings(given: Mapping[str, Any]) -> Settings:
    return Settings.load({name.lower(): value for name, value in given.items() if value is not None and name != _APP})


def _named(name: object) -> App:
    try:
        found = resolve_name(name) if isinstance(name, str) else name
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigurationError(f'SAFEDEFER["APP"]: there is no {name!a} ({error}); write module:app') from error
    if not isinstance(found, App):
        raise ConfigurationError(f'SAFEDEFER["APP"]: {name!a} is no safedefer.App; write module:app')
    return found
