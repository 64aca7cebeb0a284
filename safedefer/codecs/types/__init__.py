"""Types of well-known libraries, a module for each."""
