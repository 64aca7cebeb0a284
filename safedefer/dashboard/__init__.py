"""The web dashboard: pages on which people see the queues, and act on them. ``app.dashboard()`` makes its aiohttp application.

DashboardPages are made on the server and work without JavaScript. No page imports code of the tasks, decodes an argument or shows
anything of a token that no key of ours signed.
"""

from safedefer.dashboard.access import Access

__all__ = ["Access"]
