"""App Engine's deferred, as its documentation says: a task is a pickle of a callable and its arguments."""

import pickle
import types

from google.appengine.api import taskqueue


class Error(Exception): ...


class PermanentTaskFailure(Error): ...


class SingularTaskFailure(Error): ...


def invoke_member(obj, membername, *args, **kwargs):
    return getattr(obj, membername)(*args, **kwargs)


def serialize(obj, *args, **kwargs):
    if isinstance(obj, types.MethodType) or (
        isinstance(obj, types.BuiltinMethodType) and not isinstance(obj.__self__, types.ModuleType)
    ):
        return pickle.dumps((invoke_member, (obj.__self__, obj.__name__, *args), kwargs))
    return pickle.dumps((obj, args, kwargs))


def run(data):
    try:
        func, args, kwargs = pickle.loads(data)
    except Exception as error:
        raise PermanentTaskFailure(error) from error
    return func(*args, **kwargs)


def defer(obj, *args, **kwargs):
    name, queue = kwargs.pop("_name", None), kwargs.pop("_queue", "default")
    countdown = kwargs.pop("_countdown", None)
    kwargs.pop("_retry_options", None)
    payload = serialize(obj, *args, **kwargs)
    return taskqueue.enqueue(taskqueue.Task(payload=payload, name=name, queue_name=queue, countdown=countdown))
