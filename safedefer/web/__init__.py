"""The handlers that receive tasks by HTTP (aiohttp, ASGI, WSGI), and the server of ``safedefer serve`` and ``run``."""
