-- Nobody searches by what these documents say, so nobody needs to know how they are distributed. To find out, `analyze` sorts
-- them, and to compare documents is slow: on a busy platform, which autovacuum analyses every minute, that took a tenth of
-- two processors for seconds at a time (measured).
alter table saga alter column state set statistics 0;
alter table saga alter column input set statistics 0;
alter table saga_event alter column entry set statistics 0;
