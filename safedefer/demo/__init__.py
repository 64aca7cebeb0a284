"""The demonstration behind ``safedefer demo``: real work, and four attacks on it."""
