"""Queues: where tokens wait. A queue carries opaque bytes and decodes nothing."""
