-- Sagas: where each one stands, what happened to it, and when it has to be looked at again.
--
-- Three tables, because they live differently: `saga` is updated with every reply and must stay small and hot,
-- `saga_event` only grows, and `saga_due` is the index that the timers walk. All three are written in the transaction
-- that consumed the message, together with the commands that follow from it (the outbox) and the message's inbox row.

-- One row per saga. Nobody owns it: any replica takes any reply, locks the row, decides, and writes it back under its
-- revision. A commit is all there is; a process that dies before it has changed nothing.
create table saga (
    saga_id      uuid        not null,
    -- What it is. A saga stays with the version that it began with, and the fingerprint of that version's shape, so that a
    -- replica with another idea of "order, version 1" keeps its hands off and says so.
    definition   text        not null,
    version      integer     not null,
    fingerprint  text        not null,
    -- What it is about: an order's number. Two sagas of one definition are never about the same thing.
    business_key text        not null,
    -- In the state too; here for lists and for the checks below.
    status       text        not null,
    -- Counts the events that were decided: the last row of its log has this number, and so has an operator's command
    -- that was meant for what the operator saw.
    revision     integer     not null,
    -- How far each step has come, the replies that later steps need, and the one command that is open.
    state        jsonb       not null,
    -- Until when `saga_due` leaves it alone; null when it is not in there with a time. It may be earlier than what the
    -- state says: a saga that is quick never touches its row in `saga_due` between its begin and its end.
    armed_at     timestamptz,
    -- What it was started with. Never changes.
    input        jsonb       not null,
    created_at   timestamptz not null,
    updated_at   timestamptz not null,
    finished_at  timestamptz,

    constraint saga_pkey            primary key (saga_id),
    -- A command that was sent twice starts one saga.
    constraint saga_business_key    unique (definition, business_key),
    constraint saga_version         check (version >= 0),
    constraint saga_revision        check (revision >= 1),
    constraint saga_status          check (status in ('running', 'compensating', 'stuck', 'completed', 'compensated')),
    -- The column and the state say the same.
    constraint saga_status_is_state check (status = state -> 'status' ->> 'is'),
    -- What has ended has an end, and waits for nothing.
    constraint saga_finished        check ((status in ('completed', 'compensated')) = (finished_at is not null)),
    constraint saga_finished_rests  check (finished_at is null or armed_at is null),
    -- What moves by itself has a time at which it is looked at: nothing waits that nobody will wake.
    constraint saga_is_woken        check (armed_at is not null or status not in ('running', 'compensating')),
    -- What is undone has a reason.
    constraint saga_has_reason      check (status not in ('compensating', 'compensated') or state ? 'failure')
)
-- An order's saga is updated half a dozen times in a second or two. With room in its page, and no index on a column that
-- changes, those updates are heap-only: no index is touched and the dead versions go without a vacuum.
with (fillfactor = 60, autovacuum_vacuum_scale_factor = 0.05);

-- Lists are in the order of birth and are paged by it. Neither column ever changes.
create index saga_by_age on saga (created_at, saga_id);

-- What happened to a saga, one row per event, never changed: the timeline of its inspection. `entry` tells what it was
-- (a reply to which step and attempt, a timer, a cancel and who wanted it) and what followed from it.
create table saga_event (
    saga_id  uuid        not null,
    -- The saga's revision that this event made.
    revision integer     not null,
    at       timestamptz not null,
    kind     text        not null,
    entry    jsonb       not null,

    constraint saga_event_pkey          primary key (saga_id, revision),
    constraint saga_event_kind          check (kind in ('started', 'reply', 'ignored', 'due', 'cancel', 'retry')),
    constraint saga_event_kind_is_entry check (kind = entry ->> 'kind')
);

-- One row per saga that has not ended: the timers find here what is due, and dashboards how many there are. It is apart
-- from `saga`, because an index on a column that changes would end the heap-only updates there.
create table saga_due (
    saga_id    uuid        not null,
    -- A replica claims only what it can decide.
    definition text        not null,
    version    integer     not null,
    status     text        not null,
    -- Not later than the time in the saga's state; who claims it reads that one again. Null: stuck, and nothing happens
    -- by itself.
    due_at     timestamptz,

    constraint saga_due_pkey     primary key (saga_id),
    constraint saga_due_status   check (status in ('running', 'compensating', 'stuck')),
    constraint saga_due_is_woken check (due_at is not null or status = 'stuck')
)
-- Small, and everything in it dies young: vacuum it often.
with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);

create index saga_due_at on saga_due (due_at) where due_at is not null;

-- Replies that reached a replica without their saga's definition (a rollout, or a rollback, is going on). They are kept
-- as they came; any replica that has the definition takes them from here, and the inspection shows them meanwhile.
create table saga_undecided (
    message_id  uuid        not null,
    saga_id     uuid        not null,
    definition  text        not null,
    version     integer     not null,
    fingerprint text        not null,
    -- What the reply's headers said.
    step        text        not null,
    op          text        not null,
    command_id  uuid        not null,
    attempt     integer     not null,
    outcome     text        not null,
    payload     bytea,
    received_at timestamptz not null default clock_timestamp(),

    constraint saga_undecided_pkey    primary key (message_id),
    constraint saga_undecided_op      check (op in ('do', 'undo')),
    constraint saga_undecided_outcome check (outcome in ('succeeded', 'rejected', 'failed'))
);
