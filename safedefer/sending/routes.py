"""Where tasks may go: the environment, the queues, targets and URLs that the operator listed.

A route is the audience of a token, ``environment:queue:target:path``, and how long the task lives.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, Final

from safedefer.claims import MAX_LIFETIME
from safedefer.errors import ConfigurationError, InvalidTaskError, InvalidUrlError, UnknownQueueError
from safedefer.options import (
    DEFAULT_OPTIONS,
    DEFAULT_QUEUE,
    DEFAULT_TARGET,
    DEFAULT_URL,
    QUEUE_URLS,
    Options,
    TaskRetryOptions,
)
from safedefer.sending.addresses import check_address

if TYPE_CHECKING:
    from safedefer.queues.config import QueueFile

#: A task expires this many seconds after its eta, unless its ``task_age_limit`` is longer.
LIFETIME: Final = 31 * 86_400


class Routes:
    """The destinations of one application.

    Args:
        environment: ``prod``, ``staging``, ...; None is ``default``.
        url: The path that tasks are posted to by default.
        prefix: A path in front of the handler's, which tokens do not name.
        queues: The names of the queues; None is those of ``file``, or any name without one.
        targets: Addresses of handlers by name; None is any name, one handler.
        file: The ``queue.yaml``.

    Raises:
        ConfigurationError: A name, a path or an address is impossible, or the file names a target without an address.
    """

    def __init__(
        self,
        *,
        environment: str | None = None,
        url: str = DEFAULT_URL,
        prefix: str = "",
        queues: Iterable[str] | None = None,
        targets: Mapping[str, str] | None = None,
        file: QueueFile | None = None,
    ) -> None:
        environment = "default" if environment is None else environment
        names = _declared(queues, targets, file)
        _check_names(environment, names, targets)
        _check_paths(url, prefix)
        self.environment = environment
        self.url = url
        self.prefix: str = prefix.rstrip("/")
        self.queues: frozenset[str] | None = None if names is None else frozenset({*names, DEFAULT_QUEUE})
        self.targets: dict[str, str] | None = None if targets is None else dict(targets)
        self.own_urls: Container[str] = OwnUrls(url)
        """The application's URL and those of its queues."""
        self._file = file
        self.default: tuple[str, int] = self.of(DEFAULT_OPTIONS)
        """The route of a call without options."""

    def of(self, options: Options) -> tuple[str, int]:
        """Return the audience of a task, and for how many seconds after its eta it lives."""
        url = self.url if options.url == DEFAULT_URL else options.path
        target = options.target or self._target(options.queue)
        lives = lifetime(self.retry_options(options.queue, options.retry_options))
        return f"{self.environment}:{options.queue}:{target}:{url}", lives

    def check(self, options: Options) -> None:
        """Check that a task may go to its queue and target.

        Raises:
            UnknownQueueError: The queue is not one of those that are declared.
            InvalidTaskError: The target has no address.
        """
        if self.queues is not None and options.queue not in self.queues:
            raise UnknownQueueError(
                f"there is no queue {options.queue}; declare it, or use one of {_list(self.queues)}"
            )
        self.check_target(options)

    def check_target(self, options: Options) -> None:
        """Check that a task may go to its target. Raises ``InvalidTaskError``: it has no address."""
        if self.targets is not None and options.target not in {None, DEFAULT_TARGET, *self.targets}:
            raise InvalidTaskError(
                f"there is no target {options.target}; set SAFEDEFER_TARGETS, or use one of {_list(self.targets)}"
            )

    def destination(self, target: str | None, url: str | None) -> tuple[str | None, str | None]:
        """Turn an absolute URL below the address of a target into that target and a path.

        Args:
            target: The target that was asked for, if one was.
            url: A path, None, or an absolute URL.

        Returns:
            The target and the path; unchanged if ``url`` is not absolute.

        Raises:
            InvalidUrlError: The URL is below no address that the operator listed, or below another target's.
        """
        if type(url) is not str or not url.startswith(("http://", "https://")):
            return target, url
        for name, address in (self.targets or {}).items():
            base = address.rstrip("/")
            if url.startswith(f"{base}/") and target in {None, name}:
                return name, url.removeprefix(base)
        raise InvalidUrlError(
            "an absolute URL must be below the address of a target, so that tasks go only where the operator allows; "
            "set SAFEDEFER_TARGETS, or give a path"
        )

    def deadline(self, queue: str, own: float | None) -> float | None:
        """Return the seconds that an attempt of a task may take: its own, or those of its queue; None: neither says."""
        section = None if own is not None or self._file is None else self._file.section(queue)
        return own if section is None else section.attempt_deadline

    def accepts(self, path: str | None, mount: str = "") -> str | Container[str]:
        """Return the paths that a token may name which came on ``path``, the configured prefix removed.

        Below a mount these are two, with the mount and without it: tokens may name either.
        """
        if path is None:
            return self.own_urls
        whole = _below(self.prefix, path)
        return whole if not mount else (whole, _below(self.prefix, _below(mount.rstrip("/"), path)))

    def retry_options(self, queue: str, own: TaskRetryOptions | None) -> TaskRetryOptions | None:
        """Return the retry options of a task, completed by its queue's."""
        section = None if self._file is None else self._file.section(queue)
        if section is None:
            return own
        return TaskRetryOptions.from_given({**section.retry_parameters.given(), **(own.given() if own else {})})

    def _target(self, queue: str) -> str:
        section = None if self._file is None else self._file.section(queue)
        return DEFAULT_TARGET if section is None or section.target is None else section.target


def _below(folder: str, path: str) -> str:
    return path.removeprefix(folder) if path.startswith(f"{folder}/") else path


class OwnUrls(Container[str]):
    """The URL of an application and those of its queues; None: any path."""

    def __init__(self, url: str | None) -> None:
        self._url = url

    def __contains__(self, path: object) -> bool:
        return (
            path == self._url
            or self._url is None
            or (isinstance(path, str) and path.startswith(QUEUE_URLS) and "/" not in path[len(QUEUE_URLS) :])
        )


#: Holds every path: for tokens that are looked at, or signed anew, but not run.
ANY_URL: Final = OwnUrls(None)


def lifetime(options: TaskRetryOptions | None) -> int:
    """Return for how many seconds after its eta a task of these retry options lives."""
    age = None if options is None else options.task_age_limit
    return LIFETIME if age is None else min(max(LIFETIME, int(age)), MAX_LIFETIME)


def _declared(
    queues: Iterable[str] | None, targets: Mapping[str, str] | None, file: QueueFile | None
) -> list[str] | None:
    """Return the names of the queues, with those of the file."""
    if isinstance(queues, str):
        raise ConfigurationError("queues is a list of names, not one text")
    if file is None:
        return None if queues is None else list(queues)
    for section in file.queue:
        if targets is not None and section.target not in {None, DEFAULT_TARGET, *targets}:
            raise ConfigurationError(
                f"the queue {section.name} has the target {section.target}, which has no address; set SAFEDEFER_TARGETS"
            )
    return [*(queues or ()), *(section.name for section in file.queue)]


def _check_names(environment: str, queues: Iterable[str] | None, targets: Mapping[str, str] | None) -> None:
    named = [("environment", environment), *(("queue", name) for name in queues or ())]
    for what, name in (*named, *(("target", name) for name in targets or ())):
        try:
            Options(queue=name)
        except InvalidTaskError:
            raise ConfigurationError(
                f"the {what} {name!a} is not 1 to 100 characters of A-Z a-z 0-9 . -; rename it"
            ) from None
    for name, address in (targets or {}).items():
        check_address(f"the address of the target {name}", address)


def _check_paths(url: str, prefix: str) -> None:
    for what, path in (("url", url), ("prefix", prefix.rstrip("/") or "/")):
        try:
            Options(url=path)
        except InvalidTaskError as error:
            raise ConfigurationError(f"the {what} {path!a} is impossible: {error}") from error
        if "{" in path or "}" in path:
            raise ConfigurationError(f"the {what} {path!a} has a brace, which routes give a meaning; leave it out")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "(none)"
