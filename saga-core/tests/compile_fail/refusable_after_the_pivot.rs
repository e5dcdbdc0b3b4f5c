//~ a step after the pivot cannot be refused, but this command can be (with `SoldOut`)
//~ type Rejection = saga_core::command::Never
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .pivot("pay", |order, ()| Pay { id: order.id })
        .then("ship", |order, (_paid,)| RefusableShip { id: order.id })
        .build()
}

fn main() {}
