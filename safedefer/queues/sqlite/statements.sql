-- Every statement of the SQLite engine, by name. Times are seconds since the epoch.
--
-- Another writer of the file may have stored anything. What is larger than any value of ours is not read, and empty
-- instead: tokens, headers and options above 2 MiB (MOST_ROW_BYTES), other texts above 5,000 bytes.

-- name: write_lock
-- Changes nothing.
DELETE FROM safedefer_tasks WHERE 0;

-- name: newest_seq
-- SQLite goes on from the larger one. Somebody may have written any value into the first, and any number into the second.
SELECT max(coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'safedefer_tasks'), 0),
    coalesce((SELECT max(seq) FROM safedefer_tasks), 0));

-- name: id_taken
SELECT 'waiting' FROM safedefer_tasks WHERE id = :id
UNION ALL SELECT 'dead' FROM safedefer_dead WHERE id = :id
UNION ALL SELECT 'ended' FROM safedefer_ended WHERE id = :id
LIMIT 1;

-- name: ids_taken
SELECT 1 FROM json_each(:ids)
WHERE EXISTS (SELECT 1 FROM safedefer_tasks WHERE id = value) OR EXISTS (SELECT 1 FROM safedefer_dead WHERE id = value)
    OR EXISTS (SELECT 1 FROM safedefer_ended WHERE id = value)
LIMIT 1;

-- name: blob_taken
SELECT 1 FROM safedefer_blobs WHERE id = :blob_id;

-- name: name_until
SELECT until FROM safedefer_names WHERE queue = :queue AND name = :name;

-- name: name_take
INSERT INTO safedefer_names (queue, name, until) VALUES (:queue, :name, NULL)
ON CONFLICT (queue, name) DO UPDATE SET until = NULL;

-- name: name_bury
UPDATE safedefer_names SET until = :until WHERE queue = :queue AND name = :name;

-- name: task_insert
INSERT INTO safedefer_tasks (
    id, queue, name, callable_name, url, target, audience, headers, retry_options,
    eta, created, expires, digest, blob_id, due, token, unique_key
) VALUES (
    :id, :queue, :name, :callable_name, :url, :target, :audience, :headers, :retry_options,
    :eta, :created, :expires, :digest, :blob_id, :eta, :token, :unique_key
);

-- name: tasks_insert
-- As task_insert, without a name and a unique key.
INSERT INTO safedefer_tasks (
    id, queue, callable_name, url, target, audience, headers, retry_options,
    eta, created, expires, digest, blob_id, due, token
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?);

-- name: unique_taken
SELECT id FROM safedefer_tasks WHERE queue = :queue AND unique_key = :unique_key;

-- name: blob_bytes
-- No row where the total is none that the queue has written: no blob is larger than 2 MiB. A small total is believed.
SELECT blob_bytes FROM safedefer_totals
WHERE typeof(blob_bytes) = 'integer' AND (SELECT count(*) FROM safedefer_totals) = 1
    AND (blob_bytes BETWEEN 0 AND :small OR blob_bytes BETWEEN 0 AND 2097152 * (SELECT count(*) FROM safedefer_blobs));

-- name: totals_delete
DELETE FROM safedefer_totals;

-- name: totals_count
INSERT INTO safedefer_totals (blob_bytes) SELECT coalesce(sum(octet_length(data)), 0) FROM safedefer_blobs;

-- name: blob_insert
INSERT INTO safedefer_blobs (id, task, data) VALUES (:blob_id, :seq, :data);

-- name: due_of_all
-- In one row: each step to a row is one more change of threads.
SELECT json_group_array(seq) FROM (SELECT seq FROM safedefer_tasks WHERE due <= :now ORDER BY due, seq LIMIT :limit);

-- name: due_of_queue
SELECT due, seq FROM safedefer_tasks WHERE queue = :queue AND due <= :now ORDER BY due, seq LIMIT :limit;

-- name: queues_with_tasks
-- A skip-scan: one look-up for each queue, however many tasks it has.
WITH RECURSIVE names (queue) AS (
    SELECT min(queue) FROM safedefer_tasks
    UNION ALL
    SELECT (SELECT min(queue) FROM safedefer_tasks WHERE queue > names.queue) FROM names WHERE names.queue IS NOT NULL
)
SELECT queue FROM names WHERE queue IS NOT NULL;

-- name: running_of_queue
SELECT count(*) FROM safedefer_tasks INDEXED BY safedefer_tasks_leased
WHERE queue = :queue AND owner IS NOT NULL AND due > :now;

-- name: any_control
SELECT 1 FROM safedefer_controls LIMIT 1;

-- name: controls
SELECT queue, iif(typeof(rate) IN ('real', 'integer', 'null'), rate, 0), iif(typeof(bucket_size) = 'integer', bucket_size, 0),
    iif(typeof(max_concurrent) IN ('integer', 'null'), max_concurrent, 0), iif(typeof(paused) = 'integer', paused, 0),
    iif(typeof(held_until) = 'real', held_until, 0), iif(typeof(tokens) = 'real', tokens, 0),
    iif(typeof(refilled) = 'real', refilled, 0)
FROM safedefer_controls WHERE octet_length(queue) <= 5000 ORDER BY queue;

-- name: control_of
SELECT queue, iif(typeof(rate) IN ('real', 'integer', 'null'), rate, 0), iif(typeof(bucket_size) = 'integer', bucket_size, 0),
    iif(typeof(max_concurrent) IN ('integer', 'null'), max_concurrent, 0), iif(typeof(paused) = 'integer', paused, 0),
    iif(typeof(held_until) = 'real', held_until, 0), iif(typeof(tokens) = 'real', tokens, 0),
    iif(typeof(refilled) = 'real', refilled, 0)
FROM safedefer_controls WHERE queue = :queue;

-- name: controls_with_tasks
-- Those of queues that have tasks, and no others: who writes the file can add any number of rows.
WITH RECURSIVE names (name) AS (
    SELECT min(queue) FROM safedefer_tasks
    UNION ALL
    SELECT (SELECT min(queue) FROM safedefer_tasks WHERE queue > names.name) FROM names WHERE names.name IS NOT NULL
)
SELECT queue, iif(typeof(rate) IN ('real', 'integer', 'null'), rate, 0), iif(typeof(bucket_size) = 'integer', bucket_size, 0),
    iif(typeof(max_concurrent) IN ('integer', 'null'), max_concurrent, 0), iif(typeof(paused) = 'integer', paused, 0),
    iif(typeof(held_until) = 'real', held_until, 0), iif(typeof(tokens) = 'real', tokens, 0),
    iif(typeof(refilled) = 'real', refilled, 0)
FROM names CROSS JOIN safedefer_controls ON queue = name;

-- name: controls_end_limits
UPDATE safedefer_controls SET rate = NULL, max_concurrent = NULL, bucket_size = :bucket_size, tokens = 0, refilled = :now
WHERE (rate IS NOT NULL OR max_concurrent IS NOT NULL) AND queue NOT IN (SELECT value FROM json_each(:declared));

-- name: controls_end
DELETE FROM safedefer_controls WHERE rate IS NULL AND max_concurrent IS NULL AND paused = 0 AND held_until <= :now
    AND queue NOT IN (SELECT value FROM json_each(:declared));

-- name: control_set
INSERT INTO safedefer_controls (queue, rate, bucket_size, max_concurrent, paused, held_until, tokens, refilled)
VALUES (:queue, :rate, :bucket_size, :max_concurrent, :paused, :held_until, :tokens, :refilled)
ON CONFLICT (queue) DO UPDATE
SET rate = excluded.rate, bucket_size = excluded.bucket_size, max_concurrent = excluded.max_concurrent,
    paused = excluded.paused, held_until = excluded.held_until, tokens = excluded.tokens,
    refilled = excluded.refilled;

-- name: control_delete
DELETE FROM safedefer_controls WHERE queue = :queue;

-- name: purge_next
SELECT seq, id FROM safedefer_tasks WHERE queue = :queue AND seq > :after AND seq <= :newest
ORDER BY seq LIMIT :limit;

-- name: tasks_by_seq
SELECT seq, iif(octet_length(id) > 5000, '', id), iif(octet_length(queue) > 5000, '', queue),
    iif(octet_length(name) > 5000, '', name), iif(octet_length(callable_name) > 5000, '', callable_name),
    iif(octet_length(url) > 5000, '', url), iif(octet_length(target) > 5000, '', target),
    iif(octet_length(audience) > 5000, '', audience), iif(octet_length(headers) > 2097152, '', headers),
    iif(octet_length(retry_options) > 2097152, '', retry_options), eta, created, expires,
    iif(octet_length(digest) > 5000, x'', digest),
    iif(octet_length(blob_id) > 5000, '', blob_id), due, iif(octet_length(owner) > 5000, '', owner), leased_at,
    attempts, deliveries, executions, first_attempt, rejections, first_rejection, previous_response,
    iif(octet_length(retry_reason) > 5000, '', retry_reason), iif(octet_length(token) > 2097152, x'', token),
    iif(octet_length(unique_key) > 5000, '', unique_key)
FROM safedefer_tasks WHERE seq IN (SELECT value FROM json_each(:seqs));

-- name: tasks_by_seq_together
-- The same rows in one, as JSON, and bytes in hexadecimal: each step to a row is one more change of threads. A row that is
-- larger than most (so that nothing in it is left out above), or has values of other types than ours, is null, an error, or
-- does not read back: it is read by the statement above.
SELECT json_group_array(iif(
    octet_length(id) + octet_length(queue) + coalesce(octet_length(name), 0) + octet_length(callable_name) + octet_length(url)
        + octet_length(target) + octet_length(audience) + octet_length(digest) + coalesce(octet_length(blob_id), 0)
        + coalesce(octet_length(owner), 0) + coalesce(octet_length(retry_reason), 0)
        + coalesce(octet_length(unique_key), 0) <= 5000
        AND octet_length(headers) + octet_length(retry_options) + octet_length(token) <= 65536
        AND typeof(digest) = 'blob' AND typeof(token) = 'blob',
    json_array(seq, id, queue, name, callable_name, url, target, audience, headers, retry_options, eta, created, expires,
        hex(digest), blob_id, due, owner, leased_at, attempts, deliveries, executions, first_attempt, rejections,
        first_rejection, previous_response, retry_reason, hex(token), unique_key),
    NULL
))
FROM safedefer_tasks WHERE seq IN (SELECT value FROM json_each(:seqs));

-- name: task_count
UPDATE safedefer_tasks
SET attempts = :attempts, first_attempt = :first_attempt, retry_reason = :retry_reason, previous_response = :previous_response
WHERE seq = :seq;

-- name: tasks_lease
-- Counters stop at a value that one more does not overflow, whatever somebody wrote into the file.
UPDATE safedefer_tasks
SET owner = :prefix || seq, leased_at = :now, due = :until, deliveries = min(deliveries, 2147483646) + 1
WHERE seq IN (SELECT value FROM json_each(:seqs));

-- name: task_wait
UPDATE safedefer_tasks SET due = :at WHERE seq = :seq;

-- name: unique_free
UPDATE safedefer_tasks SET unique_key = NULL WHERE seq = :seq;

-- name: task_extend
UPDATE safedefer_tasks SET due = :until WHERE id = :id AND owner = :owner;

-- name: task_standing
SELECT seq, iif(octet_length(queue) > 5000, '', queue), iif(octet_length(name) > 5000, '', name),
    iif(octet_length(audience) > 5000, '', audience), expires, iif(octet_length(digest) > 5000, x'', digest), iif(octet_length(owner) > 5000, '', owner),
    due, leased_at
FROM safedefer_tasks WHERE id = :id;

-- name: standings
-- The columns of task_standing and of ledger_find.
SELECT task.id, seq, iif(octet_length(queue) > 5000, '', queue), iif(octet_length(name) > 5000, '', name),
    iif(octet_length(task.audience) > 5000, '', task.audience), task.expires,
    iif(octet_length(task.digest) > 5000, x'', task.digest), iif(octet_length(task.owner) > 5000, '', task.owner), due, leased_at,
    iif(octet_length(entry.digest) > 5000, x'', entry.digest), state, iif(octet_length(entry.owner) > 5000, '', entry.owner),
    until, uncharged, not_before, losses, first_loss
FROM json_each(:ids) CROSS JOIN safedefer_tasks AS task ON task.id = value
LEFT JOIN safedefer_ledger AS entry ON entry.audience = task.audience AND entry.task_id = task.id;

-- name: task_retry
UPDATE safedefer_tasks
SET owner = NULL, leased_at = NULL, due = :at,
    attempts = min(attempts, 2147483646) + :charged,
    first_attempt = CASE WHEN :charged THEN coalesce(first_attempt, leased_at) ELSE first_attempt END,
    executions = min(executions, 2147483646) + :executed,
    rejections = min(rejections, 2147483646) + :rejected,
    first_rejection = CASE WHEN :rejected THEN coalesce(first_rejection, :now) ELSE first_rejection END,
    previous_response = :status,
    retry_reason = :reason
WHERE seq = :seq;

-- name: task_to_dead
-- A row of the same id that is there already is not ours: an id is in one table at a time.
INSERT OR REPLACE INTO safedefer_dead (
    id, queue, name, callable_name, url, target, audience, headers, retry_options,
    eta, created, expires, attempts, reason, ended, token
)
SELECT id, queue, name, callable_name, url, target, audience, iif(octet_length(headers) > 2097152, '', headers),
    iif(octet_length(retry_options) > 2097152, '', retry_options), eta, created, expires, min(attempts, 2147483646) + :charged, :reason, :now,
    coalesce((SELECT data FROM safedefer_blobs WHERE task = safedefer_tasks.seq AND octet_length(data) <= 2097152),
        iif(octet_length(token) > 2097152, x'', token))
FROM safedefer_tasks WHERE seq = :seq;

-- name: task_to_ended
INSERT OR REPLACE INTO safedefer_ended (
    id, queue, name, callable_name, url, target, audience, eta, created, expires, attempts, state, reason, ended
)
SELECT id, queue, name, callable_name, url, target, audience, eta, created, expires,
    min(attempts, 2147483646) + :charged, :state, :reason, :now
FROM safedefer_tasks WHERE seq = :seq;

-- name: tasks_succeeded
-- Those of the given ids and owners that succeeded, by the ledger too, without a name, whose last run is charged now.
SELECT json_group_array(task.id)
FROM json_each(:owners) AS held CROSS JOIN safedefer_tasks AS task ON task.id = held.key AND task.owner = held.value
CROSS JOIN safedefer_ledger AS entry ON entry.audience = task.audience AND entry.task_id = task.id
WHERE name IS NULL AND entry.state = 'succeeded' AND entry.uncharged;

-- name: tasks_to_ended
INSERT OR REPLACE INTO safedefer_ended (
    id, queue, name, callable_name, url, target, audience, eta, created, expires, attempts, state, ended
)
SELECT id, queue, name, callable_name, url, target, audience, eta, created, expires,
    min(attempts, 2147483646) + 1, 'succeeded', :now
FROM safedefer_tasks WHERE id IN (SELECT value FROM json_each(:ids));

-- name: tasks_delete
DELETE FROM safedefer_tasks WHERE id IN (SELECT value FROM json_each(:ids));

-- name: task_delete
DELETE FROM safedefer_tasks WHERE seq = :seq;

-- name: next_due_of_all
SELECT min(due) FROM safedefer_tasks;

-- name: next_due_of_queue
SELECT min(due) FROM safedefer_tasks WHERE queue = :queue;

-- name: stats_tasks
SELECT queue, count(*) FROM safedefer_tasks GROUP BY queue;

-- name: stats_running
SELECT queue, count(*) FROM safedefer_tasks WHERE owner IS NOT NULL AND due > :now GROUP BY queue;

-- name: stats_dead
SELECT queue, count(*) FROM safedefer_dead WHERE archived IS NULL GROUP BY queue;

-- name: stats_oldest
SELECT min(eta) FROM safedefer_tasks WHERE queue = :queue AND (owner IS NULL OR due <= :now);

-- name: view_tasks
SELECT iif(octet_length(id) > 5000, '', id), iif(octet_length(queue) > 5000, '', queue),
    iif(owner IS NULL, 'waiting', 'running'), iif(octet_length(name) > 5000, '', name),
    iif(octet_length(callable_name) > 5000, '', callable_name), iif(octet_length(url) > 5000, '', url),
    iif(octet_length(target) > 5000, '', target), iif(octet_length(audience) > 5000, '', audience),
    iif(octet_length(headers) > 2097152, '', headers),
    iif(octet_length(retry_options) > 2097152, '', retry_options), eta, created, expires, attempts,
    iif(octet_length(retry_reason) > 5000, '', retry_reason), NULL,
    coalesce((SELECT data FROM safedefer_blobs WHERE task = safedefer_tasks.seq AND octet_length(data) <= 2097152),
        iif(octet_length(token) > 2097152, x'', token)), due, seq
FROM safedefer_tasks

-- name: view_dead
SELECT iif(octet_length(id) > 5000, '', id), iif(octet_length(queue) > 5000, '', queue), 'dead',
    iif(octet_length(name) > 5000, '', name), iif(octet_length(callable_name) > 5000, '', callable_name),
    iif(octet_length(url) > 5000, '', url), iif(octet_length(target) > 5000, '', target),
    iif(octet_length(audience) > 5000, '', audience), iif(octet_length(headers) > 2097152, '', headers),
    iif(octet_length(retry_options) > 2097152, '', retry_options), eta, created, expires, attempts,
    iif(octet_length(reason) > 5000, '', reason), ended, iif(octet_length(token) > 2097152, x'', token)
FROM safedefer_dead

-- name: view_ended
SELECT iif(octet_length(id) > 5000, '', id), iif(octet_length(queue) > 5000, '', queue), state,
    iif(octet_length(name) > 5000, '', name), iif(octet_length(callable_name) > 5000, '', callable_name),
    iif(octet_length(url) > 5000, '', url), iif(octet_length(target) > 5000, '', target),
    iif(octet_length(audience) > 5000, '', audience), '{}', '{}', eta, created, expires, attempts,
    iif(octet_length(reason) > 5000, '', reason), ended, x''
FROM safedefer_ended

-- name: ends
SELECT iif(octet_length(queue) > 5000, '', queue), state, CAST((ended - :since) / :step AS INTEGER) AS number, count(*) FROM (
    SELECT queue, state, ended FROM (
        SELECT queue, state, ended FROM safedefer_ended WHERE ended >= :since AND ended < 1e15 ORDER BY ended DESC LIMIT :most
    ) UNION ALL SELECT queue, 'dead', ended FROM (
        SELECT queue, ended FROM safedefer_dead
        WHERE archived IS NULL AND ended >= :since AND ended < 1e15 ORDER BY ended DESC LIMIT :most
    )
) GROUP BY 1, 2, 3;

-- name: attempt_times
SELECT iif(octet_length(audience) > 5000, '', audience), ended - started FROM (
    SELECT audience, started, ended FROM safedefer_attempts ORDER BY seq DESC LIMIT :most
) WHERE ended >= :since AND ended < 1e15 AND started < 1e15 AND started >= 0;

-- name: notice_put
INSERT INTO safedefer_notices (process, text, at) VALUES (:process, :text, :now)
ON CONFLICT (process) DO UPDATE SET text = excluded.text, at = excluded.at;

-- name: notice_delete
DELETE FROM safedefer_notices WHERE process = :process;

-- name: notices_prune
-- One of the future is of a clock that was wrong, or was written by somebody else.
DELETE FROM safedefer_notices WHERE process IN (
    SELECT process FROM safedefer_notices WHERE at < :before OR at > :after LIMIT 500
);

-- name: notices
SELECT iif(octet_length(process) > 800, '', process), iif(octet_length(text) > 8192, '', text), at
FROM safedefer_notices WHERE at >= :since ORDER BY at DESC LIMIT :most;

-- name: dead_letters
SELECT iif(octet_length(id) > 5000, '', id), iif(octet_length(queue) > 5000, '', queue), 'dead',
    iif(octet_length(name) > 5000, '', name), iif(octet_length(callable_name) > 5000, '', callable_name),
    iif(octet_length(url) > 5000, '', url), iif(octet_length(target) > 5000, '', target),
    iif(octet_length(audience) > 5000, '', audience), iif(octet_length(headers) > 2097152, '', headers),
    iif(octet_length(retry_options) > 2097152, '', retry_options), eta, created, expires, attempts,
    iif(octet_length(reason) > 5000, '', reason), ended, iif(octet_length(token) > 2097152, x'', token)
FROM safedefer_dead
WHERE (archived IS NOT NULL) = :archived AND octet_length(id) <= 5000
    AND (:queue IS NULL OR queue = :queue)
    AND (:reason IS NULL OR reason = :reason)
    AND (:callable_name IS NULL OR callable_name = :callable_name)
    AND ended >= :since AND (:before IS NULL OR ended < :before) AND (ended, id) > (:after_ended, :after_id)
ORDER BY ended, id LIMIT :limit;

-- name: dead_archive_old
UPDATE safedefer_dead SET archived = :now WHERE seq IN (
    SELECT seq FROM safedefer_dead WHERE archived IS NULL AND ended < :before ORDER BY ended, id LIMIT :limit
);

-- name: dead_archive_excess
UPDATE safedefer_dead SET archived = :now WHERE seq IN (
    SELECT seq FROM safedefer_dead WHERE archived IS NULL ORDER BY ended DESC, id DESC LIMIT :limit OFFSET :keep
);

-- name: dead_delete
DELETE FROM safedefer_dead WHERE id = :id;

-- name: attempt_insert
-- With the fields of an AttemptRecord; of one or of several.
WITH record (task_id, audience, started, ended, outcome, status, reason, exception_type, traceback) AS (
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
)
INSERT INTO safedefer_attempts (
    task_id, audience, started, ended, outcome, status, reason, exception_type, traceback, stray
)
SELECT *, NOT (
        EXISTS (SELECT 1 FROM safedefer_tasks WHERE id = task_id)
        OR EXISTS (SELECT 1 FROM safedefer_dead WHERE id = task_id)
        OR EXISTS (SELECT 1 FROM safedefer_ended WHERE id = task_id)
    )
FROM record;

-- name: attempts_trim
DELETE FROM safedefer_attempts WHERE task_id = ?1 AND seq <= (
    SELECT seq FROM safedefer_attempts WHERE task_id = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2
);

-- name: attempts_of
-- The newest 100 (RECORDS_KEPT). A traceback of ours has 16,390 characters at most.
SELECT task_id, iif(octet_length(audience) > 5000, '', audience), started, ended,
    iif(octet_length(outcome) > 5000, '', outcome), status, iif(octet_length(reason) > 5000, '', reason),
    iif(octet_length(exception_type) > 5000, '', exception_type), iif(octet_length(traceback) > 100000, '', traceback)
FROM (SELECT * FROM safedefer_attempts WHERE task_id = :id ORDER BY seq DESC LIMIT 100) ORDER BY seq;

-- name: attempts_last_reason
SELECT iif(octet_length(reason) > 5000, '', reason) FROM safedefer_attempts WHERE task_id = :id ORDER BY seq DESC LIMIT 1;

-- name: ledger_find
SELECT iif(octet_length(digest) > 5000, x'', digest), state, iif(octet_length(owner) > 5000, '', owner), until, uncharged,
    not_before, losses, first_loss
FROM safedefer_ledger WHERE audience = :audience AND task_id = :task_id;

-- name: ledger_cancelled
-- Reads no value: one that cannot be read must not keep the others' cancellations from being seen.
SELECT 1 FROM safedefer_ledger WHERE audience = :audience AND task_id = :task_id AND state = 'cancelled';

-- name: ledger_begin_first
-- With the fields of an Execution, and the end of its lease; of one or of several.
WITH run (audience, task_id, digest, owner, expires, until) AS (VALUES (?, ?, ?, ?, ?, ?))
INSERT INTO safedefer_ledger (audience, task_id, digest, state, owner, expires, until, uncharged)
SELECT audience, task_id, digest, 'running', owner, expires, until, 1 FROM run WHERE true
ON CONFLICT (audience, task_id) DO NOTHING;

-- name: ledger_begin
UPDATE safedefer_ledger SET state = 'running', owner = :owner, until = :until, uncharged = 1, not_before = 0
WHERE audience = :audience AND task_id = :task_id;

-- name: ledger_extend
UPDATE safedefer_ledger SET until = :until
WHERE audience = :audience AND task_id = :task_id AND owner = :owner AND state = 'running';

-- name: ledger_finish
-- As rules.end_counts says. A retry of a task that has no row is settled by nobody: whoever posts it tries again.
-- The state is that which the run ends with, and `owed` whether it is still to be charged; of one run or of several.
WITH run (audience, task_id, digest, owner, state, owed) AS (VALUES (?, ?, ?, ?, ?, ?))
UPDATE safedefer_ledger AS entry
SET state = run.state, owner = NULL, until = 0, losses = 0, first_loss = NULL,
    uncharged = min(uncharged, owed, run.state <> 'retry' OR EXISTS (SELECT 1 FROM safedefer_tasks WHERE id = run.task_id))
FROM run
WHERE entry.audience = run.audience AND entry.task_id = run.task_id AND entry.digest = run.digest AND (
    (entry.state = 'running' AND entry.owner = run.owner) OR (run.state <> 'retry' AND entry.state IN ('running', 'retry'))
);

-- name: ledger_lives
-- A run that was taken for lost ended, or asked for more time.
UPDATE safedefer_ledger SET losses = 0, first_loss = NULL
WHERE audience = :audience AND task_id = :task_id AND digest = :digest AND losses > 0;

-- name: ledger_lost
UPDATE safedefer_ledger SET uncharged = 0, attempts = :attempts, losses = :losses, first_loss = :first_loss
WHERE audience = :audience AND task_id = :task_id AND uncharged = 1;

-- name: ledger_retry
UPDATE safedefer_ledger
SET uncharged = min(uncharged, :owed), not_before = coalesce(:not_before, not_before),
    attempts = (SELECT attempts FROM safedefer_tasks WHERE seq = :seq)
WHERE audience = :audience AND task_id = :task_id;

-- name: leases_release
UPDATE safedefer_tasks SET due = :now
WHERE owner IS NOT NULL AND due > :now AND substr(owner, 1, length(:prefix)) = :prefix AND NOT EXISTS (
    SELECT 1 FROM safedefer_ledger AS entry
    WHERE entry.audience = safedefer_tasks.audience AND entry.task_id = safedefer_tasks.id AND entry.uncharged
);

-- name: ledger_end
INSERT INTO safedefer_ledger (audience, task_id, digest, state, expires)
VALUES (:audience, :task_id, :digest, :state, :expires)
ON CONFLICT (audience, task_id) DO UPDATE
SET state = excluded.state, owner = NULL, until = 0, uncharged = 0
WHERE state IN ('running', 'retry');

-- name: ledger_replace
-- The task was re-run as another one: it counts as cancelled.
INSERT INTO safedefer_ledger (audience, task_id, digest, state, expires)
VALUES (:audience, :task_id, :digest, 'cancelled', :expires)
ON CONFLICT (audience, task_id) DO UPDATE SET state = 'cancelled', owner = NULL, until = 0, uncharged = 0;

-- name: ledger_cancel
-- A run that began stays uncharged: the end of its delivery charges it.
INSERT INTO safedefer_ledger (audience, task_id, digest, state, expires)
VALUES (:audience, :task_id, :digest, 'cancelled', :expires)
ON CONFLICT (audience, task_id) DO UPDATE
SET state = 'cancelled', owner = NULL, until = 0
WHERE state IN ('running', 'retry');

-- name: ledger_prune
-- What has a dead letter keeps its entry, the proof that it died.
DELETE FROM safedefer_ledger WHERE (audience, task_id) IN (
    SELECT audience, task_id FROM safedefer_ledger
    WHERE expires < :before AND NOT (state = 'running' AND until > :now)
        AND NOT EXISTS (SELECT 1 FROM safedefer_dead WHERE id = task_id)
    LIMIT :limit
);

-- name: names_prune
DELETE FROM safedefer_names WHERE (queue, name) IN (
    SELECT queue, name FROM safedefer_names WHERE until IS NOT NULL AND until <= :now LIMIT :limit
);

-- name: attempts_of_ended_prune
-- Runs right before ended_prune, and so sees the same rows.
DELETE FROM safedefer_attempts WHERE task_id IN (
    SELECT id FROM safedefer_ended WHERE ended < :before ORDER BY ended, seq LIMIT :limit
);

-- name: ended_prune
DELETE FROM safedefer_ended WHERE seq IN (
    SELECT seq FROM safedefer_ended WHERE ended < :before ORDER BY ended, seq LIMIT :limit
);

-- name: attempts_stray_prune
DELETE FROM safedefer_attempts WHERE seq IN (
    SELECT seq FROM safedefer_attempts WHERE stray AND ended < :before LIMIT :limit
);

-- name: attempts_become_stray
UPDATE safedefer_attempts SET stray = 1 WHERE task_id = :id;

-- name: blob_get
SELECT data FROM safedefer_blobs WHERE id = :id AND octet_length(data) <= 2097152;

-- name: blob_delete
DELETE FROM safedefer_blobs WHERE id = :id;

-- name: numbers_bad
-- Whether a task has a number that is none of ours, or the next one would have.
SELECT 1 FROM safedefer_tasks WHERE seq NOT BETWEEN 0 AND :most
UNION ALL SELECT 1 FROM sqlite_sequence
WHERE name = 'safedefer_tasks' AND (typeof(seq) <> 'integer' OR seq NOT BETWEEN 0 AND :most)
LIMIT 1;

-- name: numbers_of_blobs
WITH anew (old, new) AS (
    SELECT seq, row_number() OVER (ORDER BY seq) + :step
        + (SELECT coalesce(max(seq), 0) FROM safedefer_tasks WHERE seq BETWEEN 0 AND :most)
    FROM safedefer_tasks WHERE seq NOT BETWEEN 0 AND :most
)
UPDATE safedefer_blobs SET task = anew.new FROM anew WHERE task = anew.old;

-- name: numbers_of_tasks
WITH anew (old, new) AS (
    SELECT seq, row_number() OVER (ORDER BY seq) + :step
        + (SELECT coalesce(max(seq), 0) FROM safedefer_tasks WHERE seq BETWEEN 0 AND :most)
    FROM safedefer_tasks WHERE seq NOT BETWEEN 0 AND :most
)
UPDATE safedefer_tasks SET seq = anew.new FROM anew WHERE seq = anew.old;

-- name: numbers_go_on
UPDATE sqlite_sequence SET seq = :step + (SELECT coalesce(max(seq), 0) FROM safedefer_tasks) WHERE name = 'safedefer_tasks';

-- name: kept_get
SELECT key, value FROM safedefer_kept
WHERE key IN (SELECT value FROM json_each(:keys)) AND octet_length(value) <= 2097152;

-- name: kept_put
INSERT INTO safedefer_kept (key, expires, value) VALUES (:key, :expires, :value)
ON CONFLICT (key) DO UPDATE SET expires = excluded.expires, value = excluded.value;

-- name: kept_blob_bytes
-- The length of a value is in its row: none of it is read.
SELECT coalesce(sum(octet_length(value)), 0) FROM safedefer_kept WHERE key >= 'blob:' AND key < 'blob;' AND key <> :key;

-- name: kept_delete
DELETE FROM safedefer_kept WHERE key IN (SELECT value FROM json_each(:keys));

-- name: kept_prune
DELETE FROM safedefer_kept WHERE key IN (SELECT key FROM safedefer_kept WHERE expires < :before LIMIT :limit);

-- name: copies_put
INSERT INTO safedefer_copies (audience, task_id, due, looks, task) VALUES (:audience, :task_id, :due, 0, :task)
ON CONFLICT (audience, task_id) DO UPDATE SET due = excluded.due, looks = 0, task = excluded.task;

-- name: copies_due
-- A copy above 4 MiB is none of ours: a token as large as any (MOST_ROW_BYTES), and what stands beside it.
-- With the place of each; and whether it is none of ours, by its size, or what the ledger says of its task.
SELECT copy.rowid, iif(octet_length(copy.audience) > 5000, '', copy.audience), iif(octet_length(copy.task_id) > 5000, '', copy.task_id),
    copy.looks, CASE
        WHEN octet_length(copy.audience) > 5000 OR octet_length(copy.task_id) > 5000 OR octet_length(copy.task) > 4194304 THEN 'odd'
        WHEN entry.state IN ('succeeded', 'failed', 'cancelled') THEN 'ended'
        WHEN entry.state = 'running' AND entry.until > :now THEN 'running'
        ELSE 'open'
    END
FROM (SELECT rowid, * FROM safedefer_copies WHERE due <= :now ORDER BY due LIMIT :limit) AS copy
LEFT JOIN safedefer_ledger AS entry ON entry.audience = copy.audience AND entry.task_id = copy.task_id;

-- name: copies_task
SELECT task FROM safedefer_copies WHERE rowid = ?1;

-- name: copies_looked
UPDATE safedefer_copies SET due = ?1, looks = ?2 WHERE rowid = ?3;

-- name: copies_forget
DELETE FROM safedefer_copies WHERE rowid = ?1;

-- name: copies_put_off
UPDATE safedefer_copies SET due = ?1 WHERE audience = ?2 AND task_id = ?3;

-- name: copies_delete
DELETE FROM safedefer_copies WHERE audience = ?1 AND task_id = ?2;

-- name: dead_bury
-- A task that has no row, since a push engine delivers it. A letter whose token was verified takes the place of another one.
INSERT INTO safedefer_dead (
    id, queue, name, callable_name, url, target, audience, headers, retry_options,
    eta, created, expires, attempts, reason, ended, token
)
SELECT :id, :queue, :name, :callable_name, :url, :target, :audience, :headers, :retry_options,
    :eta, :created, :expires, :attempts, :reason, :now, :token
WHERE :verified OR NOT (
    EXISTS (SELECT 1 FROM safedefer_tasks WHERE id = :id) OR EXISTS (SELECT 1 FROM safedefer_ended WHERE id = :id)
    OR EXISTS (SELECT 1 FROM safedefer_dead WHERE id = :id)
)
ON CONFLICT (id) DO UPDATE SET queue = excluded.queue, name = excluded.name, callable_name = excluded.callable_name,
    url = excluded.url, target = excluded.target, audience = excluded.audience, headers = excluded.headers,
    retry_options = excluded.retry_options, eta = excluded.eta, created = excluded.created, expires = excluded.expires,
    attempts = excluded.attempts, reason = excluded.reason, ended = excluded.ended, token = excluded.token, archived = NULL;

-- name: attempts_have_letter
UPDATE safedefer_attempts SET stray = 0 WHERE task_id = :id AND stray;

-- name: name_free
DELETE FROM safedefer_names WHERE queue = :queue AND name = :name AND until IS NULL;

-- name: ledger_settle_retry
UPDATE safedefer_ledger SET uncharged = 0 WHERE audience = :audience AND task_id = :task_id AND state = 'retry';

-- name: ledger_is_lost
-- As rules.is_lost says. Reads no value: one that cannot be read must not keep the other tasks from their runs.
SELECT 1 FROM safedefer_ledger
WHERE audience = :audience AND task_id = :task_id AND digest = :digest AND state = 'running' AND uncharged AND until <= :now;
