//! The command `peerbuf`.
fn main() {}
