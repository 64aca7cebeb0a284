"""Threads, batches and forks: what several rooms need to run things at once."""
