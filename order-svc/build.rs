//! Rebuilds when a migration is added: they are embedded by a macro that cargo does not know reads files.

fn main() {
    println!("cargo:rerun-if-changed=../migrations/order");
}
