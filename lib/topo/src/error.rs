//! Why a machine could not be read.

use std::path::PathBuf;

/// A snapshot, or this machine, that could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A file that could not be opened or read.
    #[error("{}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A file in none of the formats.
    #[error(
        "{}: not a snapshot: neither peerbuf's (`peerbuf topo --save`), nor a folder with sysfs, nor the output of \
         `lspci -vvv` or `rdma_topo dump`, nor XML of hwloc or NCCL",
        .path.display()
    )]
    Unrecognised {
        /// The file.
        path: PathBuf,
    },
    /// A file of a known format that does not keep to it.
    #[error("{}: read as {format}: {problem}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it was taken for.
        format: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A file of a version that this program does not know.
    #[error("{}: a snapshot of version {found}; this program reads version {known}", .path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u64,
        /// What this program reads.
        known: u64,
    },
    /// Nothing of PCI there.
    #[error("{}: no PCI function is in it (bus/pci/devices, or devices/pci*)", .from.display())]
    NoDevices {
        /// The folder.
        from: PathBuf,
    },
}
