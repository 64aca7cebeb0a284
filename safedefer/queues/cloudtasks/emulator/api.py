"""The methods of the API, each from a request's names and JSON to the JSON of its answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias
from uuid import uuid4

from safedefer.queues.cloudtasks.emulator.errors import ApiError, invalid, rpc_status
from safedefer.queues.cloudtasks.emulator.requests import read_queue, read_task
from safedefer.queues.cloudtasks.emulator.resources import QueueEntry, TaskEntry
from safedefer.queues.cloudtasks.emulator.state import Dispatch, Line, State
from safedefer.queues.cloudtasks.emulator.values import choice, message, number, queue_name, queue_of_task, time_text

Document: TypeAlias = dict[str, Any]
_TYPES: Final = "type.googleapis.com/google.cloud.tasks.v2"
_BATCH: Final = 100
_DELETED_BATCH: Final = 1_000
_QUEUE_PAGE: Final = 9_800
_TASK_PAGE: Final = 1_000
_VIEWS: Final = {0: "VIEW_UNSPECIFIED", 1: "BASIC", 2: "FULL"}
_PARENT: Final = r"(?P<parent>projects/[^/]+/locations/[^/]+)"
_NO_QUEUE: Final = "Queue does not exist"
_NOT_FOUND: Final = "Requested entity was not found"


class Api:
    """The methods.

    Args:
        state: Queues and tasks.
        force: Makes the attempt of a RunTask.
    """

    def __init__(self, state: State, force: Callable[[Dispatch], None]) -> None:
        self._state = state
        self._force = force
        self._operations: dict[str, Document] = {}

    def call(self, method: str, path: str, query: Mapping[str, str], body: Any) -> Document:
        """Answer a request.

        Args:
            method: The HTTP method.
            path: Behind ``/v2/``.
            query: The parameters.
            body: The JSON, or None.

        Raises:
            ApiError: It is refused.
        """
        for verb, pattern, name in _ROUTES:
            match = pattern.fullmatch(path) if verb == method else None
            if match is not None:
                answer: Document = getattr(self, name)(match, query, body)
                return answer
        raise ApiError("NOT_FOUND", f"no method of the emulator has {method} /v2/{path}")

    # --- Queues ---

    def create_queue(self, match: re.Match[str], _: Mapping[str, str], body: Any) -> Document:
        """CreateQueue."""
        queue = read_queue(body, parent=match["parent"])
        if queue.name in self._state.lines:
            raise ApiError("ALREADY_EXISTS", "Queue already exists")
        if self._state.is_used(queue.name):
            raise ApiError("FAILED_PRECONDITION", "a queue of this name was deleted in the last 3 days")
        return self._state.put_queue(queue).queue.document()

    def update_queue(self, match: re.Match[str], query: Mapping[str, str], body: Any) -> Document:
        """UpdateQueue."""
        given = {**body, "name": match["queue"]} if isinstance(body, dict) else body
        line = self._state.lines.get(match["queue"])
        mask = [part for part in query.get("updateMask", "").split(",") if part]
        queue = read_queue(given, base=None if line is None else line.queue, mask=mask)
        return self._state.put_queue(queue).queue.document()

    def get_queue(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """GetQueue."""
        return self._line(match["queue"]).queue.document()

    def list_queues(self, match: re.Match[str], query: Mapping[str, str], _: Any) -> Document:
        """ListQueues."""
        if query.get("filter"):
            raise ApiError("UNIMPLEMENTED", "the emulator has no filters")
        prefix = f"{match['parent']}/queues/"
        names = sorted(name for name in self._state.lines if name.startswith(prefix))
        page, after = _page(names, query, _QUEUE_PAGE)
        return {"queues": [self._state.lines[name].queue.document() for name in page], "nextPageToken": after}

    def delete_queue(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """DeleteQueue."""
        self._state.delete_queue(self._line(match["queue"]))
        return {}

    def purge_queue(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """PurgeQueue."""
        line = self._line(match["queue"])
        for task in list(line.tasks.values()):
            self._state.end(line, task)
        return self._state.put_queue(replace(line.queue, purged=self._state.clock())).queue.document()

    def pause_queue(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """PauseQueue."""
        return self._put_state(match["queue"], "PAUSED")

    def resume_queue(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """ResumeQueue."""
        return self._put_state(match["queue"], "RUNNING")

    def _put_state(self, name: str, state: str) -> Document:
        queue: QueueEntry = replace(self._line(name).queue, state=state)
        return self._state.put_queue(queue).queue.document()

    def _line(self, name: str) -> Line:
        line = self._state.lines.get(queue_name(name))
        if line is None:
            raise ApiError("NOT_FOUND", _NO_QUEUE)
        return line

    # --- Tasks ---

    def create_task(self, match: re.Match[str], _: Mapping[str, str], body: Any) -> Document:
        """CreateTask."""
        given = message(body, "request", {"task", "responseView", "parent"})
        view = _is_full(given.get("responseView"))
        return self._create(self._line(match["queue"]), given).document(full=view)

    def _create(self, line: Line, given: Mapping[str, Any]) -> TaskEntry:
        state = self._state
        task, named = read_task(given.get("task"), line.queue.name, now=state.clock(), make_id=uuid4().hex)
        if named and (task.name in line.tasks or state.is_used(task.name)):
            raise ApiError("ALREADY_EXISTS", "Requested entity already exists")
        state.add(line, task)
        return task

    def batch_create_tasks(self, match: re.Match[str], _: Mapping[str, str], body: Any) -> Document:
        """BatchCreateTasks: an operation that is done already."""
        given = message(body, "request", {"requests", "requestId", "parent"})
        requests = given.get("requests")
        line = self._line(match["queue"])
        if not isinstance(requests, list) or not 1 <= len(requests) <= _BATCH:
            raise invalid(f"a batch has 1 to {_BATCH} requests")
        made: list[Document] = []
        failed: dict[str, Document] = {}
        for index, request in enumerate(requests):
            each = message(request, f"requests[{index}]", {"parent", "task", "responseView"})
            if each.get("parent", line.queue.name) != line.queue.name:
                raise invalid("all requests of a batch are for one queue")
            try:
                made.append(self._create(line, each).document(full=_is_full(each.get("responseView"))))
            except ApiError as error:
                failed[str(index)] = error.rpc_status()
        response = {"@type": f"{_TYPES}.BatchCreateTasksResponse", "tasks": made}
        return self._operation(line, "BatchCreateTasksMetadata", failed, len(requests), response)

    def batch_delete_tasks(self, match: re.Match[str], _: Mapping[str, str], body: Any) -> Document:
        """BatchDeleteTasks: an operation that is done already."""
        given = message(body, "request", {"names", "requestId", "parent"})
        names = given.get("names")
        line = self._line(match["queue"])
        if not isinstance(names, list) or not 1 <= len(names) <= _DELETED_BATCH:
            raise invalid(f"a batch has 1 to {_DELETED_BATCH} names")
        failed: dict[str, Document] = {}
        for index, name in enumerate(names):
            if queue_of_task(name) != line.queue.name:
                raise invalid("all tasks of a batch are of one queue")
            try:
                self._state.end(*self._find(name))
            except ApiError as error:
                failed[str(index)] = error.rpc_status()
        response = {"@type": "type.googleapis.com/google.protobuf.Empty"}
        return self._operation(line, "BatchDeleteTasksMetadata", failed, len(names), response)

    def _operation(
        self, line: Line, metadata: str, failed: Mapping[str, Document], number_of: int, response: Document
    ) -> Document:
        now = time_text(self._state.clock())
        state = "PARTIALLY_SUCCEEDED" if failed else "SUCCEEDED"
        details = {"@type": f"{_TYPES}.{metadata}", "startTime": now, "endTime": now, "state": state}
        name = f"{line.queue.name.rpartition('/queues/')[0]}/operations/{uuid4().hex}"
        operation: Document = {"name": name, "done": True, "metadata": {**details, "failedRequests": failed}}
        if len(failed) == number_of:
            text = f"None of the requests succeeded, refer to {metadata}.failed_requests for individual error details"
            operation["error"] = rpc_status("ABORTED", text)
        else:
            operation["response"] = response
        self._operations[name] = operation
        return operation

    def get_operation(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """GetOperation, of the operations of this process."""
        if match["operation"] not in self._operations:
            raise ApiError("NOT_FOUND", _NOT_FOUND)
        return self._operations[match["operation"]]

    def get_task(self, match: re.Match[str], query: Mapping[str, str], _: Any) -> Document:
        """GetTask."""
        return self._find(match["task"])[1].document(full=_is_full(query.get("responseView")))

    def list_tasks(self, match: re.Match[str], query: Mapping[str, str], _: Any) -> Document:
        """ListTasks."""
        line, full = self._line(match["queue"]), _is_full(query.get("responseView"))
        page, after = _page(sorted(line.tasks), query, _TASK_PAGE)
        return {"tasks": [line.tasks[name].document(full=full) for name in page], "nextPageToken": after}

    def delete_task(self, match: re.Match[str], _: Mapping[str, str], __: Any) -> Document:
        """DeleteTask."""
        self._state.end(*self._find(match["task"]))
        return {}

    def run_task(self, match: re.Match[str], _: Mapping[str, str], body: Any) -> Document:
        """RunTask."""
        given = message(body, "request", {"responseView", "name"})
        line, task = self._find(match["task"])
        self._force(self._state.begin(line, task, forced=True))
        return task.document(full=_is_full(given.get("responseView")))

    def _find(self, name: str) -> tuple[Line, TaskEntry]:
        line = self._line(queue_of_task(name))
        task = line.tasks.get(name)
        if task is None:
            raise ApiError("NOT_FOUND", _NOT_FOUND)
        return line, task


def _is_full(view: object) -> bool:
    if isinstance(view, str) and view.isdecimal():
        view = int(view)
    return view is not None and choice(view, "responseView", _VIEWS) == "FULL"


def _page(names: Sequence[str], query: Mapping[str, str], most: int) -> tuple[Sequence[str], str]:
    """Return the names of a page, and the token of the next one: the last name of this one."""
    size = int(number(query.get("pageSize", 0), "pageSize", least=0, most=2**31 - 1)) or most
    after = query.get("pageToken", "")
    left = [name for name in names if name > after]
    page = left[: min(size, most)]
    return page, page[-1] if len(left) > len(page) else ""


def _routes() -> Iterator[tuple[str, re.Pattern[str], str]]:
    queue, task = rf"(?P<queue>{_PARENT}/queues/[^/:]+)", rf"(?P<task>{_PARENT}/queues/[^/]+/tasks/[^/:]+)"
    tasks = rf"{queue}/tasks"
    for verb, pattern, name in (
        ("POST", rf"{_PARENT}/queues", "create_queue"),
        ("GET", rf"{_PARENT}/queues", "list_queues"),
        ("GET", queue, "get_queue"),
        ("PATCH", queue, "update_queue"),
        ("DELETE", queue, "delete_queue"),
        ("POST", rf"{queue}:purge", "purge_queue"),
        ("POST", rf"{queue}:pause", "pause_queue"),
        ("POST", rf"{queue}:resume", "resume_queue"),
        ("POST", tasks, "create_task"),
        ("POST", rf"{tasks}:batchCreate", "batch_create_tasks"),
        ("POST", rf"{tasks}:batchDelete", "batch_delete_tasks"),
        ("GET", tasks, "list_tasks"),
        ("GET", task, "get_task"),
        ("DELETE", task, "delete_task"),
        ("POST", rf"{task}:run", "run_task"),
        ("GET", rf"(?P<operation>{_PARENT}/operations/[^/]+)", "get_operation"),
    ):
        yield verb, re.compile(pattern), name


_ROUTES: Final = tuple(_routes())
