//~ `.then(..)` stands after the pivot, and this saga has none yet
//~ make this step the `.pivot(..)`
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .then("ship", |order, ()| Ship { id: order.id })
        .build()
}

fn main() {}
