-- What the gateway answered where it was asked for something else.

-- An answer of another amount or currency than was asked for. It settles nothing: the payment stays as it was, in doubt, until
-- an answer agrees, the authorization is voided, or somebody has looked. Whatever comes of it, both sides stay on record here.
-- Append-only; the same answer, given again, is one row.
create table payment_difference (
    id                bigint      not null generated always as identity,
    order_id          uuid        not null,
    -- The command under whose id the gateway was asked.
    command_id        uuid        not null,
    movement          text        not null,
    asked_amount      bigint      not null,
    asked_currency    text        not null,
    answered_amount   bigint      not null,
    answered_currency text        not null,
    -- The gateway's.
    reference         text        not null,
    at                timestamptz not null default clock_timestamp(),
    constraint payment_difference_pkey primary key (id),
    constraint payment_difference_once unique (command_id, answered_amount, answered_currency, reference),
    constraint payment_difference_differs
        check ((asked_amount, asked_currency) is distinct from (answered_amount, answered_currency)),
    constraint payment_difference_movement_known check (movement in ('authorize', 'void', 'capture', 'refund')),
    constraint payment_difference_payment_fkey foreign key (order_id) references payment (order_id)
);

-- Whoever looks at a payment looks for its differences.
create index payment_difference_order on payment_difference (order_id, id);

-- The last difference of each payment that nothing has settled yet.
create view payment_in_doubt as
select distinct on (d.order_id) d.*
  from payment_difference d
  join payment p on p.order_id = d.order_id
 where case d.movement
            when 'authorize' then p.status = 'authorizing' and p.authorize_key = d.command_id
            when 'void'      then p.status in ('authorizing', 'authorized')
            when 'capture'   then p.status = 'authorized'
            when 'refund'    then p.refunding > 0
                                  and not exists (select
                                                    from ledger_entry l
                                                   where l.order_id = d.order_id and l.command_id = d.command_id)
       end
 order by d.order_id, d.id desc;

-- As before, but an authorization of another currency that was let go explains itself: it moved nothing in the end.
create or replace view payment_imbalance as
select p.order_id,
       p.held, p.captured, p.refunded,
       l.held as ledger_held, l.captured as ledger_captured, l.refunded as ledger_refunded, l.rest as ledger_rest
  from payment p
  left join lateral (
       select coalesce(sum(amount) filter (where account = 'held'), 0)                              as held,
              coalesce(sum(amount) filter (where account = 'merchant' and movement = 'capture'), 0) as captured,
              coalesce(-sum(amount) filter (where account = 'merchant' and movement = 'refund'), 0) as refunded,
              coalesce(sum(amount), 0)                                                              as rest
         from ledger_entry
        where order_id = p.order_id and currency = p.currency
       ) l on true
 where p.held <> l.held or p.captured <> l.captured or p.refunded <> l.refunded or l.rest <> 0
    or exists (select
                 from ledger_entry e
                where e.order_id = p.order_id and e.currency <> p.currency
                group by e.currency, e.account
               having sum(e.amount) <> 0);
