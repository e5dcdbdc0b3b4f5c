mod shop;
use saga_core::saga::{Happened, Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .local_with_undo("open order", "cancel order")
        .step("reserve", |order, ()| Reserve { id: order.id })
        .undo(|order, (), happened| match happened {
            Happened::Yes(_) | Happened::InDoubt => Release { id: order.id },
        })
        .pivot("pay", |order, (_reserved,)| Pay { id: order.id })
        .then("ship", |order, (_reserved, _paid)| Ship { id: order.id })
        .build()
}

fn main() {}
