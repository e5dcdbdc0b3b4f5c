-- The inbox: which messages a consumer has handled. A row is written in the transaction that handles the message, so a
-- message whose row is there is done, and one whose row is not there left nothing behind.

create table inbox (
    -- The consumer group: two consumers of one database handle the same message each for itself.
    consumer    text        not null,
    -- `ce_source` and `ce_id` together name a message for ever, wherever it is read from and however often.
    source      text        not null,
    message_id  uuid        not null,
    received_at timestamptz not null default now(),

    -- Message ids are UUIDv7: their first 48 bits are the milliseconds of their birth. So ranges of ids are ranges of
    -- time, an old range is forgotten by dropping its partition, and the key is still unique over the whole table
    -- because it contains what the table is partitioned by. Ids of one source grow, so the index grows at its end.
    constraint inbox_pkey primary key (consumer, source, message_id)
) partition by range (message_id);


-- The smallest UUIDv7 that could be made at `at`.
create function inbox_bound(at timestamptz) returns uuid
language sql
immutable
as $$
    select (lpad(to_hex(floor(extract(epoch from $1) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;


-- Makes the partitions, a week each, that ids between now - horizon and now + ahead fall into; returns how many were
-- missing. A message older than the horizon is never handled: nobody could tell any more whether it was before. Consumers
-- call it at start and in a loop; calling it from many at once is harmless.
--
-- A partition is made apart and then attached: `create table … partition of` would lock the whole inbox exclusively.
create function inbox_add_partitions(horizon interval, ahead interval default '14 days') returns integer
language plpgsql
set lock_timeout = '5s'
as $$
declare
    -- In hours: a day of a time zone with summer time is not always as long.
    week   constant interval := '168 hours';
    born   timestamptz := date_bin(week, clock_timestamp() - horizon, 'epoch');
    made   integer := 0;
    part   text;
begin
    while born <= clock_timestamp() + ahead loop
        part := 'inbox_' || to_char(born at time zone 'UTC', 'YYYYMMDD');
        if to_regclass(part) is null then
            -- The first time round nobody else may be at it; whoever waited here finds the partition made.
            lock table inbox in share update exclusive mode;
            if to_regclass(part) is null then
                execute format('create table %I (like inbox including defaults including indexes)', part);
                execute format('alter table inbox attach partition %I for values from (%L) to (%L)',
                               part, inbox_bound(born), inbox_bound(born + week));
                made := made + 1;
            end if;
        end if;
        born := born + week;
    end loop;
    return made;
end
$$;


-- Records that failed, each with the later records of its key behind it, so that their order holds while everything else
-- flows on. Copies: the record's offset is committed, and Kafka may forget it. A row leaves when it is handled or
-- dead-lettered; there are few, or there is an incident.
create table inbox_parked (
    id              bigint      not null generated always as identity constraint inbox_parked_pkey primary key,
    consumer        text        not null,
    topic           text        not null,
    partition       integer     not null,
    record_offset   bigint      not null,
    -- A hash of the key: records of one lane are handled in the order of their offsets. (A key may be larger than an
    -- index entry. Two keys that share a hash wait for each other, which is harmless.) Null: no key, no order.
    lane            bigint,
    source          text        not null,
    message_id      uuid        not null,
    key             bytea,
    payload         bytea,
    headers         jsonb       not null,
    record_time     timestamptz,
    -- How often it was tried; counted in a commit of its own before the try, so that a record which kills its process
    -- is counted too.
    attempts        integer     not null default 0,
    -- When it is tried again. Null: it waits behind an earlier row of its lane.
    next_attempt_at timestamptz,
    error_class     text,
    reason          text,
    parked_at       timestamptz not null default now(),

    -- A record that is delivered again while it is parked is parked already.
    constraint inbox_parked_message  unique (consumer, source, message_id),
    constraint inbox_parked_attempts check (attempts >= 0),
    -- Whatever has a reason has been tried.
    constraint inbox_parked_reason   check ((reason is null) = (error_class is null) and (reason is null or attempts > 0))
);

-- "Is anything of this key parked?", asked for every batch; and a lane in its order.
create index inbox_parked_lane on inbox_parked (consumer, topic, partition, lane, record_offset);
-- "What is due?"
create index inbox_parked_due on inbox_parked (consumer, topic, partition, next_attempt_at)
 where next_attempt_at is not null;


-- What a consumer knows of each partition it reads, besides the offsets that Kafka keeps.
create table inbox_partition (
    consumer      text        not null,
    topic         text        not null,
    partition     integer     not null,
    -- Made anew by each worker that takes the partition.
    owner         uuid        not null,
    -- Set by a worker that let go in good order. Whoever finds it unset takes the first records one by one: one of them
    -- may have killed the process that had them.
    clean         boolean     not null default false,
    -- The record that is tried on its own, and how often; counted like `inbox_parked.attempts`.
    record_offset bigint,
    attempts      integer     not null default 0,
    taken_at      timestamptz not null default now(),

    constraint inbox_partition_pkey primary key (consumer, topic, partition)
) with (fillfactor = 50);
