"""Tasks of the guestbook."""

import logging

from google.appengine.api import taskqueue
from google.appengine.ext import deferred  # the library

from guestbook import store

PAGE = 2
RETRY = taskqueue.TaskRetryOptions(task_retry_limit=5, min_backoff_seconds=1)
TRIED = []


def count_words(entry_id, factor=1):
    """Counts the words of an entry."""
    store.COUNTS[entry_id] = len(store.ENTRIES[entry_id][1].split()) * factor


def sign(author, text):
    entry_id = len(store.ENTRIES) + 1
    store.ENTRIES[entry_id] = (author, text)
    deferred.defer(count_words, entry_id, factor=1, _queue="stats")
    deferred.defer(Letter(author).send, "Thank you", _countdown=60)
    return entry_id


def sign_once(author, text, token):
    """The second of two clicks defers nothing."""
    try:
        deferred.defer(
            sign,
            author,
            text,
            _name="sign-%s" % token,  # the name of the form
            _retry_options=RETRY,
        )
    except taskqueue.TaskAlreadyExistsError:
        logging.info("a second click")
        return False
    return True


class Letter(object):
    def __init__(self, to):
        self.to = to

    def send(self, text):
        store.LETTERS.append((self.to, text))

    @classmethod
    def announce(cls, text):
        for author, _ in store.ENTRIES.values():
            cls(author).send(text)


class Tally(object):
    """An object that is called."""

    def __init__(self, label):
        self.label = label

    def __call__(self, *authors):
        store.TOTALS.append((self.label, len(authors)))


def recount(after=0, total=0):
    """Goes through all entries, a page at a time."""
    page = [each for each in sorted(store.ENTRIES) if each > after][:PAGE]
    total += sum(store.COUNTS.get(each, 0) for each in page)
    if page:
        deferred.defer(recount, page[-1], total=total)
    else:
        store.TOTALS.append(("words", total))


def shaky():
    TRIED.append("shaky")
    if TRIED.count("shaky") < 3:
        raise deferred.SingularTaskFailure("try again")


def hopeless():
    TRIED.append("hopeless")
    raise deferred.PermanentTaskFailure("never")
