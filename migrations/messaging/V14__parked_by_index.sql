-- Of parked rows there may be millions, and the table keeps those that are resolved for a while: what is looked at often, and what
-- an operator waits for, follows an index to what it is about.

-- The list of parked rows, topic by topic in the order of ids. A parked row is one that is not resolved (a check says so), and only
-- the list says it like this: what follows lines says `status = 'parked'`, and the planner must not take this index for that.
create index outbox_parked_listed on outbox_parked (outbox, topic, id) where resolved_at is null;

-- Rows without a key are asked for one by one, many in a request: the next request goes on where the last one ended, and does not
-- walk what is asked for already.
create index outbox_parked_unasked on outbox_parked (outbox, topic, id)
    where status = 'parked' and key is null and retry_requested_at is null;
