-- What made a step of the order's saga fail, where the reason alone (`failed`) does not tell an outage from an answer that
-- could not be read: one word of saga-core's vocabulary (`command::Why`), which grows. So there is no constraint on it, and a build that
-- does not know the column leaves it null.
alter table orders add column cause text;
