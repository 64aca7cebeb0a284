"""``manage.py safedefer``."""
