//! What the suites in `tests/` share.

pub mod disk;
pub mod importer;
pub mod node;
