//~ refutable pattern in closure argument
//~ pattern `Happened::InDoubt` not covered
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

use saga_core::saga::Happened;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .step("reserve", |order, ()| Reserve { id: order.id })
        .undo(|order, (), Happened::Yes(_reply)| Release { id: order.id })
        .build()
}

fn main() {}
