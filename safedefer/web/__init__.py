"""The aiohttp handler, which receives tasks, and its server."""
