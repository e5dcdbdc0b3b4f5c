//~ an undo cannot be refused, but this command can be (with `SoldOut`)
//~ type Rejection = saga_core::command::Never
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .step("reserve", |order, ()| Reserve { id: order.id })
        .undo(|order, (), _happened| RefusableRelease { id: order.id })
        .build()
}

fn main() {}
