//! peerbuf.ko: a dma-buf of memory that another driver lends to peers, such as the controller
//! memory buffer of an NVMe disk that stays with its own driver.
//!
//! An open provider is a [`Device`], and its buffers support the same operations as buffers in
//! a BAR, with two differences: the driver's pool chooses the offset of an export, and other
//! users in the kernel also allocate from the pool.

use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::peerbuf::Device;
use crate::errno::Errno;
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys;
use crate::topology::{PciAddress, Pool, Sysfs};

/// The node through which providers are opened.
pub const NODE: &str = "/dev/peerbuf/provider";

/// The devices whose drivers lend memory, in order of address, after a check that this process
/// may ask for it.
///
/// # Errors
/// [`Unavailable`] if the module is not loaded, its node may not be opened, or no driver lends
/// memory.
pub fn probe() -> Result<Vec<PciAddress>, Unavailable> {
    open_node()?;
    let sysfs = Sysfs::default();
    let lends = |address: &PciAddress| sysfs.pool(*address).is_some_and(|pool| pool.published);
    let mut found: Vec<PciAddress> = sysfs.pci_devices().into_iter().filter(lends).collect();
    found.sort();
    if found.is_empty() {
        let noent = Errno(rustix::io::Errno::NOENT.raw_os_error());
        return Err(Unavailable {
            what: "memory of a provider",
            cause: SystemError::new("open", "/sys/bus/pci/devices/*/p2pmem/published", noent),
            remedy: "no driver here lends memory to peers: an NVMe disk with a controller memory \
                     buffer does"
                .into(),
        });
    }
    Ok(found)
}

fn open_node() -> Result<std::os::fd::OwnedFd, Unavailable> {
    let opened = rustix::fs::open(NODE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|errno| Unavailable {
        what: "memory of a provider",
        cause: SystemError::new("open", NODE, errno),
        remedy: match errno {
            rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                "only root may open the node; give this user access with chown or setfacl"
            }
            rustix::io::Errno::NOENT if Path::new("/sys/module/peerbuf").exists() => {
                "the module is loaded, but this /dev has no such node: a container needs it passed in"
            }
            rustix::io::Errno::NOENT => "load peerbuf.ko (see kmod/)",
            _ => "see the error",
        }
        .into(),
    })
}

/// Opens the provider at `address` (`PEERBUF_IOC_PROVIDER_OPEN`).
///
/// # Errors
/// [`ExportError::Unavailable`] if the module's node may not be opened; [`ExportError::System`]
/// with the module's answer: `ENXIO` (no such device), `ENODEV` (the device has no driver),
/// `EOPNOTSUPP` (the driver lends no memory), `ENOSPC` (all memory is taken);
/// [`ExportError::Version`].
pub fn open(address: PciAddress) -> Result<Device, ExportError> {
    let node = open_node()?;
    let opened = sys::peerbuf::open_provider(std::os::fd::AsFd::as_fd(&node), address);
    let fd = opened.map_err(|errno| ExportError::System {
        cause: SystemError::new(
            "ioctl(PEERBUF_IOC_PROVIDER_OPEN)",
            address.to_string(),
            errno,
        ),
        hint: explain(errno, Sysfs::default().pool(address)),
    })?;
    Device::opened(fd, Path::new(NODE).into(), Some(address))
}

/// A hint about the module's refusal to open a provider.
fn explain(errno: Errno, pool: Option<Pool>) -> String {
    match (errno, pool) {
        (
            _,
            Some(Pool {
                published: false, ..
            }),
        ) => ": its driver does not publish its peer-to-peer memory (p2pmem/published is 0)".into(),
        (Errno::NOSPC, Some(pool)) => {
            format!(": {} of {} bytes are free", pool.available, pool.size)
        }
        (Errno::OPNOTSUPP, None) => ": its driver provides no peer-to-peer memory".into(),
        (Errno::NODEV, _) => ": it has no driver".into(),
        _ => String::new(),
    }
}
