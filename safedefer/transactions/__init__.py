"""Tasks that go with the user's own transaction."""
