-- The statements of the PostgreSQL queue. The jobs are pgqueuer's, in its tables in the schema safedefer; the tables beside
-- them are in schema.sql. Placeholders are PostgreSQL's own ($1), for every driver.
--
-- Tasks due in more than 5 s are parked under the entrypoint `queue@later`, indexed by due time, and promoted to `queue` when
-- they are due. pgqueuer walks the jobs of an entrypoint in the order of their ids, past those that are not due: without
-- parking, a million waiting tasks would be walked by each lease.
--
-- Each statement looks up as many rows as it is given, by index. The planner's row counts are stale, because the tables grow
-- and shrink faster than they are analyzed: so connections turn off sequential scans, hash joins and merge joins, and
-- OFFSET 0 keeps the planner from turning a look-up into a scan.
--
-- The statements that every task costs take each column as one text, split at the separator $1. string_to_array makes NULL
-- of an empty text: hence coalesce(given.x, '').
--
-- Leases, etas and rates go by the database's clock (now()), which all machines share. Times of tombstones, history and
-- records are seconds since the epoch, by the clock of the process that wrote them.
--
-- Another writer of the tables may have stored anything. One row must not stop the others: no value above 2 MiB
-- (MOST_ROW_BYTES) is fetched, long texts are cut, and numbers and times are bounded before they are calculated with.
-- Headers are jsonb, whose length is known only when it is unpacked: so its packed size is looked at first.

-- name: admit
safedefer.admit(
    $2::text[], $5::text[], $13::text[], $7::text[], $8::double precision[], $9::text[], $10::text[], $11::bytea[], $12::bigint
)

-- name: sync_commits
-- A role, a database or the server may have turned the waiting for the disk off, for commits that can be lost, or may do so
-- while the connection is there: so it is set in any case. Who says so in the parameters of our own connections ('client')
-- means them.
SELECT set_config('synchronous_commit', CASE setting WHEN 'off' THEN 'on' ELSE setting END, false)
FROM pg_catalog.pg_settings WHERE name = 'synchronous_commit' AND source <> 'client';

-- name: stored
-- Counts the given ids that are in the queue, among the dead letters or in the history.
SELECT count(*) AS number FROM unnest($1::text[]) AS given (id) WHERE
    EXISTS (SELECT FROM safedefer.pgqueuer AS job
            WHERE job.dedupe_key = given.id AND job.status IN ('queued', 'picked') OFFSET 0)
    OR EXISTS (SELECT FROM safedefer.dead WHERE dead.id = given.id OFFSET 0)
    OR EXISTS (SELECT FROM safedefer.ended WHERE ended.id = given.id OFFSET 0);

-- name: look
-- The state before a lease, and the first part of `pick_free` (pgqueuer.py), whose parameters are those of pgqueuer's dequeue:
-- $4 is the length of a lease. Queues that have jobs (a skip scan: one look-up per queue, whatever its length), and leases that have
-- run out or will within a second. A job of the latter that the lease then picks was lost by its dispatcher.
WITH RECURSIVE names (queue) AS (
    SELECT (SELECT min(entrypoint) FROM safedefer.pgqueuer WHERE status = 'queued')
    UNION ALL
    SELECT (
        SELECT min(job.entrypoint) FROM safedefer.pgqueuer AS job
        WHERE job.status = 'queued' AND job.entrypoint > names.queue
    ) FROM names WHERE names.queue IS NOT NULL
), stale AS (
    SELECT id, entrypoint,
        round(extract(epoch FROM greatest(least(updated, now()), timestamptz 'epoch')), 3)::double precision AS leased
    FROM safedefer.pgqueuer
    WHERE status = 'picked' AND heartbeat < now() - $4::interval + interval '1 second' AND execute_after < now()
)
SELECT
    ARRAY (
        SELECT split_part(queue, '@', 1) FROM names WHERE queue IS NOT NULL UNION SELECT entrypoint FROM stale
    ) AS queues,
    ARRAY (
        SELECT queue FROM names WHERE queue LIKE '%@later' AND EXISTS (
            SELECT FROM safedefer.pgqueuer AS job
            WHERE job.entrypoint = names.queue AND job.status = 'queued' AND job.execute_after <= now() OFFSET 0
        )
    ) AS fallen_due,
    ARRAY (SELECT id FROM stale ORDER BY id) AS stale,
    ARRAY (SELECT leased FROM stale ORDER BY id) AS leased,
    EXISTS (SELECT FROM safedefer.controls) AS controlled,
    extract(epoch FROM now())::double precision AS now;

-- name: claimed
SELECT id, dedupe_key, entrypoint,
    CASE WHEN pg_column_size(headers) <= 2097152 AND octet_length(headers::text) <= 2097152 THEN headers END AS headers,
    CASE WHEN octet_length(payload) <= 2097152 THEN payload END AS payload, attempts, updated
FROM claimed;

-- name: look_and_claimed
-- Ends `pick_free` (pgqueuer.py): one row of `look`, then the jobs that it picked at once.
SELECT seen.*, NULL::bigint AS id, NULL::text AS dedupe_key, NULL::text AS entrypoint, NULL::jsonb AS headers,
    NULL::bytea AS payload, NULL::integer AS attempts, NULL::timestamptz AS updated FROM seen
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, needed.* FROM needed;

-- name: available
-- The queues to pick from at once: none while any queue has a control, or parked jobs that are due and must be promoted before.
SELECT queue AS entrypoint FROM seen CROSS JOIN unnest(seen.queues) AS queue
WHERE NOT seen.controlled AND seen.fallen_due = '{}' AND ($2::text[] IS NULL OR queue = ANY ($2));

-- name: promote
-- Moves parked jobs that are due to their queue, the longest due first.
UPDATE safedefer.pgqueuer SET entrypoint = split_part(entrypoint, '@', 1) WHERE id IN (
    SELECT due.id FROM unnest($1::text[]) AS aside (entrypoint) CROSS JOIN LATERAL (
        SELECT job.id FROM safedefer.pgqueuer AS job
        WHERE job.entrypoint = aside.entrypoint AND job.status = 'queued' AND job.execute_after <= now()
        ORDER BY job.execute_after LIMIT $2 FOR UPDATE SKIP LOCKED
    ) AS due
);

-- name: park
UPDATE safedefer.pgqueuer SET entrypoint = entrypoint || '@later'
WHERE id = ANY ($1::bigint[]) AND status = 'queued' AND entrypoint NOT LIKE '%@later';

-- name: clock
SELECT extract(epoch FROM now())::double precision AS now;

-- name: controls
SELECT queue, rate, bucket_size, max_concurrent, paused, held_until, tokens, refilled
FROM safedefer.controls WHERE octet_length(queue) <= 5000 ORDER BY queue;

-- name: controls_of
-- Of some queues, and no others: who writes the table can add any number of rows.
SELECT queue, rate, bucket_size, max_concurrent, paused, held_until, tokens, refilled
FROM safedefer.controls WHERE queue = ANY ($1::text[]) ORDER BY queue;

-- name: controls_lock
SELECT queue, rate, bucket_size, max_concurrent, paused, held_until, tokens, refilled
FROM safedefer.controls WHERE queue = ANY ($1::text[]) ORDER BY queue FOR UPDATE;

-- name: controls_lock_all
-- Lock order: controls by name.
SELECT count(*) AS locked FROM (SELECT FROM safedefer.controls ORDER BY queue FOR UPDATE) AS control;

-- name: controls_end_limits
UPDATE safedefer.controls SET rate = NULL, max_concurrent = NULL, bucket_size = $2, tokens = 0, refilled = $3
WHERE (rate IS NOT NULL OR max_concurrent IS NOT NULL) AND queue <> ALL ($1::text[]);

-- name: controls_end
DELETE FROM safedefer.controls
WHERE rate IS NULL AND max_concurrent IS NULL AND NOT paused AND held_until <= $2 AND queue <> ALL ($1::text[]);

-- name: control_set
INSERT INTO safedefer.controls (queue, rate, bucket_size, max_concurrent, paused, held_until, tokens, refilled)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
ON CONFLICT (queue) DO UPDATE
SET rate = excluded.rate, bucket_size = excluded.bucket_size, max_concurrent = excluded.max_concurrent,
    paused = excluded.paused, held_until = excluded.held_until, tokens = excluded.tokens, refilled = excluded.refilled;

-- name: control_delete
DELETE FROM safedefer.controls WHERE queue = $1;

-- name: running
-- Counts the leases of each queue that last: one that has run out can be leased again at once.
SELECT entrypoint AS queue, count(*) AS running FROM safedefer.pgqueuer
WHERE status = 'picked' AND entrypoint = ANY ($1::text[]) AND heartbeat >= now() - $2::interval GROUP BY entrypoint;

-- name: over_cap
-- Jobs whose lease has run out, and that a lease would take beyond the cap of their queue, because the cap was lowered since.
SELECT job.id FROM unnest($1::text[], $2::bigint[]) AS given (queue, cap) CROSS JOIN LATERAL (
    SELECT id, heartbeat < now() - $3::interval AS lost,
        row_number() OVER (ORDER BY heartbeat < now() - $3::interval, id) AS place
    FROM safedefer.pgqueuer WHERE entrypoint = given.queue AND status = 'picked'
) AS job WHERE given.cap > 0 AND job.lost AND job.place > given.cap;

-- name: progress
SELECT job_id, least(greatest(attempts, 0), 2147483647) AS attempts, least(greatest(deliveries, 0), 2147483647) AS deliveries,
    least(greatest(executions, 0), 2147483647) AS executions, first_attempt,
    least(greatest(rejections, 0), 2147483647) AS rejections, first_rejection, previous_response,
    left(retry_reason, 1000) AS retry_reason
FROM safedefer.progress WHERE job_id = ANY ($1::bigint[]);

-- name: progress_set
INSERT INTO safedefer.progress (
    job_id, attempts, deliveries, executions, first_attempt, rejections, first_rejection, previous_response, retry_reason
)
SELECT * FROM json_to_recordset($1::json) AS given (
    job_id bigint, attempts bigint, deliveries bigint, executions bigint, first_attempt double precision,
    rejections bigint, first_rejection double precision, previous_response integer, retry_reason text
)
ON CONFLICT (job_id) DO UPDATE
SET attempts = excluded.attempts, deliveries = excluded.deliveries, executions = excluded.executions,
    first_attempt = excluded.first_attempt, rejections = excluded.rejections,
    first_rejection = excluded.first_rejection, previous_response = excluded.previous_response,
    retry_reason = excluded.retry_reason;

-- name: progress_delete
DELETE FROM safedefer.progress WHERE job_id = ANY ($1::bigint[]);

-- name: extend
-- Prolong leases that are still ours. Lock order: jobs by ascending id, as settlements lock them.
WITH held AS MATERIALIZED (
    SELECT job.id
    FROM (
        SELECT * FROM json_to_recordset($1::json) AS given (id bigint, manager uuid, updated bigint) ORDER BY id
    ) AS lease
    CROSS JOIN LATERAL (
        SELECT id, status, queue_manager_id, updated FROM safedefer.pgqueuer WHERE pgqueuer.id = lease.id FOR UPDATE OFFSET 0
    ) AS job
    WHERE job.queue_manager_id = lease.manager AND job.status = 'picked'
        AND job.updated = timestamptz 'epoch' + lease.updated * interval '1 microsecond'
)
UPDATE safedefer.pgqueuer SET heartbeat = now() WHERE id = ANY (ARRAY (SELECT id FROM held))
RETURNING id, round(extract(epoch FROM updated) * 1000000)::bigint AS updated;

-- name: held
-- Locks the jobs whose lease is still held, by ascending id, and returns them with the state of their ledger entry.
SELECT job.id, entry.state, entry.uncharged, entry.until > now() AS alive
FROM (
    SELECT * FROM json_to_recordset($1::json)
        AS given (id bigint, manager uuid, updated bigint, audience text, task_id text) ORDER BY id
) AS lease
CROSS JOIN LATERAL (
    SELECT id, status, queue_manager_id, updated FROM safedefer.pgqueuer WHERE pgqueuer.id = lease.id FOR UPDATE OFFSET 0
) AS job
LEFT JOIN safedefer.ledger AS entry ON entry.audience = lease.audience AND entry.task_id = lease.task_id
WHERE job.queue_manager_id = lease.manager AND job.status = 'picked'
    AND job.updated = timestamptz 'epoch' + lease.updated * interval '1 microsecond';

-- name: waiting_of
-- Locks the given tasks that wait or whose lease has run out, by ascending id.
SELECT job.id, job.dedupe_key, job.entrypoint,
    CASE WHEN pg_column_size(job.headers) <= 2097152 AND octet_length(job.headers::text) <= 2097152 THEN job.headers END AS headers,
    CASE WHEN octet_length(job.payload) <= 2097152 THEN job.payload END AS payload
FROM safedefer.pgqueuer AS job
WHERE job.dedupe_key = ANY ($1::text[])
    AND (job.status = 'queued' OR (job.status = 'picked' AND job.heartbeat < now() - $2::interval))
ORDER BY job.id FOR UPDATE OF job;

-- name: living_of
-- Locks the given tasks that have not ended, by ascending id.
SELECT job.id, job.dedupe_key, job.entrypoint,
    CASE WHEN pg_column_size(job.headers) <= 2097152 AND octet_length(job.headers::text) <= 2097152 THEN job.headers END AS headers,
    CASE WHEN octet_length(job.payload) <= 2097152 THEN job.payload END AS payload
FROM safedefer.pgqueuer AS job
WHERE job.dedupe_key = ANY ($1::text[]) AND job.status IN ('queued', 'picked')
ORDER BY job.id FOR UPDATE OF job;

-- name: ended_insert
INSERT INTO safedefer.ended (id, queue, headers, attempts, state, reason, ended)
SELECT id, queue, headers::jsonb, attempts, state, reason, $2
FROM json_to_recordset($1::json) AS given (id text, queue text, headers text, attempts bigint, state text, reason text)
ON CONFLICT (id) DO NOTHING;

-- name: done
-- Ends plain tasks (no name, unique key or blob, first delivery) in one statement: deletes the jobs and writes history and
-- pgqueuer's log, as pgqueuer's own statement does. It does nothing unless all leases are held and all runs have succeeded by
-- the ledger. The command status counts the jobs: fewer than given if another dispatcher took over leases meanwhile.
WITH given AS MATERIALIZED (
    SELECT id::bigint, updated::bigint, audience, task_id
    FROM unnest(string_to_array($2, $1), string_to_array($3, $1), string_to_array($4, $1), string_to_array($5, $1))
        AS lease (id, updated, audience, task_id)
), found AS MATERIALIZED (
    SELECT job.id, job.updated, given.task_id, entry.uncharged
    FROM given
    CROSS JOIN LATERAL (
        SELECT id, status, queue_manager_id, updated, headers FROM safedefer.pgqueuer WHERE pgqueuer.id = given.id OFFSET 0
    ) AS job
    CROSS JOIN LATERAL (
        SELECT state, uncharged FROM safedefer.ledger
        WHERE ledger.audience = given.audience AND ledger.task_id = given.task_id OFFSET 0
    ) AS entry
    WHERE job.status = 'picked' AND job.queue_manager_id = $6::uuid AND entry.state = 'succeeded'
        AND job.updated = timestamptz 'epoch' + given.updated * interval '1 microsecond'
        AND pg_column_size(job.headers) <= 2097152
        AND jsonb_typeof(job.headers) = 'object' -- a string where the driver encoded the JSON twice
), deleted AS (
    -- Picking or ending a job changes `updated`, so the comparison detects a takeover. The added zero interval keeps the
    -- planner from the index on `updated`: it must use that of the id.
    DELETE FROM safedefer.pgqueuer AS job USING found
    WHERE job.id = found.id AND job.updated + interval '0' = found.updated
        AND (SELECT count(*) FROM found) = (SELECT count(*) FROM given)
    RETURNING job.id, job.entrypoint, job.priority, job.headers, found.task_id, found.uncharged
), history AS (
    INSERT INTO safedefer.ended (id, queue, headers, attempts, state, ended)
    SELECT task_id, split_part(entrypoint, '@', 1),
        headers #- '{safedefer_more,headers}' #- '{safedefer_more,retry_options}', uncharged::integer, 'succeeded', $7
    FROM deleted
    ON CONFLICT (id) DO NOTHING
)
INSERT INTO safedefer.pgqueuer_log (job_id, status, entrypoint, priority)
SELECT id, 'successful', entrypoint, priority FROM deleted;

-- name: done_now
-- Returns the given ids that `done` has just ended: its time, $7, is here $2.
SELECT id FROM safedefer.ended WHERE id = ANY ($1::text[]) AND ended = $2;

-- name: lock_jobs
-- Locks jobs by ascending id before several statements end or retry them: two batches in one lock order cannot deadlock.
SELECT id FROM safedefer.pgqueuer WHERE id = ANY ($1::bigint[]) ORDER BY id FOR UPDATE;

-- name: dead_insert
INSERT INTO safedefer.dead (
    id, job_id, queue, name, callable_name, url, target, audience, headers, retry_options, eta, created, expires,
    attempts, reason, ended, token
)
VALUES (
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14,
    coalesce((SELECT reason FROM safedefer.attempts WHERE task_id = $1 AND $15 ORDER BY seq DESC LIMIT 1), $16), $17,
    coalesce((SELECT data FROM safedefer.blobs WHERE id = $18 AND task_id = $1 AND octet_length(data) <= 2097152), $19)
)
ON CONFLICT (id) DO UPDATE SET job_id = excluded.job_id, ended = excluded.ended, archived = NULL;

-- name: names_bury
UPDATE safedefer.names SET until = $3
FROM unnest($1::text[], $2::text[]) AS given (queue, name)
WHERE names.queue = given.queue AND names.name = given.name;

-- name: uniques_free
-- Keys whose job somebody deleted, with a tool of pgqueuer's, say.
DELETE FROM safedefer.uniques AS known USING unnest($1::text[], $2::text[]) AS given (queue, unique_key)
WHERE known.queue = given.queue AND known.unique_key = given.unique_key AND NOT EXISTS (
    SELECT FROM safedefer.pgqueuer AS job WHERE job.dedupe_key = known.task_id AND job.status IN ('queued', 'picked') OFFSET 0
);

-- name: uniques_delete
DELETE FROM safedefer.uniques WHERE task_id = ANY ($1::text[]) AND (queue, unique_key) IN (
    SELECT * FROM unnest($2::text[], $3::text[])
);

-- name: blobs_drop
-- Counts the bytes that go, whatever the row says of its length; the total stops at a number that a change does not overflow.
WITH dropped AS (
    DELETE FROM safedefer.blobs WHERE id = ANY ($1::text[]) RETURNING octet_length(data)::bigint AS bytes
), gone AS (
    SELECT count(*) AS number, coalesce(sum(bytes), 0)::bigint AS bytes FROM dropped
), part AS (
    SELECT part FROM safedefer.blob_totals LIMIT 1 FOR UPDATE SKIP LOCKED
), counted AS (
    UPDATE safedefer.blob_totals SET bytes = least(greatest(bytes, -1000000000000000000), 1000000000000000000) - (SELECT gone.bytes FROM gone)
    WHERE blob_totals.part IN (SELECT part.part FROM part) AND (SELECT gone.bytes FROM gone) > 0 RETURNING 1
), added AS (
    INSERT INTO safedefer.blob_totals (bytes)
    SELECT -gone.bytes FROM gone WHERE gone.bytes > 0 AND NOT EXISTS (SELECT FROM counted)
) SELECT number AS dropped FROM gone;

-- name: totals_bad
-- Whether the totals are none that the queue has written: no blob is larger than 2 MiB.
SELECT EXISTS (SELECT FROM safedefer.blob_totals WHERE bytes NOT BETWEEN -1000000000000000 AND 1000000000000000)
    OR (SELECT coalesce(sum(bytes), 0) FROM safedefer.blob_totals)
        NOT BETWEEN 0 AND 2097152 * (SELECT count(*) FROM safedefer.blobs) AS bad;

-- name: totals_count
-- A transaction that adds blobs has counted them before, and one that drops blobs counts them after: both wait for the lock.
DO $$ BEGIN
    LOCK TABLE safedefer.blob_totals IN EXCLUSIVE MODE;
    DELETE FROM safedefer.blob_totals;
    INSERT INTO safedefer.blob_totals (bytes) SELECT coalesce(sum(octet_length(data)), 0) FROM safedefer.blobs;
END $$;

-- name: blob_get
SELECT data FROM safedefer.blobs WHERE id = $1 AND octet_length(data) <= 2097152;

-- name: blobs_orphaned
-- Blobs whose job somebody deleted, with a tool of pgqueuer's, say: among the first $2 from a random id on.
SELECT chosen.id FROM (SELECT id, task_id FROM safedefer.blobs WHERE id >= $1 ORDER BY id LIMIT $2) AS chosen
WHERE NOT EXISTS (
    SELECT FROM safedefer.pgqueuer AS job
    WHERE job.dedupe_key = chosen.task_id AND job.status IN ('queued', 'picked') OFFSET 0
);

-- name: attempts_insert
INSERT INTO safedefer.attempts (
    task_id, audience, started, ended, outcome, status, reason, exception_type, traceback, stray
)
SELECT given.*, NOT (
    EXISTS (SELECT FROM safedefer.pgqueuer AS job
            WHERE job.dedupe_key = given.task_id AND job.status IN ('queued', 'picked') OFFSET 0)
    OR EXISTS (SELECT FROM safedefer.dead WHERE dead.id = given.task_id OFFSET 0)
    OR EXISTS (SELECT FROM safedefer.ended WHERE ended.id = given.task_id OFFSET 0)
)
FROM json_to_recordset($1::json) AS given (
        task_id text, audience text, started double precision, ended double precision, outcome text, status integer,
        reason text, exception_type text, traceback text
    );

-- name: attempts_trim
DELETE FROM safedefer.attempts WHERE task_id = $1 AND seq <= (
    SELECT seq FROM safedefer.attempts WHERE task_id = $1 ORDER BY seq DESC LIMIT 1 OFFSET $2
);

-- name: attempts_of
-- The newest 100 of each (RECORDS_KEPT). A traceback of ours has 16,390 characters at most.
SELECT kept.task_id, left(kept.audience, 5000) AS audience, kept.started, kept.ended, left(kept.outcome, 1000) AS outcome,
    kept.status, left(kept.reason, 1000) AS reason, left(kept.exception_type, 1000) AS exception_type,
    left(kept.traceback, 25000) AS traceback
FROM unnest($1::text[]) AS given (task_id) CROSS JOIN LATERAL (
    SELECT * FROM safedefer.attempts WHERE attempts.task_id = given.task_id ORDER BY attempts.seq DESC LIMIT 100
) AS kept ORDER BY kept.seq;

-- name: attempts_become_stray
UPDATE safedefer.attempts SET stray = true WHERE task_id = ANY ($1::text[]);

-- name: ledger_begin
-- The command status counts the runs that may begin. Each (audience, task_id) must be given once.
INSERT INTO safedefer.ledger AS entry (audience, task_id, digest, state, owner, until, expires, uncharged)
SELECT coalesce(given.audience, ''), coalesce(given.task_id, ''), decode(coalesce(given.digest, ''), 'hex'), 'running',
    coalesce(given.owner, ''), now() + $7::interval, given.expires::bigint, true
FROM unnest(
    string_to_array($2, $1), string_to_array($3, $1), string_to_array($4, $1), string_to_array($5, $1), string_to_array($6, $1)
) AS given (audience, task_id, digest, owner, expires)
ON CONFLICT (audience, task_id) DO UPDATE
SET state = 'running', owner = excluded.owner, until = excluded.until, uncharged = true, not_before = NULL
WHERE entry.digest = excluded.digest AND (
    (entry.state = 'running' AND entry.owner = excluded.owner AND entry.until > now())
    OR (
        ((entry.state = 'retry' AND NOT entry.uncharged) OR (entry.state = 'running' AND entry.until <= now()))
        AND (entry.not_before IS NULL OR entry.not_before <= now())
    )
);

-- name: ledger_begin_first
-- Admits runs of tasks that the ledger does not know, each given once, and returns their owners; and what is kept. A
-- task that has no entry in this snapshot, and gets one here, has none that another run could have written meanwhile.
WITH begun AS (
    INSERT INTO safedefer.ledger AS entry (audience, task_id, digest, state, owner, until, expires, uncharged)
    SELECT coalesce(given.audience, ''), coalesce(given.task_id, ''), decode(coalesce(given.digest, ''), 'hex'), 'running',
        coalesce(given.owner, ''), now() + $7::interval, given.expires::bigint, true
    FROM unnest(
        string_to_array($2, $1), string_to_array($3, $1), string_to_array($4, $1), string_to_array($5, $1),
        string_to_array($6, $1)
    ) AS given (audience, task_id, digest, owner, expires)
    ON CONFLICT (audience, task_id) DO NOTHING
    RETURNING entry.owner
)
SELECT begun.owner, NULL::text AS key, NULL::bytea AS value FROM begun
UNION ALL
SELECT NULL, kept.key, kept.value FROM safedefer.kept AS kept
WHERE kept.key = ANY ($8::text[]) AND octet_length(kept.value) <= 2097152;

-- name: ledger_restore
-- Enters runs again whose begin a crash of the server has undone, each given once; the command status counts them.
INSERT INTO safedefer.ledger (audience, task_id, digest, state, owner, until, expires, uncharged)
SELECT given.audience, given.task_id, decode(given.digest, 'hex'), 'running', given.owner, now(), given.expires, true
FROM json_to_recordset($1::json) AS given (audience text, task_id text, digest text, owner text, expires bigint)
ON CONFLICT (audience, task_id) DO NOTHING;

-- name: written
-- A commit of its own: its sync is one of all commits before it. A crash of the server, or of one of its sessions, has it
-- begin its counts anew, and it starts where it ended as a whole: the mark is another one then.
SELECT pg_catalog.pg_logical_emit_message(true, 'safedefer', ''),
    pg_catalog.concat(pg_catalog.pg_postmaster_start_time(), ' ', counts.stats_reset) AS mark
FROM pg_catalog.pg_stat_bgwriter AS counts;

-- name: ledger_find
SELECT entry.audience, entry.task_id, CASE WHEN octet_length(entry.digest) <= 5000 THEN entry.digest ELSE ''::bytea END AS digest,
    entry.state, left(entry.owner, 1000) AS owner, entry.uncharged, entry.until > now() AS alive,
    coalesce(entry.not_before > now(), false) AS early,
    least(greatest(entry.losses, 0), 2147483647) AS losses, entry.first_loss
FROM safedefer.ledger AS entry
JOIN json_to_recordset($1::json) AS given (audience text, task_id text)
    ON entry.audience = given.audience AND entry.task_id = given.task_id;

-- name: ledger_extend
UPDATE safedefer.ledger AS entry SET until = now() + $2::interval
FROM json_to_recordset($1::json) AS given (audience text, task_id text, owner text)
WHERE entry.audience = given.audience AND entry.task_id = given.task_id AND entry.owner = given.owner
    AND entry.state = 'running'
RETURNING entry.audience, entry.task_id, entry.owner;

-- name: ledger_succeed
-- The command status counts the runs that were still held by their owner, and are now succeeded.
UPDATE safedefer.ledger AS entry
SET state = 'succeeded', owner = NULL, until = NULL, began = given.began::double precision,
    finished = given.finished::double precision
FROM unnest(
    string_to_array($2, $1), string_to_array($3, $1), string_to_array($4, $1), string_to_array($5, $1), string_to_array($6, $1)
) AS given (audience, task_id, owner, began, finished)
WHERE entry.audience = coalesce(given.audience, '') AND entry.task_id = coalesce(given.task_id, '')
    AND entry.state = 'running' AND entry.owner = coalesce(given.owner, '');

-- name: ledger_finish
-- Stores ends of runs and their records in one transaction, and returns the entries that changed, as rules.end_counts
-- says. It is idempotent: a success whose first answer got lost is returned again. $1 names an entry once.
WITH recorded AS (
    INSERT INTO safedefer.attempts (
        task_id, audience, started, ended, outcome, status, reason, exception_type, traceback, stray
    )
    SELECT given.*, NOT (
        EXISTS (SELECT FROM safedefer.pgqueuer AS job
                WHERE job.dedupe_key = given.task_id AND job.status IN ('queued', 'picked') OFFSET 0)
        OR EXISTS (SELECT FROM safedefer.dead WHERE dead.id = given.task_id OFFSET 0)
        OR EXISTS (SELECT FROM safedefer.ended WHERE ended.id = given.task_id OFFSET 0)
    )
    FROM json_to_recordset($2::json) AS given (
        task_id text, audience text, started double precision, ended double precision, outcome text, status integer,
        reason text, exception_type text, traceback text
    )
)
UPDATE safedefer.ledger AS entry
SET state = given.state, owner = NULL, until = NULL, began = given.began, finished = given.finished,
    -- A retry of a task that is no job here is settled by nobody: whoever posts it tries again.
    uncharged = entry.uncharged AND given.owed AND (given.state <> 'retry' OR EXISTS (
        SELECT FROM safedefer.pgqueuer AS job
        WHERE job.dedupe_key = given.task_id AND job.status IN ('queued', 'picked') OFFSET 0
    )),
    losses = 0, first_loss = NULL
FROM json_to_recordset($1::json) AS given (
    audience text, task_id text, owner text, digest text, state text, owed boolean,
    began double precision, finished double precision
)
WHERE entry.audience = given.audience AND entry.task_id = given.task_id AND entry.digest = decode(given.digest, 'hex') AND (
    (entry.state = 'running' AND entry.owner = given.owner)
    OR (given.state <> 'retry' AND entry.state IN ('running', 'retry'))
    OR (entry.state = given.state AND entry.began = given.began AND entry.finished = given.finished)
)
RETURNING entry.audience, entry.task_id, given.owner;

-- name: ledger_success
SELECT began, finished FROM safedefer.ledger WHERE audience = $1 AND task_id = $2 AND began IS NOT NULL AND finished IS NOT NULL;

-- name: ledger_lives
-- Runs that were taken for lost ended, or asked for more time.
UPDATE safedefer.ledger AS entry SET losses = 0, first_loss = NULL
FROM json_to_recordset($1::json) AS given (audience text, task_id text, digest text)
WHERE entry.audience = given.audience AND entry.task_id = given.task_id AND entry.digest = decode(given.digest, 'hex')
    AND entry.losses > 0;

-- name: ledger_lost
UPDATE safedefer.ledger AS entry
SET uncharged = false, attempts = given.attempts, losses = given.losses, first_loss = given.first_loss
FROM json_to_recordset($1::json) AS given (
    audience text, task_id text, attempts bigint, losses bigint, first_loss double precision
)
WHERE entry.audience = given.audience AND entry.task_id = given.task_id AND entry.uncharged;

-- name: ledger_retry
UPDATE safedefer.ledger AS entry
SET uncharged = entry.uncharged AND given.owed,
    not_before = coalesce(now() + given.wait * interval '1 microsecond', entry.not_before), attempts = given.attempts
FROM json_to_recordset($1::json) AS given (audience text, task_id text, owed boolean, wait bigint, attempts bigint)
WHERE entry.audience = given.audience AND entry.task_id = given.task_id;

-- name: leased_by
SELECT id, dedupe_key, entrypoint, NULL::bytea AS payload,
    CASE WHEN pg_column_size(headers) <= 2097152 AND octet_length(headers::text) <= 2097152 THEN headers END AS headers
FROM safedefer.pgqueuer
WHERE status = 'picked' AND queue_manager_id = ANY ($1::uuid[]);

-- name: leases_release
-- A lease without a heartbeat for its length is lost. Lock order: jobs by ascending id.
UPDATE safedefer.pgqueuer SET heartbeat = now() - $3::interval WHERE id = ANY (ARRAY (
    SELECT id FROM safedefer.pgqueuer
    WHERE id = ANY ($1::bigint[]) AND status = 'picked' AND queue_manager_id = ANY ($2::uuid[])
        AND heartbeat > now() - $3::interval
    ORDER BY id FOR UPDATE
)) RETURNING id;

-- name: ledger_end
INSERT INTO safedefer.ledger AS entry (audience, task_id, digest, state, expires, uncharged)
SELECT given.audience, given.task_id, decode(given.digest, 'hex'), given.state, given.expires, false
FROM json_to_recordset($1::json) AS given (audience text, task_id text, digest text, state text, expires bigint)
ON CONFLICT (audience, task_id) DO UPDATE
SET state = excluded.state, owner = NULL, until = NULL, uncharged = false
WHERE entry.state IN ('running', 'retry');

-- name: ledger_lock
SELECT CASE WHEN octet_length(digest) <= 5000 THEN digest ELSE ''::bytea END AS digest, state, uncharged, until > now() AS alive
FROM safedefer.ledger
WHERE audience = $1 AND task_id = $2 FOR UPDATE;

-- name: ledger_replace
-- The task was re-run as another one: it counts as cancelled. An entry that was not there to be locked may be there now,
-- of a run that began meanwhile: then nothing changes.
INSERT INTO safedefer.ledger AS entry (audience, task_id, digest, state, expires, uncharged)
VALUES ($1, $2, $3, 'cancelled', $4, false)
ON CONFLICT (audience, task_id) DO UPDATE SET state = 'cancelled', owner = NULL, until = NULL, uncharged = false
WHERE entry.digest = excluded.digest
    AND (entry.state IN ('failed', 'retry') OR (entry.state = 'running' AND entry.until <= now()));

-- name: ledger_cancel
-- A run that began stays uncharged: the end of its delivery charges it.
INSERT INTO safedefer.ledger AS entry (audience, task_id, digest, state, expires, uncharged)
SELECT given.audience, given.task_id, decode(given.digest, 'hex'), 'cancelled', given.expires, false
FROM json_to_recordset($1::json) AS given (audience text, task_id text, digest text, expires bigint)
ON CONFLICT (audience, task_id) DO UPDATE
SET state = 'cancelled', owner = NULL, until = NULL
WHERE entry.state IN ('running', 'retry');

-- name: next_due
-- Returns when the first job or lease of each queue falls due: seconds since the epoch, by the database's clock.
SELECT given.queue, extract(epoch FROM least(
    (SELECT execute_after FROM safedefer.pgqueuer
     WHERE entrypoint = given.queue AND status = 'queued' ORDER BY execute_after LIMIT 1),
    (SELECT execute_after FROM safedefer.pgqueuer
     WHERE entrypoint = given.queue || '@later' AND status = 'queued' ORDER BY execute_after LIMIT 1),
    (SELECT min(least(heartbeat, now())) + $2::interval FROM safedefer.pgqueuer
     WHERE entrypoint = given.queue AND status = 'picked' AND execute_after < now())
))::double precision AS due
FROM unnest($1::text[]) AS given (queue);

-- name: queues_with_jobs
SELECT DISTINCT entrypoint AS queue FROM safedefer.pgqueuer WHERE status = 'picked'
UNION
SELECT split_part(queue, '@', 1) FROM (
    WITH RECURSIVE names (queue) AS (
        SELECT (SELECT min(entrypoint) FROM safedefer.pgqueuer WHERE status = 'queued')
        UNION ALL
        SELECT (
            SELECT min(job.entrypoint) FROM safedefer.pgqueuer AS job
            WHERE job.status = 'queued' AND job.entrypoint > names.queue
        ) FROM names WHERE names.queue IS NOT NULL
    )
    SELECT queue FROM names WHERE queue IS NOT NULL
) AS waiting;

-- name: stats
SELECT split_part(entrypoint, '@', 1) AS queue,
    count(*) FILTER (WHERE status = 'queued' OR heartbeat < now() - $1::interval) AS waiting,
    count(*) FILTER (WHERE status = 'picked' AND heartbeat >= now() - $1::interval) AS running,
    extract(epoch FROM min(CASE WHEN status = 'queued' THEN execute_after
        WHEN heartbeat < now() - $1::interval THEN heartbeat + $1::interval END))::double precision AS oldest
FROM safedefer.pgqueuer WHERE status IN ('queued', 'picked') GROUP BY 1;

-- name: stats_put_off
-- The first eta of tasks that were put off, or whose lease ran out. The text may be anybody's: only a number is cast.
SELECT split_part(job.entrypoint, '@', 1) AS queue,
    min(split_part(job.headers->>'safedefer', ' ', 1)::double precision) AS eta
FROM (
    SELECT job_id AS id FROM safedefer.progress UNION SELECT id FROM safedefer.pgqueuer WHERE status = 'picked'
) AS moved JOIN safedefer.pgqueuer AS job ON job.id = moved.id
WHERE (job.status = 'queued' OR (job.status = 'picked' AND job.heartbeat < now() - $1::interval))
    AND CASE WHEN pg_column_size(job.headers) <= 2097152 THEN job.headers->>'safedefer' END ~ '^[0-9]{1,12}(\.[0-9]{1,20})? '
GROUP BY 1;

-- name: stats_dead
SELECT queue, count(*) AS dead FROM safedefer.dead WHERE archived IS NULL GROUP BY queue;

-- name: view_jobs
SELECT job.id, job.dedupe_key, job.entrypoint, job.status::text AS status,
    CASE WHEN pg_column_size(job.headers) <= 2097152 AND octet_length(job.headers::text) <= 2097152 THEN job.headers END AS headers,
    CASE WHEN octet_length(job.payload) <= 2097152 THEN job.payload END AS payload,
    least(greatest(coalesce(progress.attempts, 0), 0), 2147483647) AS attempts, left(progress.retry_reason, 1000) AS retry_reason,
    extract(epoch FROM job.execute_after)::float8 AS due
FROM safedefer.pgqueuer AS job LEFT JOIN safedefer.progress ON progress.job_id = job.id

-- name: view_dead
SELECT id, left(queue, 1000) AS queue, 'dead' AS state, left(name, 1000) AS name, left(callable_name, 5000) AS callable_name,
    left(url, 5000) AS url, left(target, 1000) AS target, left(audience, 5000) AS audience,
    CASE WHEN octet_length(headers) <= 2097152 THEN headers END AS headers,
    CASE WHEN octet_length(retry_options) <= 2097152 THEN retry_options END AS retry_options,
    eta, created, expires, least(greatest(attempts, 0), 2147483647) AS attempts, left(reason, 1000) AS reason, ended,
    CASE WHEN octet_length(token) <= 2097152 THEN token END AS token
FROM safedefer.dead

-- name: view_ended
SELECT id, left(queue, 1000) AS queue, state,
    CASE WHEN pg_column_size(headers) <= 2097152 AND octet_length(headers::text) <= 2097152 THEN headers END AS headers,
    least(greatest(attempts, 0), 2147483647) AS attempts, left(reason, 1000) AS reason, ended
FROM safedefer.ended

-- name: ends
SELECT left(queue, 1000) AS queue, state, floor((ended - $1) / $2)::bigint AS number, count(*) AS count FROM (
    (
        SELECT queue, state, ended FROM safedefer.ended
        WHERE ended >= $1 AND ended < 1e15 ORDER BY ended DESC LIMIT $3
    ) UNION ALL (
        SELECT queue, 'dead', ended FROM safedefer.dead
        WHERE archived IS NULL AND ended >= $1 AND ended < 1e15 ORDER BY ended DESC LIMIT $3
    )
) AS newest GROUP BY 1, 2, 3;

-- name: attempt_times
-- What succeeded has its times in the ledger, whose key begins with the audience, which is in the hints of the job.
SELECT left(audience, 1000) AS audience, seconds FROM (
    (
        SELECT audience, ended - started AS seconds FROM safedefer.attempts
        WHERE ended >= $1 AND ended < 1e15 AND started BETWEEN 0 AND 1e15 ORDER BY ended DESC LIMIT $2
    ) UNION ALL (
        SELECT entry.audience, entry.finished - entry.began FROM (
            SELECT id, headers FROM safedefer.ended
            WHERE ended >= $1 AND ended < 1e15 AND pg_column_size(headers) <= 2097152 ORDER BY ended DESC LIMIT $2
        ) AS newest JOIN safedefer.ledger AS entry
            ON entry.audience = split_part(newest.headers ->> 'safedefer', ' ', 5) AND entry.task_id = newest.id
        WHERE entry.began BETWEEN 0 AND 1e15 AND entry.finished BETWEEN 0 AND 1e15
    )
) AS times;

-- name: notice_put
INSERT INTO safedefer.notices AS known (process, text, at) VALUES ($1, $2, $3)
ON CONFLICT (process) DO UPDATE SET text = excluded.text, at = excluded.at;

-- name: notice_delete
DELETE FROM safedefer.notices WHERE process = $1;

-- name: notices_prune
-- One of the future is of a clock that was wrong, or was written by somebody else.
DELETE FROM safedefer.notices WHERE process IN (
    SELECT process FROM safedefer.notices WHERE at < $1 OR at > $2 LIMIT 500 FOR UPDATE SKIP LOCKED
);

-- name: notices
SELECT left(process, 1000) AS process, CASE WHEN octet_length(text) <= 8192 THEN text ELSE '' END AS text, at
FROM safedefer.notices WHERE at >= $1 AND at < 1e15 ORDER BY at DESC LIMIT $2;

-- name: blobs_of
SELECT id, task_id, data FROM safedefer.blobs WHERE id = ANY ($1::text[]) AND octet_length(data) <= 2097152;

-- name: dead_letters
SELECT id, left(queue, 1000) AS queue, 'dead' AS state, left(name, 1000) AS name, left(callable_name, 5000) AS callable_name,
    left(url, 5000) AS url, left(target, 1000) AS target, left(audience, 5000) AS audience,
    CASE WHEN octet_length(headers) <= 2097152 THEN headers END AS headers,
    CASE WHEN octet_length(retry_options) <= 2097152 THEN retry_options END AS retry_options,
    eta, created, expires, least(greatest(attempts, 0), 2147483647) AS attempts, left(reason, 1000) AS reason, ended,
    CASE WHEN octet_length(token) <= 2097152 THEN token END AS token
FROM safedefer.dead
WHERE (archived IS NOT NULL) = $1
    AND ($2::text IS NULL OR queue = $2)
    AND ($3::text IS NULL OR reason = $3)
    AND ($4::text IS NULL OR callable_name = $4)
    AND ended >= $5 AND ($6::double precision IS NULL OR ended < $6) AND (ended, id COLLATE "C") > ($7, $8)
ORDER BY ended, id COLLATE "C" LIMIT $9;

-- name: dead_delete
DELETE FROM safedefer.dead WHERE id = ANY ($1::text[]) RETURNING id, job_id;

-- name: dead_archive_old
WITH old AS (
    SELECT id FROM safedefer.dead WHERE archived IS NULL AND ended < $2 ORDER BY ended, id COLLATE "C" LIMIT $3
) UPDATE safedefer.dead SET archived = $1 FROM old WHERE dead.id = old.id RETURNING dead.id;

-- name: dead_archive_excess
WITH excess AS (
    SELECT id FROM safedefer.dead WHERE archived IS NULL ORDER BY ended DESC, id COLLATE "C" DESC LIMIT $3 OFFSET $2
) UPDATE safedefer.dead SET archived = $1 FROM excess WHERE dead.id = excess.id RETURNING dead.id;

-- name: purge_next
SELECT id, dedupe_key FROM safedefer.pgqueuer
WHERE status IN ('queued', 'picked') AND entrypoint IN ($1, $1 || '@later') AND id > $2 AND id <= $3 ORDER BY id LIMIT $4;

-- name: newest_job
SELECT coalesce(max(id), 0) AS newest FROM safedefer.pgqueuer;

-- name: names_prune
DELETE FROM safedefer.names WHERE (queue, name) IN (
    SELECT queue, name FROM safedefer.names WHERE until <= $1 LIMIT $2 FOR UPDATE SKIP LOCKED
) RETURNING 1;

-- name: ended_prune
WITH old AS (
    SELECT id FROM safedefer.ended WHERE ended < $1 ORDER BY ended LIMIT $2 FOR UPDATE SKIP LOCKED
), records AS (
    DELETE FROM safedefer.attempts WHERE task_id IN (SELECT id FROM old)
) DELETE FROM safedefer.ended WHERE id IN (SELECT id FROM old) RETURNING 1;

-- name: attempts_prune
DELETE FROM safedefer.attempts WHERE ctid = ANY (ARRAY (
    SELECT ctid FROM safedefer.attempts WHERE stray AND ended < $1 LIMIT $2 FOR UPDATE SKIP LOCKED
)) RETURNING 1;

-- name: ledger_prune
-- What has a dead letter keeps its entry, the proof that it died.
DELETE FROM safedefer.ledger WHERE (audience, task_id) IN (
    SELECT audience, task_id FROM safedefer.ledger
    WHERE expires < $1::double precision AND NOT (state = 'running' AND until > now())
        AND NOT EXISTS (SELECT FROM safedefer.dead WHERE dead.id = ledger.task_id OFFSET 0)
    LIMIT $2 FOR UPDATE SKIP LOCKED
) RETURNING 1;

-- name: kept_get
SELECT key, value FROM safedefer.kept WHERE key = ANY ($1::text[]) AND octet_length(value) <= 2097152;

-- name: kept_put
INSERT INTO safedefer.kept (key, expires, value) VALUES ($1, $2, $3)
ON CONFLICT (key) DO UPDATE SET expires = excluded.expires, value = excluded.value;

-- name: kept_blob_bytes
-- The length of a value is in its row: none of it is read.
SELECT coalesce(sum(octet_length(value)), 0)::bigint AS bytes FROM safedefer.kept
WHERE starts_with(key, 'blob:') AND key <> $1;

-- name: kept_delete
DELETE FROM safedefer.kept WHERE key = ANY ($1::text[]);

-- name: kept_prune
DELETE FROM safedefer.kept WHERE key IN (
    SELECT key FROM safedefer.kept WHERE expires < $1::double precision LIMIT $2 FOR UPDATE SKIP LOCKED
) RETURNING 1;

-- name: copies_put
INSERT INTO safedefer.copies (audience, task_id, due, looks, task)
SELECT coalesce(given.audience, ''), coalesce(given.task_id, ''), given.due, 0, coalesce(given.task, '')
FROM json_to_recordset($1::json) AS given (audience text, task_id text, due double precision, task text)
ON CONFLICT (audience, task_id) DO UPDATE SET due = excluded.due, looks = 0, task = excluded.task;

-- name: copies_look
-- A copy above 4 MiB is none of ours: a token as large as any (MOST_ROW_BYTES), and what stands beside it.
-- The next look at each is put off already; of those whose task has ended or runs no task is returned.
WITH due AS (
    SELECT copy.audience, copy.task_id FROM safedefer.copies AS copy
    WHERE copy.due <= $1 ORDER BY copy.due LIMIT $2 FOR UPDATE SKIP LOCKED
), looked AS (
    UPDATE safedefer.copies AS copy
    SET due = $1 + least(300, 5 * power(2, least(greatest(copy.looks, 0), 10))),
        looks = least(greatest(copy.looks, 0), 1000000) + 1
    FROM due WHERE copy.audience = due.audience AND copy.task_id = due.task_id
    RETURNING copy.audience, copy.task_id, copy.looks - 1 AS looks, copy.task
), judged AS (
    SELECT looked.*, CASE
        WHEN octet_length(looked.task) > 4194304 THEN 'odd'
        WHEN entry.state IN ('succeeded', 'failed', 'cancelled') THEN 'ended'
        WHEN entry.state = 'running' AND entry.until > now() THEN 'running'
        ELSE 'open'
    END AS state
    FROM looked LEFT JOIN safedefer.ledger AS entry
        ON entry.audience = looked.audience AND entry.task_id = looked.task_id
)
SELECT audience, task_id, looks, state, CASE WHEN state = 'open' THEN task ELSE '' END AS task FROM judged;

-- name: copies_put_off
UPDATE safedefer.copies AS copy SET due = $2
FROM json_to_recordset($1::json) AS given (audience text, task_id text)
WHERE copy.audience = given.audience AND copy.task_id = given.task_id;

-- name: copies_delete
DELETE FROM safedefer.copies AS copy USING json_to_recordset($1::json) AS given (audience text, task_id text)
WHERE copy.audience = given.audience AND copy.task_id = given.task_id;

-- name: dead_bury
-- A task that is no job, since a push engine delivers it. A letter whose token was verified takes the place of another one.
INSERT INTO safedefer.dead (
    id, job_id, queue, name, callable_name, url, target, audience, headers, retry_options, eta, created, expires,
    attempts, reason, ended, token
)
SELECT $1::text, 0, $2::text, $3::text, $4::text, $5::text, $6::text, $7::text, $8::text, $9::text,
    $10::double precision, $11::double precision, $12::bigint, $13::bigint, $14::text, $15::double precision, $16::bytea
WHERE $17::boolean OR NOT (
    EXISTS (SELECT FROM safedefer.pgqueuer AS job
            WHERE job.dedupe_key = $1 AND job.status IN ('queued', 'picked') OFFSET 0)
    OR EXISTS (SELECT FROM safedefer.ended WHERE ended.id = $1 OFFSET 0)
    OR EXISTS (SELECT FROM safedefer.dead WHERE dead.id = $1 OFFSET 0)
)
ON CONFLICT (id) DO UPDATE SET job_id = 0, queue = excluded.queue, name = excluded.name,
    callable_name = excluded.callable_name, url = excluded.url, target = excluded.target, audience = excluded.audience,
    headers = excluded.headers, retry_options = excluded.retry_options, eta = excluded.eta, created = excluded.created,
    expires = excluded.expires, attempts = excluded.attempts, reason = excluded.reason, ended = excluded.ended,
    token = excluded.token, archived = NULL;

-- name: attempts_have_letter
UPDATE safedefer.attempts SET stray = false WHERE task_id = $1 AND stray;

-- name: names_free
DELETE FROM safedefer.names USING unnest($1::text[], $2::text[]) AS given (queue, name)
WHERE names.queue = given.queue AND names.name = given.name AND names.until IS NULL;

-- name: ledger_is_lost
-- As rules.is_lost says.
SELECT entry.audience, entry.task_id FROM safedefer.ledger AS entry
JOIN json_to_recordset($1::json) AS given (audience text, task_id text, digest text)
    ON entry.audience = given.audience AND entry.task_id = given.task_id
WHERE entry.digest = decode(given.digest, 'hex') AND entry.state = 'running' AND entry.uncharged AND entry.until <= now();

-- name: ledger_settle_retry
UPDATE safedefer.ledger AS entry SET uncharged = false
FROM json_to_recordset($1::json) AS given (audience text, task_id text)
WHERE entry.audience = given.audience AND entry.task_id = given.task_id AND entry.state = 'retry';
