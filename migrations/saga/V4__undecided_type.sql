-- The type of a reply that was set aside: it is checked when the reply is decided, as it is of any other. Null for replies that
-- an older build set aside; their types are not known.
alter table saga_undecided add column type text;
