"""What the web does."""

from datetime import datetime, timedelta, timezone

from rq import Retry

from thumbs import tasks
from thumbs.queues import get_queue, images


class Uploads:
    def __init__(self):
        self.queue = get_queue()

    def upload(self, name):
        images.enqueue(tasks.scale, name, 100, job_timeout="2m", result_ttl=0)
        images.enqueue(
            "thumbs.tasks.scale",
            name,
            width=200,
            height=300,  # of a page
            description="large",
        )
        self.queue.enqueue_call(func=tasks.publish, args=(name, "b"), kwargs={"public": True}, timeout=30)
        tasks.tell.delay("ada")

    def later(self, name):
        self.queue.enqueue_in(timedelta(minutes=10), tasks.scale, name, 1)
        self.queue.enqueue_at(datetime.now(timezone.utc) + timedelta(hours=1), tasks.publish, args=[name])
        self.queue.enqueue(tasks.Album("summer").add, name)

    def risky(self):
        self.queue.enqueue(tasks.shaky, retry=Retry(max=3))
