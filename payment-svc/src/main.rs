//! Payments, the payment gateway port, and a simulated provider.

fn main() {}
