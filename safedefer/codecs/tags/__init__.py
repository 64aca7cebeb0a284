"""The tags of typed values, a module for each kind of value."""
