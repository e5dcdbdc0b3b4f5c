//! What a `main` needs.

pub mod topics {
    //! Creates declared topics.
}
