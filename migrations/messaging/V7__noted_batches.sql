-- V2 says that whoever finds `clean` unset takes the first records one by one. It takes them in batches, which it notes
-- here first, and one by one only those of a batch that the process died in after it had been noted.
comment on column inbox_partition.clean is
    'set by a worker that let go in good order; unset: one of the records that it had may have killed its process';
comment on column inbox_partition.record_offset is
    'the record that is tried alone, or, with no attempts, the last one of a batch that is tried';
comment on column inbox_partition.attempts is
    'how often the record at record_offset was tried alone; 0: a batch that ends there was noted';
