-- The next partition, also when rows have overflowed, without a wait for whatever inserts.
--
-- To attach a partition, PostgreSQL looks through the default partition for rows that belong into it, and locks all out
-- meanwhile. With a check that is already validated and says that there are none, it does not look. To validate a check reads
-- the overflow as long, but locks out neither readers nor writers. That takes three transactions, so it takes three calls:
-- the first adds the check, the second validates it, the third attaches the partition and drops the check. Between them the
-- check refuses rows of the partition's range, so the range begins well ahead of the rows that come meanwhile; if they come
-- near it all the same, because the relay was away, the next call drops the check and the one after that begins anew.
--
-- A lock that is not to be had at once is given up: whatever waits behind ours waits as long.
create or replace function outbox_add_partition(rows_per_partition bigint default 10000000) returns text
language plpgsql
set lock_timeout = '100ms'
as $$
declare
    parent    constant regclass := 'outbox'::regclass;
    overflow  constant regclass := 'outbox_overflow'::regclass;
    last_id   bigint;
    first_row bigint;
    end_row   bigint;
    ahead     record;
    partition text;
begin
    lock table outbox in share update exclusive mode;

    select greatest(coalesce(pg_sequence_last_value(pg_get_serial_sequence(parent::text, 'id')::regclass), 0),
                    coalesce((select max(id) from outbox_overflow), 0))
      into last_id;

    select conname, convalidated, regexp_match(conname, '^outbox_ahead_(\d+)_(\d+)$') as range
      into ahead
      from pg_constraint
     where conrelid = overflow and conname ~ '^outbox_ahead_\d+_\d+$';

    if found then
        first_row := ahead.range[1];
        end_row := ahead.range[2];
        if first_row - last_id < (end_row - first_row) / 10 then
            execute format('alter table outbox_overflow drop constraint %I', ahead.conname);
            return null;
        elsif not ahead.convalidated then
            execute format('alter table outbox_overflow validate constraint %I', ahead.conname);
            return null;
        end if;
    else
        -- The upper bound of the last partition is exclusive, so it is the first id of the next.
        select coalesce(max((regexp_match(pg_get_expr(c.relpartbound, c.oid), 'TO \(''(\d+)''\)'))[1]::bigint), 1)
          into first_row
          from pg_inherits i
          join pg_class c on c.oid = i.inhrelid
         where i.inhparent = parent;

        if first_row - last_id > rows_per_partition then
            return null;
        end if;

        -- Rows that already overflowed stay where they are; the new partition starts ahead of those still to come.
        if last_id >= first_row then
            first_row := (last_id / rows_per_partition + 1) * rows_per_partition + 1;
        end if;
        if exists (select from outbox_overflow) then
            -- A whole partition's rows at least come before the range: so long may every relay be away before the check, which
            -- nothing but a relay drops, refuses a row.
            if first_row - last_id < rows_per_partition then
                first_row := first_row + rows_per_partition;
            end if;
            end_row := first_row + rows_per_partition;
            execute format('alter table outbox_overflow add constraint %I check (not (id >= %s and id < %s)) not valid',
                           format('outbox_ahead_%s_%s', first_row, end_row), first_row, end_row);
            return null;
        end if;
        end_row := first_row + rows_per_partition;
    end if;

    partition := format('outbox_%s', lpad(first_row::text, 15, '0'));
    execute format('create table %I (like outbox including defaults including constraints including indexes including storage)', partition);
    execute format('alter table %I alter column payload set statistics 0, alter column headers set statistics 0', partition);
    execute format('alter table outbox attach partition %I for values from (%s) to (%s)', partition, first_row, end_row);
    if ahead.conname is not null then
        execute format('alter table outbox_overflow drop constraint %I', ahead.conname);
    end if;
    return partition;
end
$$;
