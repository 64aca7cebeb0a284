"""What the tests use of App Engine's testbed."""

from google.appengine.api import taskqueue

TASKQUEUE_SERVICE_NAME = "taskqueue"


class Testbed:
    def activate(self):
        taskqueue.TASKS.clear()
        taskqueue.NAMES.clear()

    def init_taskqueue_stub(self, root_path=None): ...

    def deactivate(self): ...

    def get_stub(self, name):
        return self

    def get_filtered_tasks(self, queue_names=None):
        return [task for task in taskqueue.TASKS if queue_names is None or task.queue_name in queue_names]

    def DeleteTask(self, queue, name):
        taskqueue.TASKS[:] = [task for task in taskqueue.TASKS if task.name != name]
