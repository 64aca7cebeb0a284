"""Moving to safedefer: ``safedefer migrate-code`` for the code, and ``app_engine`` for App Engine's tasks in flight.

The code is judged with ``ast`` and rewritten with libcst (extra ``migrate``), which ``edit`` alone imports. No module of the
user's is imported and nothing of it runs.
"""
