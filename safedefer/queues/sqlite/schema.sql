-- The tables of the SQLite engine and the migrations that make them. Migrations are appended, never edited.
--
-- The tables have a prefix because an application may keep its own tables in the same file, so that
-- a task and the change it belongs to commit together.

-- name: schema_table
CREATE TABLE IF NOT EXISTS safedefer_schema (version INTEGER NOT NULL) STRICT;

-- name: schema_version
SELECT max(version) FROM safedefer_schema;

-- name: schema_has_table
SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'safedefer_schema';

-- name: schema_set_version
INSERT INTO safedefer_schema (version) VALUES (:version);

-- name: migration_1
-- `due` is when a row may be leased: the eta, the time of the retry, or the end of the lease.
-- `seq` is never used twice: waiting dispatchers watch its maximum, and it breaks ties of `due`.
-- The token is the last column, so that reading the others never touches its overflow pages.
CREATE TABLE safedefer_tasks (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    name TEXT,
    callable_name TEXT NOT NULL,
    url TEXT NOT NULL,
    target TEXT NOT NULL,
    audience TEXT NOT NULL,
    headers TEXT NOT NULL,
    retry_options TEXT NOT NULL,
    eta REAL NOT NULL,
    created REAL NOT NULL,
    expires INTEGER NOT NULL,
    digest BLOB NOT NULL,
    blob_id TEXT,
    due REAL NOT NULL,
    owner TEXT,
    leased_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    deliveries INTEGER NOT NULL DEFAULT 0,
    executions INTEGER NOT NULL DEFAULT 0,
    first_attempt REAL,
    rejections INTEGER NOT NULL DEFAULT 0,
    first_rejection REAL,
    previous_response INTEGER,
    retry_reason TEXT,
    token BLOB NOT NULL
) STRICT;
CREATE INDEX safedefer_tasks_due ON safedefer_tasks (due);
CREATE INDEX safedefer_tasks_queue ON safedefer_tasks (queue, due);
CREATE INDEX safedefer_tasks_leased ON safedefer_tasks (queue, due) WHERE owner IS NOT NULL;

-- A blob goes with its task, whatever ends the task: there are no orphans.
CREATE TABLE safedefer_blobs (
    id TEXT NOT NULL PRIMARY KEY,
    task INTEGER NOT NULL REFERENCES safedefer_tasks (seq) ON DELETE CASCADE,
    data BLOB NOT NULL
) STRICT;
CREATE INDEX safedefer_blobs_task ON safedefer_blobs (task);

-- `until` is NULL while the task of this name lives, then the end of its tombstone.
CREATE TABLE safedefer_names (
    queue TEXT NOT NULL,
    name TEXT NOT NULL,
    until REAL,
    PRIMARY KEY (queue, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX safedefer_names_until ON safedefer_names (until) WHERE until IS NOT NULL;

CREATE TABLE safedefer_dead (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    name TEXT,
    callable_name TEXT NOT NULL,
    url TEXT NOT NULL,
    target TEXT NOT NULL,
    audience TEXT NOT NULL,
    headers TEXT NOT NULL,
    retry_options TEXT NOT NULL,
    eta REAL NOT NULL,
    created REAL NOT NULL,
    expires INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    reason TEXT,
    ended REAL NOT NULL,
    token BLOB NOT NULL
) STRICT;
CREATE INDEX safedefer_dead_queue ON safedefer_dead (queue);

-- What succeeded or was cancelled of late, without its token: for people who look.
CREATE TABLE safedefer_ended (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    queue TEXT NOT NULL,
    name TEXT,
    callable_name TEXT NOT NULL,
    url TEXT NOT NULL,
    target TEXT NOT NULL,
    audience TEXT NOT NULL,
    eta REAL NOT NULL,
    created REAL NOT NULL,
    expires INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('succeeded', 'cancelled')),
    reason TEXT,
    ended REAL NOT NULL
) STRICT;
CREATE INDEX safedefer_ended_ended ON safedefer_ended (ended);
CREATE INDEX safedefer_ended_state ON safedefer_ended (state);

-- `uncharged` is 1 from the begin of a run until its delivery is settled, or charged because the
-- lease ran out: so a run is charged once, and a delivery that never ran is not.
CREATE TABLE safedefer_ledger (
    audience TEXT NOT NULL,
    task_id TEXT NOT NULL,
    digest BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'retry', 'succeeded', 'failed', 'cancelled')),
    owner TEXT,
    until REAL NOT NULL DEFAULT 0,
    expires INTEGER NOT NULL,
    uncharged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (audience, task_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX safedefer_ledger_expires ON safedefer_ledger (expires);

-- The records of a task go with what is left of it. A stray one belongs to no task that is known here,
-- and goes by its age.
CREATE TABLE safedefer_attempts (
    seq INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL,
    audience TEXT NOT NULL,
    started REAL NOT NULL,
    ended REAL NOT NULL,
    outcome TEXT NOT NULL,
    status INTEGER,
    reason TEXT,
    exception_type TEXT,
    traceback TEXT,
    stray INTEGER NOT NULL
) STRICT;
CREATE INDEX safedefer_attempts_task ON safedefer_attempts (task_id);
CREATE INDEX safedefer_attempts_stray ON safedefer_attempts (ended) WHERE stray;

-- name: migration_2
-- What holds queues back, the same for every dispatcher. A queue without limits, pause or hold needs no row.
CREATE TABLE safedefer_controls (
    queue TEXT NOT NULL PRIMARY KEY,
    rate REAL,
    bucket_size INTEGER NOT NULL,
    max_concurrent INTEGER,
    paused INTEGER NOT NULL,
    held_until REAL NOT NULL,
    tokens REAL NOT NULL,
    refilled REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- For looking at one queue, and for purging it, while much waits in others.
CREATE INDEX safedefer_tasks_of_queue ON safedefer_tasks (queue, seq);

-- At most one waiting or running task of a queue has a given key: the hash of its callable and arguments.
ALTER TABLE safedefer_tasks ADD COLUMN unique_key TEXT;
CREATE UNIQUE INDEX safedefer_tasks_unique ON safedefer_tasks (queue, unique_key) WHERE unique_key IS NOT NULL;

-- When a dead letter was put aside, because it was old or there were too many.
ALTER TABLE safedefer_dead ADD COLUMN archived REAL;
CREATE INDEX safedefer_dead_ended ON safedefer_dead (ended, id);
CREATE INDEX safedefer_dead_current ON safedefer_dead (ended, id) WHERE archived IS NULL;

-- How many bytes all blobs have together: counting them would read them.
CREATE TABLE safedefer_totals (blob_bytes INTEGER NOT NULL) STRICT;
INSERT INTO safedefer_totals SELECT coalesce(sum(length(data)), 0) FROM safedefer_blobs;
CREATE TRIGGER safedefer_blob_added AFTER INSERT ON safedefer_blobs
BEGIN UPDATE safedefer_totals SET blob_bytes = blob_bytes + length(NEW.data); END;
CREATE TRIGGER safedefer_blob_gone AFTER DELETE ON safedefer_blobs
BEGIN UPDATE safedefer_totals SET blob_bytes = blob_bytes - length(OLD.data); END;

-- name: migration_3
-- No run begins before `not_before`, when a retry is due; `attempts` is what the queue has counted then.
ALTER TABLE safedefer_ledger ADD COLUMN not_before REAL NOT NULL DEFAULT 0;
ALTER TABLE safedefer_ledger ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0;
-- Deliveries in a row whose run began and never ended, and when the first of them was counted.
ALTER TABLE safedefer_ledger ADD COLUMN losses INTEGER NOT NULL DEFAULT 0;
ALTER TABLE safedefer_ledger ADD COLUMN first_loss REAL;

-- name: migration_4
-- What a push engine's tasks leave here: opaque values, each until a time.
CREATE TABLE safedefer_kept (
    key TEXT NOT NULL PRIMARY KEY,
    expires INTEGER NOT NULL,
    value BLOB NOT NULL
) STRICT;
CREATE INDEX safedefer_kept_expires ON safedefer_kept (expires);

-- name: migration_5
-- What processes say of themselves, for people who look: a row each, which goes by its age.
CREATE TABLE safedefer_notices (
    process TEXT NOT NULL PRIMARY KEY,
    text TEXT NOT NULL,
    at REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX safedefer_notices_at ON safedefer_notices (at);

-- name: migration_6
-- Tasks that a push engine has taken and may lose, each until it has ended, and when it is looked at next.
CREATE TABLE safedefer_copies (
    audience TEXT NOT NULL,
    task_id TEXT NOT NULL,
    due REAL NOT NULL,
    looks INTEGER NOT NULL,
    task TEXT NOT NULL,
    PRIMARY KEY (audience, task_id)
) STRICT;
CREATE INDEX safedefer_copies_due ON safedefer_copies (due);
