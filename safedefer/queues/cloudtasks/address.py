"""The URL of a Cloud Tasks engine: ``cloudtasks://PROJECT/LOCATION?address=https://…&service_account=…``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from safedefer.errors import ConfigurationError

#: Who signs Google's tokens: both are documented.
GOOGLE_ISSUERS: Final = frozenset({"https://accounts.google.com", "accounts.google.com"})
GOOGLE_KEYS: Final = "https://www.googleapis.com/oauth2/v3/certs"
_FORM: Final = "cloudtasks://PROJECT/LOCATION?address=https://tasks.example.com&service_account=NAME@PROJECT.iam.gserviceaccount.com"
_PLACE: Final = re.compile(r"(?i:cloudtasks)://([A-Za-z0-9:.-]{1,100})/([A-Za-z0-9-]{1,100})/?")
_EMAIL: Final = re.compile(r"[!-~]{1,200}@[A-Za-z0-9.-]{1,200}")
_TARGET: Final = "target."
_KNOWN: Final = ("address", "service_account", "audience", "endpoint", "app_engine", "unsafe_accept_any_sender")


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudTasksAddress:
    """Where tasks are kept, where they are sent, and who may send them."""

    project: str
    location: str
    address: str | None = None
    """Of the handler, with the path in front of it. None: tasks go to the project's App Engine application."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Addresses of other handlers, by target."""
    service_accounts: Sequence[str] = ()
    """E-mail addresses: the first one sends; requests of all are taken."""
    audience: str | None = None
    """Of the OIDC tokens; None: the address that a task is sent to."""
    endpoint: str | None = None
    """Of the API, where it is not Google's: an emulator's."""
    any_sender: bool = False
    """Whether a request needs no OIDC token."""

    @property
    def parent(self) -> str:
        """The location's name in the API."""
        return f"projects/{self.project}/locations/{self.location}"

    @property
    def issuers(self) -> frozenset[str]:
        """Who may sign OIDC tokens."""
        return GOOGLE_ISSUERS if self.endpoint is None else frozenset({self.endpoint})

    @property
    def keys_url(self) -> str:
        """Where the signer's public keys are."""
        return GOOGLE_KEYS if self.endpoint is None else f"{self.endpoint}/oauth2/v3/certs"

    @property
    def audiences(self) -> frozenset[str]:
        """What ``aud`` may be."""
        if self.audience is not None:
            return frozenset({self.audience})
        return frozenset({*self.targets.values(), *(() if self.address is None else (self.address,))})

    def address_of(self, target: str, default: str) -> str | None:
        """Return the address of a target; None if there is none."""
        return self.address if target == default else self.targets.get(target)

    @classmethod
    def parse(cls, url: str) -> CloudTasksAddress:
        """Read a URL.

        Raises:
            ConfigurationError: It is malformed, or would let anybody send tasks without saying so.
        """
        front, mark, query = url.partition("?")
        match = _PLACE.fullmatch(front)
        if match is None or "#" in url:
            raise ConfigurationError(f"the URL of Cloud Tasks names a project and a location; write {_FORM}")
        try:
            pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(mark), errors="strict")
        except ValueError:  # its text quotes the URL
            raise ConfigurationError(f"the parameters in the URL of Cloud Tasks are malformed; write {_FORM}") from None
        given = _by_name(pairs)
        endpoint = _web_address("endpoint", given["endpoint"][0], any_http=True) if "endpoint" in given else None
        any_http = endpoint is not None and endpoint.startswith("http://")
        targets = {
            name.removeprefix(_TARGET): _web_address(name, values[0], any_http=any_http)
            for name, values in given.items()
            if name.startswith(_TARGET)
        }
        found = cls(
            project=match[1],
            location=match[2],
            address=_web_address("address", given["address"][0], any_http=any_http) if "address" in given else None,
            targets=targets,
            service_accounts=tuple(given.get("service_account", ())),
            audience=given["audience"][0] if "audience" in given else None,
            endpoint=endpoint,
            any_sender=_flag(given, "unsafe_accept_any_sender"),
        )
        _check(found, app_engine=_flag(given, "app_engine"))
        return found


def _by_name(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    given: dict[str, list[str]] = {}
    for name, value in pairs:
        if name not in _KNOWN and not name.startswith(_TARGET):
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.0)[0]
            raise ConfigurationError(f"the URL of Cloud Tasks has no parameter {name!a}; did you mean {near}?")
        if not value:
            raise ConfigurationError(f"the parameter {name!a} in the URL of Cloud Tasks is empty; leave it out")
        given.setdefault(name, []).append(value)
    for name, values in given.items():
        if len(values) > 1 and name != "service_account":
            raise ConfigurationError(f"the parameter {name!a} in the URL of Cloud Tasks is there twice; keep one")
    return given


def _flag(given: Mapping[str, Sequence[str]], name: str) -> bool:
    if name not in given:
        return False
    if given[name][0] != "yes":
        raise ConfigurationError(f"the parameter {name} in the URL of Cloud Tasks is yes, or left out")
    return True


def _web_address(name: str, value: str, *, any_http: bool) -> str:
    """Return an address without its last slash."""
    try:
        parts = urlsplit(value)
        is_one = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_one, parts = False, urlsplit("")
    if not is_one or parts.query or parts.fragment or "@" in parts.netloc or not value.isascii() or " " in value:
        raise ConfigurationError(
            f"{name} in the URL of Cloud Tasks is no address; write https://host or https://host/path"
        )
    if parts.scheme == "http" and not any_http:
        raise ConfigurationError(f"{name} in the URL of Cloud Tasks must be https: tokens are signed, not encrypted")
    return value.rstrip("/")


def _check(found: CloudTasksAddress, *, app_engine: bool) -> None:
    if app_engine == (found.address is not None):
        raise ConfigurationError(
            "the URL of Cloud Tasks says where tasks are sent: address=https://… of the handler, or app_engine=yes for the "
            "project's App Engine application"
        )
    for email in found.service_accounts:
        if _EMAIL.fullmatch(email) is None:
            raise ConfigurationError(
                f"service_account {email!a} is no e-mail address; write that of the service account"
            )
    if app_engine and (found.service_accounts or found.audience or found.targets):
        raise ConfigurationError(
            "App Engine's targets have no OIDC tokens, and their names are services; leave out service_account, audience and "
            "target"
        )
    if not app_engine and not found.service_accounts:
        raise ConfigurationError(
            "the URL of Cloud Tasks needs service_account=…: its OIDC token proves to the handler that Cloud Tasks sent a "
            "request"
        )
