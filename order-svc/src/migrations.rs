//! The schema of this service's own tables, embedded in the binary.

mod embedded {
    #![allow(missing_docs, unreachable_pub, clippy::all)]
    refinery::embed_migrations!("../migrations/order");
}

/// Runs migrations/order.
pub fn runner() -> refinery::Runner {
    embedded::migrations::runner()
}
