"""The parts that belong to one web framework each: aiohttp, FastAPI, Flask, Django. A framework is imported by its own only."""
