"""Threads, batches and forks: tools for concurrent work, without knowledge of tasks."""
