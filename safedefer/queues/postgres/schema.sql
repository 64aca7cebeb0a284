-- The tables of safedefer beside pgqueuer's, in the schema safedefer, and the migrations that create them.
-- Migrations are appended, never edited, comments included.

-- name: migration_1
CREATE TABLE safedefer.settings (
    singular boolean PRIMARY KEY DEFAULT true CHECK (singular),
    version integer NOT NULL,
    -- The release of pgqueuer that made, or brought up to date, its tables.
    pgqueuer text NOT NULL,
    -- Names this database to whoever holds a connection to it.
    marker text NOT NULL,
    -- How long a silent dispatcher keeps a task, for those who only look.
    lease_seconds double precision NOT NULL
);

-- What holds queues back, the same for every dispatcher. A queue without limits, pause or hold needs no row.
CREATE TABLE safedefer.controls (
    queue text PRIMARY KEY,
    rate double precision,
    bucket_size bigint NOT NULL,
    max_concurrent bigint,
    paused boolean NOT NULL,
    held_until double precision NOT NULL,
    tokens double precision NOT NULL,
    refilled double precision NOT NULL
);

-- A name is taken while `until` is null, and a tombstone before it. Whoever wants a name that another
-- transaction has just taken waits for its end: the row that it inserted is in the way.
CREATE TABLE safedefer.names (
    queue text NOT NULL,
    name text NOT NULL,
    until double precision,
    PRIMARY KEY (queue, name)
);
CREATE INDEX names_until ON safedefer.names (until) WHERE until IS NOT NULL;

-- At most one waiting or running task of a queue has a given key: the hash of its callable and arguments.
CREATE TABLE safedefer.uniques (
    queue text NOT NULL,
    unique_key text NOT NULL,
    task_id text NOT NULL,
    PRIMARY KEY (queue, unique_key)
);

CREATE TABLE safedefer.blobs (
    id text PRIMARY KEY,
    task_id text NOT NULL,
    length bigint NOT NULL,
    data bytea NOT NULL
);
ALTER TABLE safedefer.blobs ALTER COLUMN data SET STORAGE EXTERNAL;

-- The bytes of all blobs, in parts: a transaction changes one that no other holds, and nobody waits.
CREATE TABLE safedefer.blob_totals (
    part integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    bytes bigint NOT NULL
);

-- Counters of tasks whose first delivery was not the last.
CREATE TABLE safedefer.progress (
    job_id bigint PRIMARY KEY,
    attempts bigint NOT NULL,
    deliveries bigint NOT NULL,
    executions bigint NOT NULL,
    first_attempt double precision,
    rejections bigint NOT NULL,
    first_rejection double precision,
    previous_response integer,
    retry_reason text
);

CREATE TABLE safedefer.dead (
    id text PRIMARY KEY,
    -- The job that pgqueuer holds (status 'failed'), for its own dashboards.
    job_id bigint NOT NULL,
    queue text NOT NULL,
    name text,
    callable_name text NOT NULL,
    url text NOT NULL,
    target text NOT NULL,
    audience text NOT NULL,
    headers text NOT NULL,
    retry_options text NOT NULL,
    eta double precision NOT NULL,
    created double precision NOT NULL,
    expires bigint NOT NULL,
    attempts bigint NOT NULL,
    reason text,
    ended double precision NOT NULL,
    token bytea NOT NULL,
    archived double precision
);
CREATE INDEX dead_ended ON safedefer.dead (ended, id COLLATE "C");
CREATE INDEX dead_current ON safedefer.dead (ended, id COLLATE "C") WHERE archived IS NULL;

-- What it was is in the headers that its job had, without what came with the token: its own headers and options.
CREATE TABLE safedefer.ended (
    id text PRIMARY KEY,
    queue text NOT NULL,
    headers jsonb NOT NULL,
    attempts bigint NOT NULL,
    state text NOT NULL,
    reason text,
    ended double precision NOT NULL
);
CREATE INDEX ended_ended ON safedefer.ended (ended);

-- `uncharged` is true from the begin of a run until its delivery is settled, or charged because the
-- lease ran out: so a run is charged once, and a delivery that never ran is not. A run that succeeded has its record here,
-- in the row that is written anyway: when it began and ended is all that there is to say of it.
CREATE TABLE safedefer.ledger (
    audience text NOT NULL,
    task_id text NOT NULL,
    digest bytea NOT NULL,
    state text NOT NULL CHECK (state IN ('running', 'retry', 'succeeded', 'failed', 'cancelled')),
    owner text,
    until timestamptz,
    expires bigint NOT NULL,
    uncharged boolean NOT NULL,
    began double precision,
    finished double precision,
    PRIMARY KEY (audience, task_id)
) WITH (fillfactor = 50);
CREATE INDEX ledger_expires ON safedefer.ledger (expires);

-- The records of a task go with what is left of it. A stray one belongs to no task that is known here,
-- and goes by its age.
CREATE TABLE safedefer.attempts (
    seq bigint GENERATED ALWAYS AS IDENTITY,
    task_id text NOT NULL,
    audience text NOT NULL,
    started double precision NOT NULL,
    ended double precision NOT NULL,
    outcome text NOT NULL,
    status integer,
    reason text,
    exception_type text,
    traceback text,
    stray boolean NOT NULL
);
CREATE INDEX attempts_task ON safedefer.attempts (task_id, seq);
CREATE INDEX attempts_stray ON safedefer.attempts (ended) WHERE stray;

-- What must hold before tasks become jobs, in the transaction that makes them; it gives back the entrypoints. It raises SD001 (the id is here),
-- SD002 (the id has ended), SD003 (the name is taken), SD004 (its tombstone), SD005 (the unique key is taken),
-- SD006 (the blob is another's) and SD007 (there is no room for blobs); DETAIL is the id, or the seconds left.
CREATE FUNCTION safedefer.admit(
    entrypoints text[], ids text[], queues text[], names text[], created double precision[], unique_keys text[],
    blob_ids text[], blob_data bytea[], blob_limit bigint
) RETURNS text[] LANGUAGE plpgsql
-- A few ids are looked up in tables that may have grown by any number of rows since they were counted. Of each, one index
-- alone can answer; so a plan that is kept is as good as a new one, which took longer to make than to run.
SET enable_seqscan = off AS $$
DECLARE
    item record;
    known text;
    free double precision;
BEGIN
    SELECT job.dedupe_key INTO known FROM safedefer.pgqueuer AS job
    WHERE job.dedupe_key = ANY (ids) AND job.status IN ('queued', 'picked') LIMIT 1;
    IF NOT FOUND THEN
        SELECT dead.id INTO known FROM safedefer.dead WHERE dead.id = ANY (ids) LIMIT 1;
    END IF;
    IF FOUND THEN
        RAISE EXCEPTION 'the task % is in this queue already', known USING ERRCODE = 'SD001', DETAIL = known;
    END IF;
    SELECT ended.id INTO known FROM safedefer.ended WHERE ended.id = ANY (ids) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'the task % ended in this queue', known USING ERRCODE = 'SD002', DETAIL = known;
    END IF;
    IF names IS NOT NULL THEN
        -- In one order, so that two batches do not wait for each other.
        FOR item IN
            SELECT given.queue, given.name, given.created FROM unnest(queues, names, created) AS given (queue, name, created)
            WHERE given.name IS NOT NULL ORDER BY given.queue, given.name
        LOOP
            INSERT INTO safedefer.names AS known_name (queue, name) VALUES (item.queue, item.name)
            ON CONFLICT (queue, name) DO UPDATE SET until = NULL WHERE known_name.until <= item.created;
            IF NOT FOUND THEN
                SELECT until - item.created INTO free FROM safedefer.names
                WHERE names.queue = item.queue AND names.name = item.name;
                IF free IS NULL THEN
                    RAISE EXCEPTION 'the name % is taken in the queue %', item.name, item.queue
                        USING ERRCODE = 'SD003', DETAIL = item.name;
                END IF;
                RAISE EXCEPTION 'the name % is a tombstone in the queue %', item.name, item.queue
                    USING ERRCODE = 'SD004', DETAIL = free::text;
            END IF;
        END LOOP;
    END IF;
    IF unique_keys IS NOT NULL THEN
        FOR item IN
            SELECT given.id, given.queue, given.unique_key FROM unnest(ids, queues, unique_keys) AS given (id, queue, unique_key)
            WHERE given.unique_key IS NOT NULL ORDER BY given.queue, given.unique_key
        LOOP
            INSERT INTO safedefer.uniques (queue, unique_key, task_id) VALUES (item.queue, item.unique_key, item.id)
            ON CONFLICT (queue, unique_key) DO NOTHING;
            IF NOT FOUND THEN
                SELECT task_id INTO known FROM safedefer.uniques
                WHERE uniques.queue = item.queue AND uniques.unique_key = item.unique_key;
                RAISE EXCEPTION 'the task % has the same call', known USING ERRCODE = 'SD005', DETAIL = known;
            END IF;
        END LOOP;
    END IF;
    IF blob_ids IS NOT NULL THEN
        PERFORM safedefer.count_blobs(coalesce(sum(length(data)), 0)::bigint) FROM unnest(blob_data) AS given (data);
        IF (SELECT sum(bytes) FROM safedefer.blob_totals) > blob_limit THEN
            RAISE EXCEPTION 'there is no room for the stored tokens of oversize tasks'
                USING ERRCODE = 'SD007', DETAIL = blob_limit::text;
        END IF;
        FOR item IN
            SELECT given.id, given.blob_id, given.data FROM unnest(ids, blob_ids, blob_data) AS given (id, blob_id, data)
            WHERE given.blob_id IS NOT NULL
        LOOP
            INSERT INTO safedefer.blobs (id, task_id, length, data)
            VALUES (item.blob_id, item.id, length(item.data), item.data) ON CONFLICT (id) DO NOTHING;
            IF NOT FOUND THEN
                RAISE EXCEPTION 'the blob % belongs to another task', item.blob_id
                    USING ERRCODE = 'SD006', DETAIL = item.blob_id;
            END IF;
        END LOOP;
    END IF;
    RETURN entrypoints;
END $$;

CREATE FUNCTION safedefer.count_blobs(change bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF change <> 0 THEN
        UPDATE safedefer.blob_totals SET bytes = bytes + change
        WHERE part = (SELECT part FROM safedefer.blob_totals LIMIT 1 FOR UPDATE SKIP LOCKED);
        IF NOT FOUND THEN
            INSERT INTO safedefer.blob_totals (bytes) VALUES (change);
        END IF;
    END IF;
END $$;

CREATE FUNCTION safedefer.drop_blobs(blob_ids text[]) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    gone record;
BEGIN
    WITH dropped AS (DELETE FROM safedefer.blobs WHERE id = ANY (blob_ids) RETURNING length)
    SELECT count(*) AS number, coalesce(sum(length), 0)::bigint AS bytes INTO gone FROM dropped;
    PERFORM safedefer.count_blobs(-gone.bytes);
    RETURN gone.number;
END $$;

-- name: migration_2
-- No run begins before `not_before`, when a retry is due; `attempts` is what the queue has counted then.
ALTER TABLE safedefer.ledger ADD COLUMN not_before timestamptz;
ALTER TABLE safedefer.ledger ADD COLUMN attempts bigint NOT NULL DEFAULT 0;
-- Deliveries in a row whose run began and never ended, and when the first of them was counted.
ALTER TABLE safedefer.ledger ADD COLUMN losses bigint NOT NULL DEFAULT 0;
ALTER TABLE safedefer.ledger ADD COLUMN first_loss double precision;

-- name: migration_3
-- What a push engine's tasks leave here: opaque values, each until a time.
CREATE TABLE safedefer.kept (
    key text PRIMARY KEY,
    expires bigint NOT NULL,
    value bytea NOT NULL
);
CREATE INDEX kept_expires ON safedefer.kept (expires);
ALTER TABLE safedefer.kept ALTER COLUMN value SET STORAGE EXTERNAL;

-- name: migration_4
-- What processes say of themselves, for people who look: a row each, which goes by its age.
CREATE TABLE safedefer.notices (
    process text PRIMARY KEY,
    text text NOT NULL,
    at double precision NOT NULL
) WITH (fillfactor = 50);
CREATE INDEX notices_at ON safedefer.notices (at);
-- For the newest ones.
CREATE INDEX attempts_ended ON safedefer.attempts (ended);

-- name: migration_5
-- Tasks that a push engine has taken and may lose, each until it has ended, and when it is looked at next.
CREATE TABLE safedefer.copies (
    audience text NOT NULL,
    task_id text NOT NULL,
    due double precision NOT NULL,
    looks bigint NOT NULL,
    task text NOT NULL,
    PRIMARY KEY (audience, task_id)
) WITH (fillfactor = 50);
CREATE INDEX copies_due ON safedefer.copies (due);

-- name: foreign
-- What is in the schema safedefer, the schema itself first, and belongs to none of these: this role, a superuser, the owner of
-- the database. The owner of the schema can put other functions and tables in the place of ours. Every operator has its
-- schema: those of the schema that is judged must not be called.
SELECT thing.kind, thing.name, role.rolname AS owner, current_user AS me
FROM (
    SELECT 0 AS place, 'schema' AS kind, n.oid AS schema, n.nspname AS name, n.nspowner AS owner FROM pg_catalog.pg_namespace AS n
    UNION ALL SELECT 1, 'relation', c.relnamespace, c.relname, c.relowner FROM pg_catalog.pg_class AS c
    UNION ALL SELECT 1, 'function', p.pronamespace, p.proname, p.proowner FROM pg_catalog.pg_proc AS p
    UNION ALL SELECT 1, 'operator', o.oprnamespace, o.oprname, o.oprowner FROM pg_catalog.pg_operator AS o
    UNION ALL SELECT 1, 'type', t.typnamespace, t.typname, t.typowner FROM pg_catalog.pg_type AS t
) AS thing
JOIN pg_catalog.pg_namespace AS home ON home.oid OPERATOR(pg_catalog.=) thing.schema
JOIN pg_catalog.pg_roles AS role ON role.oid OPERATOR(pg_catalog.=) thing.owner
WHERE home.nspname OPERATOR(pg_catalog.=) 'safedefer' AND NOT role.rolsuper
    AND role.rolname OPERATOR(pg_catalog.<>) current_user AND role.rolname OPERATOR(pg_catalog.<>) 'pg_database_owner'
    AND NOT EXISTS (
        SELECT FROM pg_catalog.pg_database AS base WHERE base.datdba OPERATOR(pg_catalog.=) role.oid
        AND base.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
    )
ORDER BY thing.place, thing.kind, thing.name LIMIT 1;

-- name: has_settings
SELECT to_regclass('safedefer.settings') IS NOT NULL AS found;

-- name: settings
SELECT version, left(pgqueuer, 100) AS pgqueuer, left(marker, 100) AS marker, lease_seconds FROM safedefer.settings;

-- name: drop_tempting_index
-- The index on (priority, id) without the entrypoint. No statement here needs it, and just after ANALYZE the planner chose it
-- for dequeueing: it walked past all parked jobs, a hundred times slower than the index that begins with the entrypoint.
DROP INDEX IF EXISTS safedefer.pgqueuer_priority_id_id1_idx;

-- name: settings_insert
INSERT INTO safedefer.settings (version, pgqueuer, marker, lease_seconds) VALUES (0, '', $1, 60);

-- name: settings_version
UPDATE safedefer.settings SET version = $1, pgqueuer = $2;

-- name: settings_lease
UPDATE safedefer.settings SET lease_seconds = $1;
