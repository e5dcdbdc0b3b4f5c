//~ after the pivot nothing is undone, so nothing that can be refused or undone may stand there
//~ after the pivot use `.then(..)`
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .pivot("pay", |order, ()| Pay { id: order.id })
        .step("reserve", |order, (_paid,)| Reserve { id: order.id })
        .nothing_to_undo()
        .build()
}

fn main() {}
