-- What was seen of each item, of each source and epoch (`ce_source`, `ce_epoch`).
--
-- A sequence means something only within its epoch: after a restore, a promotion or in a new database, ids are given a second
-- time. So a record is news when its sequence is higher than any that was seen of its item, its source and its epoch, and the last
-- news is what holds. Sequences of different epochs are never compared. A row for each epoch that an item was changed in: few.
create table catalogue_seen (
    sku      text   not null,
    source   text   not null,
    -- Empty where the relay did not say it: one of an older build.
    epoch    text   not null,
    sequence bigint not null,

    constraint catalogue_seen_pkey primary key (sku, source, epoch)
);

-- What is there was said by relays that named no epoch. `catalogue.sequence` is written on, for an older build that reads it.
insert into catalogue_seen (sku, source, epoch, sequence)
select sku, 'inventory', '', sequence
  from catalogue;
