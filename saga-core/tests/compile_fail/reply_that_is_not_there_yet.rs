//~ expected a tuple with 1 element, found one with 2 elements
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .step("reserve", |order, ()| Reserve { id: order.id })
        .undo(|order, (), _happened| Release { id: order.id })
        .pivot("pay", |order, (_reserved, _paid)| Pay { id: order.id })
        .build()
}

fn main() {}
