//! Load: orders of every kind, in a seeded order.

use crate::{faults::Chance, orders::Wish, platform::Platform};

/// How many customers there are at a time.
pub const CUSTOMERS_AT_ONCE: usize = 12;

/// Places orders of every kind, by many customers at once, until all are placed.
///
/// # Panics
/// When a request gets no answer for a minute.
pub async fn load(platform: &Platform, orders: usize, mut chance: Chance) {
    let plenty = platform.item("plenty", 250, 1_000_000).await;
    let other = platform.item("other", 1_999, 1_000_000).await;
    let scarce = platform.item("scarce", 100, i64::try_from(orders / 10).unwrap_or(1)).await;
    let tokens = [
        "tok_visa",
        "tok_visa",
        "tok_visa",
        "tok_visa",
        "tok_declined",
        "tok_lost_answer",
        "tok_error_once",
        "tok_capture_refused",
        "tok_capture_lost_answer",
        "tok_void_lost_answer",
    ];
    let wishes = (0..orders).map(|_| {
        let wish = match chance.below(4) {
            0 => Wish::of(&plenty, 2).and(&other, 1),
            1 => Wish::of(&scarce, 1).and(&plenty, 1),
            _ => Wish::of(&plenty, 1),
        };
        (wish.paid_with(chance.pick::<&str>(&tokens)), chance.below(8) == 0)
    });
    let wishes: Vec<_> = wishes.collect();
    let each = wishes.chunks(orders.div_ceil(CUSTOMERS_AT_ONCE));
    let customers = each.map(async |wishes| {
        for (wish, regrets) in wishes {
            let order = platform.place(wish).await;
            if *regrets {
                platform.cancel(order).await;
            }
        }
    });
    futures::future::join_all(customers).await;
}
