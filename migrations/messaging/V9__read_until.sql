-- How far a partition has been read, by time: its worker has taken every record that was in it at this moment of the database's
-- clock. Kept by consumers that something waits for: saga timers, which must not fire before the replies that came in time
-- are taken. Null: its consumer does not say, or is of an older build.
alter table inbox_partition add column read_until timestamptz;
-- The worker that keeps `read_until`, set when it takes the partition. Another owner than this one is of an older build, which
-- keeps nothing, and nothing waits for it.
alter table inbox_partition add column reader uuid;
