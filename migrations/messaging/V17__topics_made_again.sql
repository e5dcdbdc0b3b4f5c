-- A topic that is deleted and made again begins at offset 0 again, and all its records are later than those of the old one.

-- The id of the topic that the worker reads, as the brokers gave it. Null: not known, or the worker is of an older build.
alter table inbox_partition add column topic_id text;
-- How many topics of this name the consumer has read before this one.
alter table inbox_partition add column generation integer not null default 0;

-- That of the topic that the record was in: offsets of different topics cannot be compared.
alter table inbox_parked add column generation integer not null default 0;

-- A lane in its order, which has the generation in it now.
drop index inbox_parked_lane;
create index inbox_parked_lane on inbox_parked (consumer, topic, partition, lane, generation, record_offset);
