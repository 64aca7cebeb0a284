"""The client of Cloud Tasks, google-cloud-tasks over REST, and what its errors mean.

REST, since gRPC hangs in a child of a fork. The REST client raises ``Conflict`` for a name in use, and requests' own errors
for an endpoint that does not answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from safedefer.errors import (
    ConfigurationError,
    InvalidTaskError,
    MissingExtra,
    QueueUnavailable,
    TaskAlreadyExistsError,
    UnknownQueueError,
)

try:
    import requests
    from google.api_core import exceptions
    from google.auth.credentials import AnonymousCredentials
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.cloud import tasks_v2
    from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksRestTransport
except ModuleNotFoundError as _error:
    raise MissingExtra("gcp", "a queue in Cloud Tasks") from _error

#: Seconds that a call may take.
_TIMEOUT: Final = 10.0
_BATCH_TIMEOUT: Final = 60.0
#: google.rpc.Code: what fails of a batch.
_ALREADY_EXISTS: Final = 6
_LIST_PAGE: Final = 1_000


class Uncertain(QueueUnavailable):
    """The call may have had its effect, or not: no answer came."""

    slug: ClassVar[str] = QueueUnavailable.slug


class CloudTasksClient:
    """Google's client, made when this is.

    Args:
        endpoint: The address of an emulator, which asks for no credentials; None is Google.

    Raises:
        ConfigurationError: There are no credentials.
    """

    def __init__(self, endpoint: str | None) -> None:
        try:
            transport = (
                CloudTasksRestTransport()
                if endpoint is None
                else CloudTasksRestTransport(host=endpoint, credentials=AnonymousCredentials())  # type: ignore[no-untyped-call]
            )
        except DefaultCredentialsError:
            raise ConfigurationError(
                "there are no Google credentials; run this as a service account, or `gcloud auth application-default login`"
            ) from None
        self._transport: Any = transport
        self._google: Any = tasks_v2.CloudTasksClient(transport=transport)

    def create(self, queue: str, task: Mapping[str, Any]) -> None:
        """Create a task.

        Raises:
            TaskAlreadyExistsError: Its name is in use, or was a while ago.
            InvalidTaskError: Google refuses it.
            UnknownQueueError: There is no such queue.
            Uncertain: There was no answer.
            QueueUnavailable: Google takes no tasks now, or not from us.
        """
        with _meaning(queue):
            self._google.create_task(parent=queue, task=tasks_v2.Task(task), retry=None, timeout=_TIMEOUT)

    def create_many(self, queue: str, tasks: Sequence[Mapping[str, Any]]) -> list[Exception | None]:
        """Create up to 100 tasks, each by itself; return what refused each, None where it was created.

        Raises:
            QueueUnavailable: As ``create``, for all of them.
        """
        with _meaning(queue):
            request = {
                "parent": queue,
                "requests": [{"parent": queue, "task": tasks_v2.Task(task)} for task in tasks],
            }
            operation = self._google.batch_create_tasks(request=request, retry=None, timeout=_BATCH_TIMEOUT)
            with contextlib.suppress(exceptions.GoogleAPICallError):  # nothing of it succeeded; the metadata says why
                operation.result(timeout=_BATCH_TIMEOUT)
            metadata = operation.metadata
            if metadata is None or (operation.exception() is not None and not metadata.failed_requests):
                raise Uncertain("Cloud Tasks did not say what became of a batch; defer its tasks again")
            failed: dict[int, Exception] = {
                index: _of_status(status.code, status.message) for index, status in metadata.failed_requests.items()
            }
        return [failed.get(index) for index in range(len(tasks))]

    def exists(self, name: str) -> bool:
        """Whether a task waits or runs: one that ended is not found, though its name is not free.

        Raises:
            QueueUnavailable: Google does not say.
        """
        try:
            with _meaning(""):
                self._google.get_task(name=name, retry=None, timeout=_TIMEOUT)
        except UnknownQueueError:
            return False
        return True

    def delete(self, name: str) -> bool:
        """Delete a task; False if there is none.

        Raises:
            QueueUnavailable: Google does not answer.
        """
        try:
            with _meaning(""):
                self._google.delete_task(name=name, retry=None, timeout=_TIMEOUT)
        except UnknownQueueError:
            return False
        return True

    def queues(self, parent: str) -> list[tasks_v2.Queue]:
        """List the queues of a location.

        Raises:
            QueueUnavailable: Google does not answer.
        """
        with _meaning(""):
            return list(self._google.list_queues(parent=parent, retry=None, timeout=_TIMEOUT))

    def tasks(self, queue: str, most: int) -> Iterator[tasks_v2.Task]:
        """Yield up to ``most`` tasks of a queue, without bodies.

        Raises:
            QueueUnavailable: Google does not answer.
        """
        with _meaning(queue):
            request = {"parent": queue, "page_size": min(most, _LIST_PAGE)}
            for number, task in enumerate(self._google.list_tasks(request=request, retry=None, timeout=_TIMEOUT)):
                if number == most:
                    return
                yield task

    def update_queue(self, queue: Mapping[str, Any], paths: Sequence[str]) -> tasks_v2.Queue:
        """Make a queue, or change what ``paths`` name of it.

        Raises:
            ConfigurationError: Google refuses it.
            QueueUnavailable: Google does not answer.
        """
        try:
            with _meaning(str(queue["name"])):
                request = {"queue": tasks_v2.Queue(queue), "update_mask": {"paths": list(paths)}}
                found: tasks_v2.Queue = self._google.update_queue(request=request, retry=None, timeout=_TIMEOUT)
                return found
        except InvalidTaskError as refusal:
            raise ConfigurationError(f"Cloud Tasks refuses {queue['name']}: {refusal}") from None

    def pause(self, queue: str, *, paused: bool) -> None:
        """Pause or resume a queue.

        Raises:
            UnknownQueueError: There is none.
            QueueUnavailable: Google does not answer.
        """
        with _meaning(queue):
            change = self._google.pause_queue if paused else self._google.resume_queue
            change(name=queue, retry=None, timeout=_TIMEOUT)

    def purge(self, queue: str) -> None:
        """Delete all tasks of a queue.

        Raises:
            UnknownQueueError: There is none.
            QueueUnavailable: Google does not answer.
        """
        with _meaning(queue):
            self._google.purge_queue(name=queue, retry=None, timeout=_TIMEOUT)

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()


@contextlib.contextmanager
def _meaning(queue: str) -> Iterator[None]:
    """Raise our errors for the client's."""
    try:
        yield
    except exceptions.Conflict as error:
        raise _taken() from error
    except exceptions.NotFound as error:
        raise _no_queue(queue) from error
    except (exceptions.Forbidden, exceptions.Unauthorized) as error:
        raise QueueUnavailable(
            "Cloud Tasks does not let this account do that; grant it roles/cloudtasks.enqueuer, or roles/cloudtasks.queueAdmin "
            "for queues, and roles/iam.serviceAccountUser on the account that sends"
        ) from error
    except (exceptions.BadRequest, exceptions.MethodNotImplemented) as error:
        raise InvalidTaskError(f"Cloud Tasks refuses it ({error.message}); correct it") from error
    except (exceptions.GoogleAPICallError, exceptions.RetryError, requests.RequestException, TimeoutError) as error:
        raise Uncertain(f"Cloud Tasks does not answer ({type(error).__name__}); try again") from error
    except GoogleAuthError as error:
        raise QueueUnavailable(f"Google's credentials cannot be had ({type(error).__name__}); try again") from error


def _of_status(code: int, text: str) -> Exception:
    """Return what a ``google.rpc.Status`` of a batch means."""
    if code == _ALREADY_EXISTS:
        return _taken()
    if code in {3, 9, 11}:  # INVALID_ARGUMENT, FAILED_PRECONDITION, OUT_OF_RANGE
        return InvalidTaskError(f"Cloud Tasks refuses it ({text}); correct it")
    return QueueUnavailable(f"Cloud Tasks did not take the task ({text}); try again")


def _taken() -> TaskAlreadyExistsError:
    return TaskAlreadyExistsError("a task of this name waits or runs, or ended not long ago; use another name")


def _no_queue(queue: str) -> UnknownQueueError:
    return UnknownQueueError(
        f"there is no queue {queue.rpartition('/')[2]} in Cloud Tasks; declare it in queue.yaml and run `safedefer queues update`"
    )
