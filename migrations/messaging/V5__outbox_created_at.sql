-- When a row was written is a time that a calendar has: the relay tells it as RFC 3339 (`ce_time`), which knows the years
-- 1 to 9999, while PostgreSQL also knows infinity and years up to 294276. Whoever writes such a time made a mistake, and is
-- told at once; found out later, one such row could only be published with a time that is made up.
--
-- `not valid`: rows that are there already are not looked at, because the lock for that excludes all writers of a table
-- that may be large, and the relay can live with them. Partitions that are made later copy the constraint.
alter table outbox
    add constraint outbox_created_at_range
    check (created_at >= '0001-01-01 00:00:00+00' and created_at < '10000-01-01 00:00:00+00') not valid;
