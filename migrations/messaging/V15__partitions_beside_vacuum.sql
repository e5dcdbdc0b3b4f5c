-- As in V12, but a vacuum is in nobody's way, and nobody in the way of a vacuum.
--
-- A vacuum holds a lock that keeps a partition from being attached, for as long as it takes. An autovacuum gives way to whoever
-- waits for that lock longer than `deadlock_timeout`; but what waits behind an exclusive lock that is not to be had waits as
-- long. So the lock that a vacuum holds is asked for first: that waits for vacuums alone, and no insert waits behind it. Then the
-- exclusive lock is to be had at once, or it is given up. A vacuum that gives no way (an operator's, or one that prevents a
-- wraparound) is waited for by later calls.
--
-- The lock is asked for only when there is something to do, and only on the overflow: what is called twice a minute must not
-- end each vacuum.
--
-- A partition has an end that ids reach, so that another follows: one of 4 * 10^18 rows would be the last.
create or replace function outbox_add_partition(rows_per_partition bigint default 10000000) returns text
language plpgsql
set lock_timeout = '100ms'
as $$
declare
    ids        constant regclass := pg_get_serial_sequence('outbox', 'id')::regclass;
    far        constant bigint := 1000000000000;
    at_once    constant text := current_setting('lock_timeout');
    -- In milliseconds.
    for_vacuum constant text := ceil(extract(epoch from current_setting('deadlock_timeout')::interval) * 1000) + 500;
    last_id    bigint;
    first_row  bigint;
    end_row    bigint;
    ahead      record;
    partition  text;
begin
    if rows_per_partition is null or rows_per_partition not between 1 and 100000000 then
        raise exception 'a partition of the outbox is for 1 to 100000000 rows' using errcode = 'invalid_parameter_value';
    end if;

    lock table only outbox in share update exclusive mode;

    select greatest(coalesce(pg_sequence_last_value(ids), 0), coalesce((select max(id) from outbox_overflow), 0))
      into last_id;

    select conname, convalidated, regexp_match(conname, '^outbox_ahead_(\d+)_(\d+)$') as range
      into ahead
      from pg_constraint
     where conrelid = 'outbox_overflow'::regclass and conname ~ '^outbox_ahead_\d+_\d+$';

    if ahead.conname is null then
        -- Before the first id of a partition that does not follow on those that the ids are in.
        select min(from_id)
          into first_row
          from outbox_ranges() as later
         where from_id > last_id + 1
           and not exists (select from outbox_ranges() as joined where joined.to_id = later.from_id)
           and not exists (select
                             from outbox_ranges() as used
                            where last_id + 1 >= used.from_id
                              and last_id + 1 < used.to_id - rows_per_partition / 10);
        if first_row is not null then
            perform setval(ids, first_row - 1);
            return null;
        end if;

        select coalesce(max(to_id), 1) into first_row from outbox_ranges();
        if first_row - last_id > rows_per_partition then
            return null;
        end if;
    end if;

    perform set_config('lock_timeout', for_vacuum, true);
    lock table outbox_overflow in share update exclusive mode;
    perform set_config('lock_timeout', at_once, true);

    if ahead.conname is null then
        -- Rows that already overflowed stay where they are; the new partition starts ahead of those still to come.
        if exists (select from outbox_overflow) then
            first_row := (last_id / far + 2) * far + 1;
            end_row := first_row + rows_per_partition;
            execute format('alter table outbox_overflow add constraint %I check (not (id >= %s and id < %s)) not valid',
                           format('outbox_ahead_%s_%s', first_row, end_row), first_row, end_row);
            return null;
        elsif last_id >= first_row then
            first_row := (last_id / rows_per_partition + 1) * rows_per_partition + 1;
        end if;
        end_row := first_row + rows_per_partition;
    elsif ahead.convalidated then
        first_row := ahead.range[1];
        end_row := ahead.range[2];
    else
        execute format('alter table outbox_overflow validate constraint %I', ahead.conname);
        return null;
    end if;

    partition := format('outbox_%s', lpad(first_row::text, greatest(15, length(first_row::text)), '0'));
    execute format('create table %I (like outbox including defaults including constraints including indexes including storage)', partition);
    execute format('alter table %I alter column payload set statistics 0, alter column headers set statistics 0', partition);
    execute format('alter table outbox attach partition %I for values from (%s) to (%s)', partition, first_row, end_row);
    if ahead.conname is not null then
        execute format('alter table outbox_overflow drop constraint %I', ahead.conname);
    end if;
    return partition;
end
$$;
