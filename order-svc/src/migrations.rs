//! The schema of the orders' database, embedded in the binary.

use saga_core::service::{Migrations, messaging_migrations, saga_migrations};

mod embedded {
    refinery::embed_migrations!("../migrations/order");
}

/// Everything that the orders' database needs, in the order in which it is run.
pub fn all() -> Vec<Migrations> {
    vec![messaging_migrations(), saga_migrations(), own()]
}

/// The service's own migrations, from `migrations/order`.
pub fn own() -> Migrations {
    Migrations { owner: "order", runner: embedded::migrations::runner() }
}
