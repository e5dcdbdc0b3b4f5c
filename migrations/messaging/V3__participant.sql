-- What a participant remembers of the commands it was given.
--
-- A fence is one run of one step of one saga. It makes a command's effect happen at most once, and keeps its reply so
-- that a duplicate (a resend: new message id, same command id) gets the same answer. An undo leaves its mark here even
-- where nothing was done yet: the command that comes after it is refused.
create table participant_fence (
    saga_id       uuid        not null,
    step          text        not null,
    -- 0, and more after a retry with edited input.
    occurrence    integer     not null,
    run_state     text        not null default 'absent',
    run_command   uuid,
    -- The encoded reply or rejection; final once written.
    run_reply     bytea,
    undo_state    text        not null default 'absent',
    undo_command  uuid,
    undo_reply    bytea,
    -- For retention: a fence is of no use once its saga can no longer resend.
    created_at    timestamptz not null default now(),
    constraint participant_fence_pkey primary key (saga_id, step, occurrence),
    constraint participant_fence_run_state_known
        check (run_state in ('absent', 'open', 'calling', 'in_doubt', 'succeeded', 'rejected', 'refused')),
    constraint participant_fence_undo_state_known
        check (undo_state in ('absent', 'open', 'waiting', 'calling', 'in_doubt', 'done')),
    constraint participant_fence_run_reply_iff_final
        check ((run_state in ('succeeded', 'rejected')) = (run_reply is not null)),
    constraint participant_fence_undo_reply_iff_done
        check ((undo_state = 'done') = (undo_reply is not null)),
    constraint participant_fence_undo_waits_for_a_call
        check (undo_state <> 'waiting' or run_state in ('calling', 'in_doubt', 'open', 'succeeded', 'rejected')),
    constraint participant_fence_occurrence_counts_from_zero check (occurrence >= 0)
) with (fillfactor = 70);  -- each row is inserted and then updated in the same transaction: keep that on its page

-- Effects outside the database that are to be performed, and undos that wait for one of them.
--   waiting   an undo; the call of what it undoes is not settled
--   ready     that call is settled; the undo is to be handled now
--   open      to be called, or being called (claimed)
--   in_doubt  its attempts ran out without a certain answer; a resend opens it again
-- A settled intent leaves; what it came to stands in the fence and in the service's own tables.
create table participant_intent (
    command_id    uuid        not null,
    saga_id       uuid        not null,
    step          text        not null,
    occurrence    integer     not null,
    op            text        not null,
    type          text        not null,
    state         text        not null,
    -- Whom the reply goes to, and which message asked.
    origin        jsonb       not null,
    payload       bytea       not null,
    -- What the effect wanted to be remembered between its preparation and its call.
    prepared      jsonb,
    -- Counted, and committed, before each call.
    attempts      integer     not null default 0,
    -- When it may be claimed: the end of its back-off, or of the claim of a process that may have died.
    due_at        timestamptz not null default clock_timestamp(),
    claimed_by    uuid,
    last_error    text,
    created_at    timestamptz not null default now(),
    constraint participant_intent_pkey primary key (command_id),
    constraint participant_intent_op_known check (op in ('do', 'undo')),
    constraint participant_intent_state_known check (state in ('waiting', 'ready', 'open', 'in_doubt')),
    constraint participant_intent_only_an_undo_waits check (op = 'undo' or state not in ('waiting', 'ready')),
    constraint participant_intent_prepared_iff_callable check ((prepared is not null) = (state in ('open', 'in_doubt'))),
    constraint participant_intent_fence_fkey foreign key (saga_id, step, occurrence)
        references participant_fence (saga_id, step, occurrence)
);

-- Claims read the few rows that are due, whatever the number of those in doubt.
create index participant_intent_due on participant_intent (due_at) where state in ('ready', 'open');
