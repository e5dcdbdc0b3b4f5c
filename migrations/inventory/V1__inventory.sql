-- Items, stock and reservations, as inventory-svc keeps them.
--
-- A piece of stock is in one of three places: on hand (free to be reserved), reserved (for an order), or gone. Every
-- move between them is a row of `stock_movement`, written by the statement that changes the balance; the balances are
-- there so that nobody has to add the ledger up, and an audit adds it up.
--
-- Constraints have names, and the names are part of the code: a test violates each of them and expects its name.

-- What can be ordered. Its changes are announced on `inventory.items`, in the same transaction.
create table item (
    sku        text        not null,
    name       text        not null,
    -- Minor units.
    unit_price bigint      not null,
    currency   text        not null,
    -- Counts the changes of name and price; it is the ETag.
    version    bigint      not null default 1,
    created_at timestamptz not null default now(),
    changed_at timestamptz not null default now(),

    -- Also the sort key of the list: a page is a range of this index.
    constraint item_pkey                 primary key (sku),
    constraint item_sku_well_formed      check (sku ~ '^[A-Za-z0-9._-]{1,64}$'),
    constraint item_name_length          check (length(name) between 1 and 200),
    constraint item_price_not_negative   check (unit_price >= 0),
    constraint item_currency_is_iso_4217 check (currency ~ '^[A-Z]{3}$'),
    constraint item_version_positive     check (version >= 1)
);

-- How many pieces of an item there are. Apart from `item`, because it changes with every order and the item hardly
-- ever. Rows are updated in place many times: with room on the page and no index on the counts, those updates are HOT.
create table stock (
    sku      text   not null,
    -- Free to be reserved.
    on_hand  bigint not null default 0,
    -- Put aside for orders that are not through yet.
    reserved bigint not null default 0,

    constraint stock_pkey                  primary key (sku),
    constraint stock_sku_fkey              foreign key (sku) references item (sku),
    -- What an adjustment or a reservation may run into. The second is the end of sums, not of shelves.
    constraint stock_on_hand_not_negative  check (on_hand >= 0),
    constraint stock_on_hand_limit         check (on_hand <= 1000000000000),
    constraint stock_reserved_not_negative check (reserved >= 0)
) with (fillfactor = 60);

-- Stock put aside for an order: all of its lines or none. The id is the command's that made it.
create table reservation (
    id          uuid        not null,
    order_id    uuid        not null,
    status      text        not null default 'reserved',
    reserved_at timestamptz not null default now(),
    -- When it was released or committed.
    closed_at   timestamptz,

    constraint reservation_pkey              primary key (id),
    constraint reservation_status_known      check (status in ('reserved', 'released', 'committed')),
    constraint reservation_closed_iff_ended  check ((status = 'reserved') = (closed_at is null))
) with (fillfactor = 80);

-- An order has one reservation at a time; after a release it may have another. Also how release and commit find it.
create unique index reservation_one_per_order on reservation (order_id) where status in ('reserved', 'committed');

create table reservation_line (
    reservation_id uuid   not null,
    sku            text   not null,
    quantity       bigint not null,

    constraint reservation_line_pkey              primary key (reservation_id, sku),
    constraint reservation_line_reservation_fkey  foreign key (reservation_id) references reservation (id),
    constraint reservation_line_sku_fkey          foreign key (sku) references stock (sku),
    constraint reservation_line_quantity_positive check (quantity > 0)
);

-- The ledger: why the balances are what they are. Rows are only ever added.
create table stock_movement (
    id             bigint      generated always as identity,
    sku            text        not null,
    kind           text        not null,
    on_hand_delta  bigint      not null,
    reserved_delta bigint      not null,
    -- For which reservation; null exactly for an adjustment.
    reservation_id uuid,
    -- Why somebody adjusted; null exactly for everything else.
    reason         text,
    moved_at       timestamptz not null default now(),

    constraint stock_movement_pkey             primary key (id),
    constraint stock_movement_sku_fkey         foreign key (sku) references stock (sku),
    constraint stock_movement_reservation_fkey foreign key (reservation_id) references reservation (id),
    constraint stock_movement_kind_known       check (kind in ('adjusted', 'reserved', 'released', 'committed')),
    constraint stock_movement_reason_iff_adjusted
        check ((kind = 'adjusted') = (reason is not null)),
    constraint stock_movement_reservation_iff_not_adjusted
        check ((kind = 'adjusted') = (reservation_id is null)),
    -- Each kind moves pieces one way only.
    constraint stock_movement_direction check (case kind
        when 'adjusted'  then on_hand_delta <> 0 and reserved_delta = 0
        when 'reserved'  then on_hand_delta < 0  and reserved_delta = -on_hand_delta
        when 'released'  then on_hand_delta > 0  and reserved_delta = -on_hand_delta
        when 'committed' then on_hand_delta = 0  and reserved_delta < 0
    end)
);

-- An item's movements, newest first.
create index stock_movement_of_item on stock_movement (sku, id);

create function stock_movement_is_append_only() returns trigger
    language plpgsql as
$$
begin
    raise exception 'stock_movement is append-only'
        using errcode = 'integrity_constraint_violation', constraint = 'stock_movement_is_append_only';
end
$$;

create trigger stock_movement_is_append_only
    before update or delete or truncate on stock_movement
    for each statement execute function stock_movement_is_append_only();
