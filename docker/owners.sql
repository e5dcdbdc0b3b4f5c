-- For a volume of a build that had no roles but the superuser's: gives the database, and all in its schema public, to the role that is
-- called like the database. A superuser runs it in each database that docker/databases.sql names, after that script (README, Upgrades).
-- It may run again.
do $$
declare
    owner constant text := quote_ident(current_database());
    thing record;
begin
    execute format('alter database %s owner to %s', owner, owner);
    -- Indexes, and the sequences of identity columns, go with their tables.
    for thing in
        select case relkind when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence' else 'table' end as kind,
               oid::regclass::text as name
          from pg_class
         where relnamespace = 'public'::regnamespace
           and relkind in ('r', 'p', 'v', 'm', 'S')
           and not exists (select
                             from pg_depend
                            where classid = 'pg_class'::regclass and objid = pg_class.oid and deptype in ('a', 'i', 'e')
                              and relkind = 'S')
        union all
        select 'routine', oid::regprocedure::text
          from pg_proc
         where pronamespace = 'public'::regnamespace
           and prokind in ('f', 'p')
    loop
        execute format('alter %s %s owner to %s', thing.kind, thing.name, owner);
    end loop;
end
$$;
