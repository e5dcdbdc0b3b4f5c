//! The schemas of the payments' and of the simulated provider's databases, embedded in the binary.

use saga_core::service::{Migrations, messaging_migrations};

mod payment_sql {
    refinery::embed_migrations!("../migrations/payment");
}

mod gateway_sql {
    refinery::embed_migrations!("../migrations/gateway");
}

/// Everything that the payments' database needs, in the order in which it is run.
pub fn all() -> Vec<Migrations> {
    vec![messaging_migrations(), own()]
}

/// The service's own migrations, from `migrations/payment`.
pub fn own() -> Migrations {
    Migrations { owner: "payment", runner: payment_sql::migrations::runner() }
}

/// The simulator's migrations, from `migrations/gateway`, for a database of its own.
pub fn gateway() -> Migrations {
    Migrations { owner: "gateway", runner: gateway_sql::migrations::runner() }
}
