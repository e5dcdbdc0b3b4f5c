//! The schema of the inventory's database, embedded in the binary.

use saga_core::service::{Migrations, messaging_migrations};

mod embedded {
    refinery::embed_migrations!("../migrations/inventory");
}

/// Everything that the inventory's database needs, in the order in which it is run.
pub fn all() -> Vec<Migrations> {
    vec![messaging_migrations(), own()]
}

/// The service's own migrations, from `migrations/inventory`.
pub fn own() -> Migrations {
    Migrations { owner: "inventory", runner: embedded::migrations::runner() }
}
