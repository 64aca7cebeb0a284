"""Values of well-known libraries."""
