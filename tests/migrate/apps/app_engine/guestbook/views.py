"""What a visitor does."""

import google.appengine.ext.deferred

from guestbook import tasks


def close(authors):
    google.appengine.ext.deferred.defer(tasks.Letter.announce, "Closed")
    google.appengine.ext.deferred.defer(tasks.Tally("authors"), *authors)
