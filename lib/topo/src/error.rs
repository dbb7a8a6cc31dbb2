//! Errors of reading a machine.

use std::path::PathBuf;

/// The error of reading a snapshot or this machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A file could not be opened or read.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The OS error.
        source: std::io::Error,
    },
    /// The file has no known format.
    #[error(
        "{}: not a snapshot: neither peerbuf's (`peerbuf topo --save`), nor a folder with sysfs, nor the output of \
         `lspci -vvv` or `rdma_topo dump`, nor XML of hwloc or NCCL",
        .path.display()
    )]
    Unrecognised {
        /// The file.
        path: PathBuf,
    },
    /// The file violates its format.
    #[error("{}: read as {format}: {problem}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The assumed format.
        format: &'static str,
        /// The violation.
        problem: String,
    },
    /// The snapshot has a version that this program does not know.
    #[error("{}: the snapshot has version {found}; this program reads version {known}", .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The file's version.
        found: u64,
        /// The known version.
        known: u64,
    },
    /// The folder contains no PCI function.
    #[error("{}: found no PCI function there (looked in bus/pci/devices and devices/pci*)", .from.display())]
    NoDevices {
        /// The folder.
        from: PathBuf,
    },
}
