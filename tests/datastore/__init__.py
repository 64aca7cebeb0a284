"""Transactional tasks in Datastore: the real google-cloud-ndb against a Datastore server in memory."""
