-- Payments, and the ledger that explains them.

-- One payment per order. Its balances are what the ledger adds up to (view payment_imbalance: always empty); they are
-- kept here so that a rule can be checked on the locked row.
create table payment (
    order_id        uuid        not null,
    customer        text        not null,
    currency        text        not null,
    amount          bigint      not null,
    status          text        not null,
    -- The command that the present authorization belongs to: a payment that was declined can be tried anew.
    authorize_key   uuid        not null,
    "authorization" text,
    capture         text,
    decline_reason  text,
    held            bigint      not null default 0,
    captured        bigint      not null default 0,
    refunded        bigint      not null default 0,
    -- Asked for at the gateway and not answered yet: two refunds at once must not give back more than was captured.
    refunding       bigint      not null default 0,
    created_at      timestamptz not null default now(),
    updated_at      timestamptz not null default now(),
    constraint payment_pkey primary key (order_id),
    constraint payment_currency check (currency ~ '^[A-Z]{3}$'),
    constraint payment_amount_positive check (amount > 0),
    constraint payment_status_known
        check (status in ('authorizing', 'authorized', 'declined', 'captured', 'voided')),
    constraint payment_authorized_has_reference
        check (status not in ('authorized', 'captured') or "authorization" is not null),
    constraint payment_captured_has_reference check ((status = 'captured') = (capture is not null)),
    constraint payment_declined_has_reason check ((status = 'declined') = (decline_reason is not null)),
    constraint payment_holds_only_while_authorized check (held = case status when 'authorized' then amount else 0 end),
    constraint payment_captures_once check (captured = case status when 'captured' then amount else 0 end),
    constraint payment_refunds_what_was_captured check (refunded >= 0 and refunding >= 0 and refunded + refunding <= captured)
);

-- The list, newest first.
create index payment_created on payment (created_at, order_id);

-- Every movement of money, as two entries that add up to nothing: what leaves one account enters another.
--   customer  what the customer has given (negative)
--   held      held at the gateway
--   merchant  ours
create table ledger_entry (
    id         bigint      not null generated always as identity,
    order_id   uuid        not null,
    -- The command that moved it, and how: a command moves money once.
    command_id uuid        not null,
    movement   text        not null,
    account    text        not null,
    amount     bigint      not null,
    currency   text        not null,
    -- The gateway's.
    reference  text        not null,
    at         timestamptz not null default now(),
    constraint ledger_entry_pkey primary key (id),
    constraint ledger_entry_once unique (order_id, command_id, movement, account),
    constraint ledger_entry_movement_known check (movement in ('authorize', 'void', 'capture', 'refund')),
    constraint ledger_entry_account_known check (account in ('customer', 'held', 'merchant')),
    constraint ledger_entry_moves_something check (amount <> 0),
    constraint ledger_entry_payment_fkey foreign key (order_id) references payment (order_id)
);

create function ledger_entry_is_append_only() returns trigger language plpgsql as $$
begin
    raise exception 'ledger_entry is append-only';
end
$$;

create trigger ledger_entry_append_only before update or delete or truncate on ledger_entry
    for each statement execute function ledger_entry_is_append_only();

-- Payments whose balances the ledger does not explain, and ledgers that do not add up to nothing. Always empty.
create view payment_imbalance as
select p.order_id,
       p.held, p.captured, p.refunded,
       l.held as ledger_held, l.captured as ledger_captured, l.refunded as ledger_refunded, l.rest as ledger_rest
  from payment p
  left join lateral (
       select coalesce(sum(amount) filter (where account = 'held'), 0)                              as held,
              coalesce(sum(amount) filter (where account = 'merchant' and movement = 'capture'), 0) as captured,
              coalesce(-sum(amount) filter (where account = 'merchant' and movement = 'refund'), 0) as refunded,
              coalesce(sum(amount), 0)                                                              as rest,
              coalesce(bool_and(currency = p.currency), true)                                       as one_currency
         from ledger_entry
        where order_id = p.order_id
       ) l on true
 where p.held <> l.held or p.captured <> l.captured or p.refunded <> l.refunded or l.rest <> 0 or not l.one_currency;
