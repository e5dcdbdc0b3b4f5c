-- More reasons why a topic is set apart while the others go on: no broker takes its rows (a partition without a leader),
-- or Kafka refuses rows of it. A build that does not know them leaves such a topic to an operator.
alter table outbox_pause drop constraint outbox_pause_cause;
alter table outbox_pause add constraint outbox_pause_cause
    check (cause in ('operator', 'missing', 'forbidden', 'leaderless', 'refusing'));
