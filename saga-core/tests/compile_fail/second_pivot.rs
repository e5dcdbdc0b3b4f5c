//~ a saga has one pivot, and this one has it already
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .pivot("pay", |order, ()| Pay { id: order.id })
        .pivot("pay again", |order, (_paid,)| Pay { id: order.id })
        .build()
}

fn main() {}
