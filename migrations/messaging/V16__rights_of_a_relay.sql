-- A relay publishes a service's outbox and has no business with its other tables: it needs no role that owns the database.
-- What it needs is named here, beside the tables; a later migration that changes it replaces `outbox_grant` and calls it again.

-- To make a partition, a role has to own the outbox. The function does that one thing with its owner's rights, so that whoever
-- calls it needs none of them. Nothing is looked up where another role may make things: neither in its schemas nor among its
-- temporary tables. Another role than its owner may call it only after `outbox_grant`. (A build before this one called it as its owner
-- or as a superuser, and goes on; nobody else's call could do anything.) A later migration that replaces the function says both again:
-- `create or replace` takes them away.
do $$
begin
    execute format('alter function outbox_add_partition(bigint) security definer set search_path = %I, pg_temp',
                   (select nspname
                      from pg_class
                      join pg_namespace on pg_namespace.oid = relnamespace
                     where pg_class.oid = 'outbox'::regclass));
    revoke execute on function outbox_add_partition(bigint) from public;
end
$$;

-- Gives `relay` what it needs to publish, to park, to pause, and to repair: nothing of it can change a message or the service's
-- own tables. `outbox-relay migrate`, `reanchor` and `rename` are for the owner.
create function outbox_grant(relay regrole) returns void
language plpgsql
as $$
begin
    -- An owner may have taken what everybody has by default. (One who does not own the schema is only warned.)
    execute format('grant usage on schema %s to %s',
                   (select relnamespace::regnamespace from pg_class where oid = 'outbox'::regclass), relay);
    execute format('grant execute on function outbox_ids_ahead(), outbox_ranges() to %s', relay);
    -- Messages are read. They are never changed.
    execute format('grant select on outbox to %s', relay);
    -- How far the ids are, and which file they count in.
    execute format('grant select on sequence %s to %s', pg_get_serial_sequence('outbox', 'id'), relay);
    execute format('grant execute on function outbox_add_partition(bigint) to %s', relay);
    -- Progress is only ever added to; an audit as well.
    execute format('grant select, insert on outbox_batch, outbox_audit to %s', relay);
    execute format('grant select, insert, update, delete on outbox_lease, outbox_parked, outbox_pause to %s', relay);
end
$$;

-- Where the database says which role its relay has (`alter database orders set outbox.relay_role = 'relay'`), it is given them now.
do $$
begin
    if current_setting('outbox.relay_role', true) <> '' then
        perform outbox_grant(current_setting('outbox.relay_role')::regrole);
    end if;
end
$$;
