//! Common code of the test programs in `tests/`.

pub mod buffers;
pub mod bytes;
pub mod clock;
pub mod cost;
pub mod demo;
pub mod disk;
pub mod edu;
pub mod fabric;
pub mod fuzz;
pub mod importer;
pub mod machine;
pub mod memory;
pub mod memtype;
pub mod modules;
pub mod node;
pub mod pci;
pub mod rdma;
pub mod transfer;
