//! Which messages of a batch are new.
