//! A new migration file has to be embedded although no Rust source changed.

fn main() {
    println!("cargo:rerun-if-changed=../migrations/inventory");
}
