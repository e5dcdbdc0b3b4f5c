-- The limit counts the pieces that are put aside as well. With the free ones alone, a delivery could fill the shelf while
-- some were put aside, and their release, which nothing may refuse, would not find a place.
alter table stock drop constraint stock_on_hand_limit;
alter table stock add constraint stock_limit check (on_hand + reserved <= 1000000000000);
