-- The ids that partitions of the outbox are there for; `to_id` is the first behind them.
create function outbox_ranges() returns table (from_id bigint, to_id bigint)
language sql
stable
as $$
    select range[1]::bigint, range[2]::bigint
      from (select regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \(''(\d+)''\) TO \(''(\d+)''\)') as range
              from pg_inherits i
              join pg_class c on c.oid = i.inhrelid
             where i.inhparent = 'outbox'::regclass) as bound
     where range is not null
$$;

-- How many ids are left for which there is a partition; 0 when the next row overflows.
create function outbox_ids_ahead() returns bigint
language sql
stable
as $$
    select coalesce(sum(to_id - greatest(from_id, next_id)), 0)::bigint
      from (select from_id, to_id, next_id, bool_or(next_id >= from_id and next_id < to_id) over () as is_in_one
              from outbox_ranges(),
                   (select coalesce(pg_sequence_last_value(pg_get_serial_sequence('outbox', 'id')::regclass), 0) + 1
                               as next_id) as given) as range
     where is_in_one and to_id > next_id
$$;

-- The next partition, also when rows have overflowed: no insert waits for it, and none is refused.
--
-- To attach a partition, PostgreSQL looks through the default partition for rows that belong into it, and locks all out
-- meanwhile. With a check that is already validated and says that there are none, it does not look. To validate a check reads
-- the overflow as long, but locks out neither readers nor writers. That takes three transactions, so it takes three calls:
-- the first adds the check, the second validates it, the third attaches the partition and drops the check.
--
-- A check refuses rows of its range, and it stays for as long as its maker is dead, or a long reader keeps the partition from
-- being attached. So where rows have overflowed, the range begins so far ahead that none comes there: 10^12 ids are a year of
-- 30,000 rows a second. A call after that lets the ids go on in the new partition, when they are in none or at the end of one.
-- A bigint has room for nine million such jumps.
--
-- A lock that is not to be had at once is given up: whatever waits behind ours waits as long.
create or replace function outbox_add_partition(rows_per_partition bigint default 10000000) returns text
language plpgsql
set lock_timeout = '100ms'
as $$
declare
    ids       constant regclass := pg_get_serial_sequence('outbox', 'id')::regclass;
    far       constant bigint := 1000000000000;
    last_id   bigint;
    first_row bigint;
    end_row   bigint;
    ahead     record;
    partition text;
begin
    lock table outbox in share update exclusive mode;

    select greatest(coalesce(pg_sequence_last_value(ids), 0), coalesce((select max(id) from outbox_overflow), 0))
      into last_id;

    select conname, convalidated, regexp_match(conname, '^outbox_ahead_(\d+)_(\d+)$') as range
      into ahead
      from pg_constraint
     where conrelid = 'outbox_overflow'::regclass and conname ~ '^outbox_ahead_\d+_\d+$';

    if found then
        if not ahead.convalidated then
            execute format('alter table outbox_overflow validate constraint %I', ahead.conname);
            return null;
        end if;
        first_row := ahead.range[1];
        end_row := ahead.range[2];
    else
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
