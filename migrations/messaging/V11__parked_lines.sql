-- Lines of parked rows may hold a million of them, and are tried again by many rows at once.

-- The lease under which the row was handed to Kafka's client: it may be on its way, so it cannot be discarded, for what was
-- discarded is never published. Null again when its fate is known. An older build neither sets nor reads it; it holds a lock
-- on the row that it sends.
alter table outbox_parked add column sending_by uuid;
-- So an older build's discard of such a row fails.
alter table outbox_parked add constraint outbox_parked_claimed
    check (not (status = 'discarded' and sending_by is not null));

-- What is to be tried again, in order: of rows without a key there may be many.
create index outbox_parked_asked on outbox_parked (outbox, topic, md5(key), id) where retry_requested_at is not null;

-- Resolved rows leave after a while, oldest first.
create index outbox_parked_resolved on outbox_parked (resolved_at) where status <> 'parked';
