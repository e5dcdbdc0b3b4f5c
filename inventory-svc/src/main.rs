//! Items, stock and reservations.

fn main() {}
