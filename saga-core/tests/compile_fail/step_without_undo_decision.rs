//~ no method named `pivot` found for struct `UndoUndecided
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .step("reserve", |order, ()| Reserve { id: order.id })
        .pivot("pay", |order, (_reserved,)| Pay { id: order.id })
        .build()
}

fn main() {}
