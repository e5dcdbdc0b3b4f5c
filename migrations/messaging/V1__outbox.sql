-- The outbox: messages that a transaction wants published, written in that transaction.
--
-- A row is never updated and never deleted. There is no status column: what has been published is told by the batch log
-- below, and rows leave when their whole partition is old enough and published. A queue that marks or deletes its rows
-- drowns in their corpses as soon as somebody holds a snapshot; this table has none, and replay needs the history.

create table outbox (
    -- Given in the order of the inserts, so that along one aggregate (whose lock the writer holds until it commits) the
    -- order of ids is the order of commits. Across aggregates ids say nothing: a low one may commit late.
    id         bigint      not null generated always as identity (cache 1),
    -- Who wrote it. The relay's position is a pair of snapshots, and this is what it compares them with. Savepoints and
    -- prepared transactions need nothing special: it is the top-level transaction that commits.
    xid        xid8        not null default pg_current_xact_id(),
    -- Goes with the message as `ce_id`, and is what the consumers' inboxes know it by. UUIDv7.
    message_id uuid        not null,
    topic      text        not null,
    -- The record's key: rows of one topic and key are published in order. Null: no key, no order.
    key        text,
    -- `ce_type`.
    type       text        not null,
    -- The record's value as it is; the relay never decodes it. Null is a tombstone.
    payload    bytea,
    -- Further headers: a JSON object of strings.
    headers    jsonb       not null default '{}',
    created_at timestamptz not null default clock_timestamp(),

    -- The partition key must be in it; it is also the index that a long backlog is walked along.
    constraint outbox_pkey           primary key (id),
    constraint outbox_topic_length   check (length(topic) between 1 and 249),
    constraint outbox_headers_object check (jsonb_typeof(headers) = 'object')
) partition by range (id);

-- What is new between two snapshots is a range of transaction ids and a few single ones, so the relay finds its rows by
-- this index. The id is in it so that the rows of one transaction, however many, can be paged through in order.
-- There is no index on key: a key of 100 kB would make the business transaction fail. Searches are bounded by id.
create index outbox_xid on outbox (xid, id);

-- Where a row goes when nobody made a partition for it in time (the relay was away for millions of rows). It is there so
-- that a relay that is down never makes a business transaction fail; the relay reads it like any other partition.
create table outbox_overflow partition of outbox default;


-- Makes the next partition when less than a whole one is left ahead of the sequence; returns its name, or null when there
-- was nothing to do. The relay calls it in a loop; calling it twice at once is harmless.
--
-- The partition is made apart and then attached: `create table … partition of` would lock the whole outbox exclusively,
-- attaching only excludes other attaching (and the overflow, which is empty, for as long as it takes to see that). Few
-- and large, because each costs an idle poll two index probes.
create function outbox_add_partition(rows_per_partition bigint default 10000000) returns text
language plpgsql
set lock_timeout = '2s'
as $$
declare
    parent    constant regclass := 'outbox'::regclass;
    last_id   bigint;
    first_row bigint;
    partition text;
begin
    lock table outbox in share update exclusive mode;

    last_id := coalesce(pg_sequence_last_value(pg_get_serial_sequence(parent::text, 'id')::regclass), 0);

    -- The upper bound of the last partition is exclusive, so it is the first id of the next.
    select coalesce(max((regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \(''(\d+)''\)'))[1]::bigint), 1)
      into first_row
      from pg_inherits i
      join pg_class c on c.oid = i.inhrelid
     where i.inhparent = parent;

    if first_row - last_id > rows_per_partition then
        return null;
    end if;

    -- Rows that already overflowed stay where they are; the new partition starts well ahead of those still to come.
    if last_id >= first_row then
        first_row := (last_id / rows_per_partition + 1) * rows_per_partition + 1;
    end if;

    partition := format('outbox_%s', lpad(first_row::text, 15, '0'));
    execute format('create table %I (like outbox including defaults including constraints including indexes including storage)', partition);
    execute format('alter table outbox attach partition %I for values from (%s) to (%s)',
                   partition, first_row, first_row + rows_per_partition);
    return partition;
end
$$;

select outbox_add_partition();


-- A UUIDv7 (milliseconds since 1970 in the first 48 bits, the rest random). PostgreSQL has uuidv7() since 18, and we run
-- on 15: the time is laid over a random version 4, and its version nibble 0100 becomes 0111.
create function outbox_message_id() returns uuid
language sql
volatile parallel safe
as $$
    select encode(
               set_bit(
                   set_bit(
                       overlay(
                           uuid_send(gen_random_uuid())
                           placing substring(int8send(floor(extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                           from 1 for 6),
                       52, 1),
                   53, 1),
               'hex')::uuid
$$;


-- Appends one message in the caller's transaction and returns its id: the way in for services in other languages.
-- Call it after the statement that locks the aggregate, and hold that lock until the commit; then the messages of one key
-- are published in the order in which their transactions committed.
create function outbox_append(topic text, key text, type text, payload bytea, headers jsonb default '{}') returns uuid
language sql
volatile
as $$
    insert into outbox (message_id, topic, key, type, payload, headers)
    values (outbox_message_id(), $1, $2, $3, $4, coalesce($5, '{}'))
    returning message_id
$$;


-- How far the relay is: the last row (greatest n) is its position. All rows visible in `base` are published, and of
-- those visible in `target` the ones up to `to_id`. It is a log and not one row that is updated: an updated row slows
-- down under every held snapshot, and the log tells when each message was published without touching the message.
--
-- It lives in this database because it must be lost and kept together with the rows: after a crash PostgreSQL may use
-- a transaction id again, and a position kept elsewhere would already cover it.
create table outbox_batch (
    outbox  text        not null,
    n       bigint      not null,
    base    pg_snapshot not null,
    target  pg_snapshot not null,
    from_id bigint      not null,
    to_id   bigint      not null,
    rows    integer     not null,
    -- The lease it was written under.
    owner   uuid        not null,
    -- Transaction ids mean something only within this cluster; elsewhere the relay refuses to go on.
    system_identifier bigint not null,
    at      timestamptz not null default clock_timestamp(),

    -- Two owners that believe in the same position collide here, and one of them learns that it is none.
    constraint outbox_batch_pkey  primary key (outbox, n),
    constraint outbox_batch_range check (from_id <= to_id and rows >= 0)
);


-- Which process publishes. The owner's id is made anew at each acquisition, so that an owner that comes back from a long
-- pause does not take its successor's lease for its own.
create table outbox_lease (
    outbox      text        not null constraint outbox_lease_pkey primary key,
    owner       uuid        not null,
    -- For people: where that owner runs.
    holder      text        not null,
    acquired_at timestamptz not null,
    renewed_at  timestamptz not null,
    expires_at  timestamptz not null
);


-- Rows that Kafka will never take as they are (too large), each with the later rows of its topic and key behind it, so
-- that their order holds. Copies: the original leaves with its partition.
create table outbox_parked (
    outbox     text        not null,
    id         bigint      not null,
    message_id uuid        not null,
    topic      text        not null,
    key        text,
    type       text        not null,
    payload    bytea,
    headers    jsonb       not null,
    created_at timestamptz not null,
    status     text        not null default 'parked',
    reason     text        not null,
    -- The row it waits behind; null when it is itself what could not be published.
    blocked_by bigint,
    parked_at  timestamptz not null default clock_timestamp(),
    attempts   integer     not null default 0,
    -- An operator asked for its line (topic and key) to be tried again; the owner clears it when it has.
    retry_requested_at timestamptz,
    resolved_at        timestamptz,
    -- Why it was discarded.
    resolution         text,

    constraint outbox_parked_pkey     primary key (outbox, id),
    constraint outbox_parked_status   check (status in ('parked', 'published', 'discarded')),
    constraint outbox_parked_resolved check ((status = 'parked') = (resolved_at is null)),
    constraint outbox_parked_discard  check ((status = 'discarded') = (resolution is not null))
);

-- A line in order. The key's hash, because a key may be larger than an index entry.
create index outbox_parked_line on outbox_parked (outbox, topic, md5(key), id) where status = 'parked';
-- What the owner looks for twice a second; nearly always empty.
create index outbox_parked_retry on outbox_parked (outbox) where retry_requested_at is not null;


-- What is not published at present: a topic, or all ('*', which is no legal topic name). While a topic is paused the
-- others go on, so the topic has a position of its own: the one at which it was left behind. Its rows are published from
-- there when it resumes. The position is null until the owner has seen the pause.
create table outbox_pause (
    outbox    text        not null,
    topic     text        not null,
    -- 'operator' waits for an operator; the others end by themselves when the topic is there.
    cause     text        not null,
    reason    text        not null,
    actor     text        not null,
    paused_at timestamptz not null default clock_timestamp(),
    resume_requested_at timestamptz,
    base      pg_snapshot,
    target    pg_snapshot,
    after_id  bigint,

    constraint outbox_pause_pkey     primary key (outbox, topic),
    constraint outbox_pause_cause    check (cause in ('operator', 'missing', 'forbidden')),
    constraint outbox_pause_position check ((base is null) = (target is null) and (base is null) = (after_id is null))
);


-- Who did what to the outbox, one row per action, written in the transaction that performs it.
create table outbox_audit (
    id     bigint      generated always as identity constraint outbox_audit_pkey primary key,
    outbox text        not null,
    at     timestamptz not null default clock_timestamp(),
    actor  text        not null,
    action text        not null,
    reason text        not null,
    detail jsonb       not null default '{}'
);
