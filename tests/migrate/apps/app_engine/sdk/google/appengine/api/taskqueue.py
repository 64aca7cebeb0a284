"""What the application uses of App Engine's task queue."""


class Error(Exception): ...


class TaskAlreadyExistsError(Error): ...


class TaskRetryOptions:
    def __init__(self, *, task_retry_limit=None, min_backoff_seconds=None):
        self.task_retry_limit = task_retry_limit


class Task:
    def __init__(self, *, payload, name, queue_name, countdown):
        self.payload, self.name, self.queue_name = payload, name, queue_name


TASKS = []
NAMES = set()


def enqueue(task):
    if task.name is not None and task.name in NAMES:
        raise TaskAlreadyExistsError
    task.name = task.name or f"task{len(NAMES)}"
    NAMES.add(task.name)
    TASKS.append(task)
    return task
