//! The lab runner behind `cargo lab`.
fn main() {}
