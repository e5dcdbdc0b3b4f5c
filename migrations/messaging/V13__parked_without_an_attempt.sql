-- A record that waits for a lock which another transaction holds is parked with the reason, and no attempt is spent on that:
-- not even the first. An older build writes what it wrote before, and counts from there.
alter table inbox_parked drop constraint inbox_parked_reason;
alter table inbox_parked add constraint inbox_parked_reason check ((reason is null) = (error_class is null));
