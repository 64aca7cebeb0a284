"""A verified task becomes an outcome."""
