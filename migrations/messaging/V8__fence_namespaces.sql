-- A saga's id and a step's name are names within one orchestrator and one of its definitions. Two of them may say the same,
-- and their commands must not share a fence: the second would get the first one's reply, and never be executed.
--
-- So a row says whose it is. An older build does not say it, and finds a fence by saga, step and occurrence alone. That is why
-- the primary key stays as it is for now: the first namespace that comes has the plain row, where such a build finds it too,
-- and another one's row has `step [definition of orchestrator]` for its step. When no row without a name is left (no saga
-- of an older build is open, and fences of that age are gone), the namespace can become a part of the key instead.
alter table participant_fence
    -- Its reply topic, unless its commands name it. Empty, like the definition: written by a build that does not say it.
    add column orchestrator text not null default '',
    add column definition   text not null default '';

-- Intents that were never called are claimed before those that were: calls that come to nothing again and again, slowly, must
-- not take every slot. The few of them that are due are found here however many others are.
create index participant_intent_fresh on participant_intent (due_at) where state in ('ready', 'open') and attempts = 0;
