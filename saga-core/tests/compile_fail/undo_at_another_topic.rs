//~ an undo goes to the topic of the step that it undoes
mod shop;
use saga_core::saga::{Saga, saga};
use shop::*;

pub fn order() -> Saga<Order> {
    saga::<Order>("order", 1)
        .step("reserve", |order, ()| Reserve { id: order.id })
        .undo(|order, (), _happened| ReleaseAtStore { id: order.id })
        .build()
}

fn main() {
    order();
}
