-- The simulated payment provider's own books. Somebody else's system: no service of ours reads this database.

-- An authorization: money of a customer that is held for a merchant's order. What was held is, at any time, still held,
-- captured or released.
create table gateway_authorization (
    reference  text        not null,
    -- The idempotency key of the request that made it: whoever lost the answer knows it by this.
    key        text        not null,
    "order"    text        not null,
    customer   text        not null,
    -- The token; it also chooses how later requests for this authorization behave.
    method     text        not null,
    currency   text        not null,
    amount     bigint      not null,
    held       bigint      not null,
    captured   bigint      not null default 0,
    voided     bigint      not null default 0,
    refunded   bigint      not null default 0,
    created_at timestamptz not null default now(),
    constraint gateway_authorization_pkey primary key (reference),
    constraint gateway_authorization_key_unique unique (key),
    constraint gateway_authorization_positive check (amount > 0 and held >= 0 and captured >= 0 and voided >= 0),
    constraint gateway_authorization_adds_up check (amount = held + captured + voided),
    constraint gateway_authorization_refunds_what_was_captured check (refunded between 0 and captured)
);

-- Audits ask by order.
create index gateway_authorization_order on gateway_authorization ("order");

-- Every movement of money, for ever.
create table gateway_movement (
    id        bigint      not null generated always as identity,
    reference text        not null,
    -- The idempotency key of the request that caused it: a request moves money once.
    key       text        not null,
    kind      text        not null,
    amount    bigint      not null,
    currency  text        not null,
    at        timestamptz not null default clock_timestamp(),
    constraint gateway_movement_pkey primary key (id),
    constraint gateway_movement_key_unique unique (key),
    constraint gateway_movement_positive check (amount > 0),
    constraint gateway_movement_kind_known check (kind in ('authorized', 'captured', 'voided', 'refunded')),
    constraint gateway_movement_reference_fkey foreign key (reference) references gateway_authorization (reference)
);

create function gateway_movement_is_append_only() returns trigger language plpgsql as $$
begin
    raise exception 'gateway_movement is append-only';
end
$$;

create trigger gateway_movement_append_only before update or delete or truncate on gateway_movement
    for each statement execute function gateway_movement_is_append_only();

-- What each idempotency key was answered; written with the movement. A void by key answers the authorization's key too,
-- so that an authorization that arrives later is refused; it has no request, as none came yet.
create table gateway_answer (
    key         text        not null,
    request     jsonb,
    status      integer     not null,
    body        jsonb       not null,
    answered_at timestamptz not null default now(),
    constraint gateway_answer_pkey primary key (key)
);

-- How often each key came: what misbehaves "the first time" must know, also after a restart.
create table gateway_arrival (
    key   text    not null,
    count integer not null,
    constraint gateway_arrival_pkey primary key (key)
);
