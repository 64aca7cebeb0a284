"""Work on pictures."""

from rq.decorators import job

from thumbs.queues import connection

DONE = []
TRIED = []


def scale(name, width, height=None):
    DONE.append(("scale", name, width, height))


def publish(*names, **options):
    DONE.append(("publish", names, options))


@job("mail", connection=connection, timeout="5m")  # by mail
def tell(user):
    DONE.append(("tell", user))


class Album:
    def __init__(self, title):
        self.title = title

    def add(self, name):
        DONE.append(("add", self.title, name))


def shaky():
    TRIED.append("shaky")
    if len(TRIED) < 2:
        raise OSError("try again")
