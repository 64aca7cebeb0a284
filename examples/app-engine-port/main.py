"""The app: what the tasks may be, and an ndb context around each run."""

import safedefer
from safedefer import App, Policy

POLICY = Policy("scores", "google.cloud.ndb.model:Model._put")


def make_app(client, keyring, queue="sqlite:///tasks.db"):
    """Return the app of ``scores``, and have ``deferred.defer`` use it."""
    app = App(
        keyring=keyring,
        policy=POLICY,
        queue=queue,
        environment="example",
        around=[client.context],
    )
    safedefer.configure(app)
    return app
