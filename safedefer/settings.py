"""Settings from the environment (``SAFEDEFER_…``), and their defaults. The one reader of key files, and judge of their modes."""

from __future__ import annotations

import difflib
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from safedefer.delivery.budget import UNVERIFIED_BYTES
from safedefer.errors import ConfigurationError
from safedefer.keys import Keyring
from safedefer.observe.trace_links import check_trace_url
from safedefer.options import DEFAULT_URL, INLINE_LIMIT, Limits
from safedefer.policy import Policy
from safedefer.queues.addresses import split_urls
from safedefer.queues.base import HISTORY_SECONDS, StorageOptions
from safedefer.queues.file_owner import trouble_with_folders, trouble_with_owner
from safedefer.queues.rules import MOST_ROW_BYTES

if TYPE_CHECKING:
    from safedefer.execution.tracing import TaskTracing

_log: Final = logging.getLogger("safedefer")

_PREFIX: Final = "SAFEDEFER_"
#: Variables with the prefix that are no settings: a supervisor's for its workers, and those of our own tests.
_NO_SETTINGS: Final = ("SAFEDEFER_WORKER", "SAFEDEFER_TEST_")


def trouble_with_key_file(path: str, status: os.stat_result) -> str | None:
    """Return what is wrong if others may change a file of keys, or read one that is ours; else None.

    Reading is decided as ssh does for private keys: the mode of a file that root owns is root's choice.
    """
    owner = trouble_with_owner("the key file", path, status)
    if owner is not None:
        return owner
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"the key file {path!a} may be changed by others; run `chmod 600 {path!a}`, and make new keys if any did"
    if status.st_uid == os.geteuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"the key file {path!a} may be read by others; run `chmod 600 {path!a}`, and make new keys if any did"
    return trouble_with_folders(path)


def _words(value: object) -> object:
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _urls(value: object) -> object:
    return split_urls(value) if isinstance(value, str) else value


def _tracing(value: object) -> object:
    if not isinstance(value, str):
        return value
    word = value.lower()
    return "link" if word in {"1", "true", "yes", "on"} else "off" if word in {"0", "false", "no"} else word


def _trace_url(value: str) -> str:
    try:
        return check_trace_url(value)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def _pairs(value: object) -> object:
    if not isinstance(value, str):
        return value
    pairs = [word.partition("=") for word in value.replace(",", " ").split()]
    if any(not name or not address for name, _, address in pairs):
        raise ValueError("write name=http://address[,name=http://address]")
    return {name: address for name, _, address in pairs}


def _read_key_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            trouble = trouble_with_key_file(str(path), status)
            # Nobody else can change a way that was judged fine: if it leads to this file now, it was this file that was judged.
            if trouble is None and not os.path.samestat(status, os.stat(path)):  # noqa: PTH116  # as above
                trouble = f"the key file {str(path)!a} was replaced while it was read; start again"
            if trouble is None:
                return file.read()
    except OSError as error:
        raise ConfigurationError(f"SAFEDEFER_KEYS_FILE cannot be read: {error.strerror}; check its path") from error
    raise ConfigurationError(f"SAFEDEFER_KEYS_FILE: {trouble}")


class Settings(BaseSettings):
    """What ``App.from_settings`` needs. Lists are separated by commas or spaces."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, extra="ignore", hide_input_in_errors=True, frozen=True
    )

    keys: SecretStr | None = Field(default=None, description="kid:base64url[,kid:base64url]; the first one signs.")
    keys_file: Path | None = Field(default=None, description="A JWK Set instead of KEYS.")
    policy: Annotated[list[str] | None, NoDecode, BeforeValidator(_words)] = Field(
        default=None, description="Patterns: pkg.mod, pkg.*, mod:name."
    )
    deferrable: bool = Field(default=False, description="Whether @deferrable marks count.")
    metaclasses: Annotated[list[str] | None, NoDecode, BeforeValidator(_words)] = Field(
        default=None, description="Further metaclasses that classes may have: mod:name."
    )
    queue: str = Field(default="sqlite:///safedefer.db", repr=False, description="The queue's URL.")
    store: str | None = Field(
        default=None, repr=False, description="The store of a push engine: the URL of a pull engine."
    )
    environment: str = Field(default="default", description="prod, staging, ...: part of every token's audience.")
    url: str = Field(default=DEFAULT_URL, description="The path that tasks are posted to.")
    prefix: str = Field(default="", description="A path prefix in front of the handler, which tokens do not name.")
    queues: Annotated[list[str] | None, NoDecode, BeforeValidator(_words)] = Field(
        default=None, description="The queues there are; not given: those of QUEUE_YAML, or any."
    )
    queue_yaml: Path | None = Field(
        default=None, description="A queue.yaml: rates, caps, targets, retry parameters; not given: no limits."
    )
    outboxes: Annotated[list[str] | None, NoDecode, BeforeValidator(_urls)] = Field(
        default=None,
        repr=False,
        description="Databases to sweep for transactional tasks: sqlite:///, postgresql://, datastore:// or SQLAlchemy's URLs.",
    )
    targets: Annotated[dict[str, str] | None, NoDecode, BeforeValidator(_pairs)] = Field(
        default=None, description="name=http://address of other handlers; not given: any name, one handler."
    )
    allow_pickle: bool = Field(default=False, description="Whether pickled arguments may be sent and run.")
    concurrency: int = Field(default=16, ge=1, le=10_000, description="Tasks that run at once.")
    lease_seconds: float = Field(default=60.0, ge=1, description="How long a silent handler is believed to run a task.")
    token_bytes: int = Field(
        default=Limits().token_bytes,
        ge=1024,
        le=MOST_ROW_BYTES,
        description="A task's token at most, signed; bytes.",
    )
    inline_limit: int = Field(default=INLINE_LIMIT, ge=1024, description="Larger tokens are stored as blobs; bytes.")
    unverified_bytes: int = Field(
        default=UNVERIFIED_BYTES, ge=1024, description="Bytes of all request bodies together that are not verified yet."
    )

    log_tracebacks: bool = Field(
        default=False, description="Whether the log shows tracebacks of tasks' exceptions, not their types only."
    )

    tracing: Annotated[Literal["off", "link", "parent"], BeforeValidator(_tracing)] = Field(
        default="off",
        description="Whether OpenTelemetry spans are made: off, link (or 1), or parent for one trace from defer to run.",
    )
    trace_url: Annotated[str, AfterValidator(_trace_url)] | None = Field(
        default=None, description="Where traces are shown, for the dashboard: https://traces.example/trace/{trace_id}."
    )

    tombstone_seconds: float = Field(
        default=9 * 86_400.0, ge=0, description="How long an ended task's name is not free."
    )
    history_seconds: float = Field(default=HISTORY_SECONDS, ge=0, description="How long ended tasks can be looked up.")
    blob_limit: int = Field(default=2**30, ge=0, description="Bytes of all stored oversize tokens together.")
    dead_seconds: float = Field(default=90 * 86_400.0, ge=0, description="Older dead letters are archived.")
    dead_limit: int = Field(default=100_000, ge=1, description="Of more dead letters the oldest are archived.")

    def storage(self) -> StorageOptions:
        """Return how long and how much the queue keeps."""
        return StorageOptions(**{item.name: getattr(self, item.name) for item in fields(StorageOptions)})

    @classmethod
    def load(cls, more: Mapping[str, Any] = MappingProxyType({})) -> Self:
        """Read the environment. An empty variable is not set; one that is no setting is warned of.

        Args:
            more: Settings by name, such as ``queue``, which count before the environment.

        Raises:
            ConfigurationError: A variable is wrong; the message names it, not its value.
        """
        _warn_of_unknown(os.environ)
        # Keys that were taken out of the environment, unless it has others since.
        given = {} if any(_is_keys(name) and text for name, text in os.environ.items()) else dict(_taken)
        try:
            return cls(**{**given, **more})
        except ValidationError as error:
            found = "; ".join(
                f"SAFEDEFER_{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors()
            )
        # Here: as the context of this error, the frames of the other one would show what the variables hold.
        raise ConfigurationError(f"the environment is wrong: {found}; correct it")

    def keyring(self) -> Keyring:
        """Load the keys.

        Raises:
            ConfigurationError: There are none, or two sources of them, or they are malformed or weak, or others may
                change the file or read it.
        """
        if (self.keys is None) == (self.keys_file is None):
            raise ConfigurationError(
                "set either SAFEDEFER_KEYS or SAFEDEFER_KEYS_FILE; `safedefer keys new` makes a key to put there"
            )
        if self.keys is not None:
            return Keyring.from_text(self.keys.get_secret_value())
        assert self.keys_file is not None
        # No local variable: tracebacks with them reach logs.
        return Keyring.from_jwks(_read_key_file(self.keys_file))

    def load_tracing(self) -> TaskTracing | None:
        """Return what makes spans; None if none are made.

        Raises:
            MissingExtra: OpenTelemetry is not installed.
        """
        if self.tracing == "off":
            return None
        # Here and not at the top: it imports OpenTelemetry.
        from safedefer.observe.tracing import Tracing  # noqa: PLC0415

        return Tracing(trace=self.tracing)

    def load_policy(self) -> Policy:
        """Build the policy.

        Raises:
            ConfigurationError: There is none, or a pattern is wrong.
        """
        if not self.policy and not self.deferrable:
            raise ConfigurationError(
                "no policy, so nothing may run; set SAFEDEFER_POLICY to the modules of your tasks, such as "
                "'shop.tasks,shop.jobs.*' (`safedefer keys new` prints the other setting that is needed)"
            )
        return Policy(*(self.policy or ()), deferrable=self.deferrable, metaclasses=self.metaclasses or ())


_taken: Final[dict[str, Any]] = {}
"""``keys`` of the environment, once they were taken out of it."""


def _is_keys(name: str) -> bool:
    return name.upper() == f"{_PREFIX}KEYS"


def take_keys_from_environment() -> None:
    """Take ``SAFEDEFER_KEYS`` out of the environment, which every program that a task starts inherits.

    ``Settings.load`` of this process finds them still. What the process was started with, the system shows to programs of
    the same user.
    """
    for name in [name for name in os.environ if _is_keys(name)]:
        text = os.environ.pop(name)
        if text:
            _taken["keys"] = SecretStr(text)


_warned: Final[set[str]] = set()


def _warn_of_unknown(names: Iterable[str]) -> None:
    """Log a warning of every variable with our prefix that is no setting, once in a process."""
    known = [name.upper() for name in Settings.model_fields]
    for name in sorted(name for name in names if name.upper().startswith(_PREFIX)):
        written = name.upper().removeprefix(_PREFIX)
        if written in known or name.startswith(_NO_SETTINGS) or name in _warned:
            continue
        _warned.add(name)
        near = difflib.get_close_matches(written, known, n=1, cutoff=0.0)[0]
        _log.warning("%s is no setting, and changes nothing; did you mean %s%s?", ascii(name)[1:-1], _PREFIX, near)
