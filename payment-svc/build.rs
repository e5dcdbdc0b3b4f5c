//! New migrations are embedded only when this crate is built again.

fn main() {
    println!("cargo:rerun-if-changed=../migrations/payment");
    println!("cargo:rerun-if-changed=../migrations/gateway");
}
