-- The hash that Kafka's partitioner makes of the saga's id, which is the key of its replies: modulo the number of partitions it
-- says which partition they come from. Null for sagas of older builds; nothing waits for them.
alter table saga_due add column key_hash integer;
