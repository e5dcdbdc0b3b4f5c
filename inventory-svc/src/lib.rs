//! Items, stock and reservations.
