"""A model of the Cloud Tasks v2 REST API, for development and tests without Google's service.

It behaves as Google documents, and names where. ``types`` is the documentation in google-cloud-tasks 2.26
(``google.cloud.tasks_v2.types``), ``client`` that of ``CloudTasksClient`` in it, ``handlers`` are the pages
*Create HTTP target tasks* and *Create App Engine task handlers*, ``quotas`` the page *Quotas and limits* of
https://cloud.google.com/tasks/docs, ``AIP`` are https://google.aip.dev's.

==========================================================================  ==========================================
behaviour                                                                   source
==========================================================================  ==========================================
names of queues and tasks                                                   types: ``Queue.name``, ``Task.name``
a name in use, or used in the last 24 hours: ALREADY_EXISTS                 types: ``CreateTaskRequest.task``
9 days instead, where queue.yaml made the queue                             the same
GetTask of an ended task: NOT_FOUND                                         client: ``get_task``
DeleteTask of a task that ended: NOT_FOUND                                  client: ``delete_task``
``scheduleTime``: the past is now; at most 30 days ahead                    the same; quotas
tasks are deleted after 31 days                                             client: ``create_queue``; quotas
a deleted queue's name is not free for 3 days                               client: ``delete_queue``
UpdateQueue makes a queue that is not there                                 client: ``update_queue``
a task is at most 100 KB to App Engine, about 1 MB to HTTP targets          client: ``create_task``; quotas
headers below 80 KB, URLs up to 2,083 characters, bodies by method          types: ``HttpRequest``, ``AppEngineHttpRequest``
``dispatchDeadline``: 15 s to 30 min, App Engine to 24 h 15 s; 10 min       types: ``Task.dispatch_deadline``
backoff of 10, 20, 40, 80, 160, 240, 300 s for 10 s, 300 s, 3 doublings     types: ``RetryConfig.max_doublings``
backoffs are truncated to whole seconds                                     types: ``RetryConfig.min_backoff``
given up when attempts and duration are both exceeded; -1 is unlimited      types: ``RetryConfig.max_attempts``
a task's own ``retryConfig`` counts instead of its queue's                  types: ``Task.retry_config``
token bucket; burst as large as the rate, or queue.yaml's bucket            types: ``RateLimits``
at most 500 dispatches a second, 5,000 at once                              the same
``Retry-After`` is considered; 429 and 503 slow the queue                   types: ``HttpRequest``
of App Engine's answers only 503 slows the queue                            types: ``AppEngineHttpRequest``
a paused queue takes tasks, and dispatches none                             types: ``Queue.State``
RunTask dispatches though paused, running or limited                        client: ``run_task``
PurgeQueue deletes what was created before                                  client: ``purge_queue``
BatchCreateTasks: up to 100, each by itself, failures by index              types: ``BatchCreateTasksMetadata``
BatchDeleteTasks: up to 1,000, each by itself                               client: ``batch_delete_tasks``
the body is left out of the BASIC view                                      types: ``Task.View``
request headers, and those that a task cannot set                           handlers; types: ``HttpRequest.headers``
``TaskRetryCount`` counts dispatches before this one                        handlers
``TaskExecutionCount``: answers; to HTTP targets without 5xx                handlers
OIDC: RS256, an hour, ``aud`` the URL unless given, ``email_verified``      types: ``OidcToken``; Google's *OpenID Connect*
errors: ``{"error": {"code", "message", "status"}}``                        AIP-193
==========================================================================  ==========================================

Where Google says that there is an effect and not how large it is, the size is ours: 429 and 503 halve the rate of their
queue, and each success doubles it up to what is configured. Redirects "may be followed"; here they are failures.
Queue-level ``httpTarget`` is not modelled, and refused.
"""
