"""From a call to a task in the queue."""
