-- Nobody searches by what a message or a reply says, so nobody needs to know how such values are distributed. To find out,
-- `analyze` sorts them, and to compare documents is slow: on a busy platform, which autovacuum analyses every minute, that
-- took a tenth of two processors for seconds at a time (measured).
alter table outbox alter column payload set statistics 0;
alter table outbox alter column headers set statistics 0;
alter table participant_fence alter column run_reply set statistics 0;
alter table participant_fence alter column undo_reply set statistics 0;
alter table idempotency_answer alter column fingerprint set statistics 0;
alter table idempotency_answer alter column body set statistics 0;


-- As before, and a new partition gets that too: `like` does not copy it.
create or replace function outbox_add_partition(rows_per_partition bigint default 10000000) returns text
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
    execute format('alter table %I alter column payload set statistics 0, alter column headers set statistics 0', partition);
    execute format('alter table outbox attach partition %I for values from (%s) to (%s)',
                   partition, first_row, first_row + rows_per_partition);
    return partition;
end
$$;
