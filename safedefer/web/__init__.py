"""aiohttp: the handler that receives tasks."""
