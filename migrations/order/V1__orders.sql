-- Orders, as order-svc keeps them.
--
-- Four tables: what can be ordered (catalogue), what was ordered (orders, order_line), and where each order has been
-- (order_status_history). An order is written once when it is placed and updated once or twice in its life, always in
-- the transaction of the saga step that moves it; nothing here is ever deleted.
--
-- Constraints have names, and the names are part of the code: a test violates each of them and expects its name.

-- What can be ordered, and for how much: a copy of inventory-svc's items, kept by the consumer of `inventory.items`.
-- It is read when an order is placed and never waited for: an item that has not arrived yet is an unknown product.
create table catalogue (
    sku          text        not null,
    name         text        not null,
    unit_price   bigint      not null,
    currency     text        not null,
    -- An item that inventory-svc took away stays as a row, so that a repeat of an earlier record cannot bring it back.
    withdrawn    boolean     not null default false,
    -- `ce_sequence` of the record that said so. A relay may publish a record again after a later one of the same key;
    -- the row with the higher sequence wins, whatever the order of arrival.
    sequence     bigint      not null,
    changed_at   timestamptz not null default now(),

    constraint catalogue_pkey                 primary key (sku),
    constraint catalogue_price_not_negative   check (unit_price >= 0),
    constraint catalogue_currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$')
);

-- An order as it is now. The id is a UUIDv7 made by order-svc: it grows with time, so it doubles as the sort key of
-- every list and needs no created_at index beside it. The saga of an order has the same id, and the payment token,
-- which only the saga needs, is kept there and nowhere else.
create table orders (
    id         uuid        not null,
    customer   text        not null,
    total      bigint      not null,
    currency   text        not null,
    status     text        not null default 'pending',
    -- Why it is being or was cancelled.
    reason     text,
    -- When it reached its end: confirmed or cancelled.
    closed_at  timestamptz,
    -- The sequence of the last row of its history. It is the ETag, and what a live view compares to see a change.
    version    bigint      not null default 1,
    placed_at  timestamptz not null,

    constraint orders_pkey primary key (id),

    -- 2^53 - 1: the largest whole number that every JSON reader keeps exact.
    constraint orders_total_fits           check (total between 1 and 9007199254740991),
    constraint orders_currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
    constraint orders_version_positive     check (version >= 1),

    -- A status carries its data; the columns that hold the data are there exactly when the status says so.
    constraint orders_status_known  check (status in ('pending', 'confirmed', 'cancelling', 'cancelled')),
    constraint orders_reason_known  check (reason in ('payment_declined', 'out_of_stock', 'payment_not_captured',
                                                      'cancelled_by_customer', 'cancelled_by_operator', 'timed_out',
                                                      'failed')),
    constraint orders_reason_iff_cancelling_or_cancelled
        check ((status in ('cancelling', 'cancelled')) = (reason is not null)),
    constraint orders_closed_at_iff_confirmed_or_cancelled
        check ((status in ('confirmed', 'cancelled')) = (closed_at is not null))
)
-- Room for the one or two updates of a life on the same page. They are not heap-only (the status is indexed below),
-- but they stay near, and an order is updated too rarely for that to matter.
with (fillfactor = 85);

-- Lists are pages of descending ids ("newest first"), continued after the last id seen: `where … and id < $cursor order
-- by id desc limit n` is one range of one of these indexes, however deep the page. Without a filter the primary key
-- serves; with both filters the customer's index does, and the few rows of one customer are filtered by status.
create index orders_by_customer on orders (customer, id desc);
create index orders_by_status   on orders (status, id desc);

-- What was ordered, at the price of that moment. The currency is the order's.
create table order_line (
    order_id    uuid    not null,
    position    integer not null,
    sku         text    not null,
    quantity    bigint  not null,
    unit_price  bigint  not null,

    constraint order_line_pkey               primary key (order_id, position),
    constraint order_line_of_an_order        foreign key (order_id) references orders (id),
    -- A product twice in one order is a mistake of the client; merging lines would hide it.
    constraint order_line_each_sku_once      unique (order_id, sku),
    constraint order_line_position_in_range  check (position between 0 and 99),
    constraint order_line_quantity_in_range  check (quantity between 1 and 1000000),
    constraint order_line_price_not_negative check (unit_price >= 0)
);

-- Every status an order ever had, in order. The sequence counts from 1 per order: it is the id of a server-sent event,
-- so a client that lost its connection says the last one it saw and gets the rest, whichever replica it asks.
create table order_status_history (
    order_id    uuid        not null,
    sequence    bigint      not null,
    -- The status before; null for the first row.
    previous    text,
    status      text        not null,
    reason      text,
    at          timestamptz not null,

    -- Also the only index: a history is read by its order, after a sequence.
    constraint order_status_history_pkey        primary key (order_id, sequence),
    constraint order_status_history_of_an_order foreign key (order_id) references orders (id),
    constraint order_status_history_reason_iff_cancelling_or_cancelled
        check ((status in ('cancelling', 'cancelled')) = (reason is not null)),

    -- The declared graph, once more: a second guard where no code path can get around it. `domain/status.rs` has the
    -- first, and a test compares them.
    constraint order_status_history_walks_the_graph check (
        (previous is null and sequence = 1 and status = 'pending')
        or (previous is not null and sequence > 1 and (previous, status) in (
            ('pending',    'confirmed'),
            ('pending',    'cancelling'),
            ('pending',    'cancelled'),
            ('cancelling', 'cancelled')
        ))
    )
);

-- A history that can be edited proves nothing.
create function order_status_history_is_append_only() returns trigger
    language plpgsql
as $$
begin
    raise exception 'order_status_history is append-only' using errcode = 'restrict_violation';
end
$$;

create trigger order_status_history_is_append_only
    before update or delete or truncate on order_status_history
    for each statement execute function order_status_history_is_append_only();
