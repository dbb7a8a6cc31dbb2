//! peerbuf.ko: a dma-buf of part of a PCI device's BAR.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use peerbuf_uapi::{
    BAR_64BIT, BAR_EXPORT, BAR_MEMORY, BAR_PAGES, BAR_PREFETCHABLE, BAR_WRITE_COMBINING, Bar,
    FEATURES, NUM_BARS,
};
use rustix::fs::{Mode, OFlags};

use crate::buffer::{Access, Buffer, DmaBuf, Kind, Provenance};
use crate::errno::Errno;
use crate::error::{ExportError, SystemError, Unavailable};
use crate::sys;
use crate::topology::{PciAddress, Sysfs};

mod control;
mod request;

pub use control::{
    Attachment, Events, MoveTo, Moved, Piece, Placement, Reasons, Refusal, Revoked, State, Status,
    Watch,
};
pub use request::{RangeRequest, RangesRequest};

/// The directory with the module's node for each bound device.
pub const NODES: &str = "/dev/peerbuf";

/// The existing nodes, in order of address. Opening a node may still fail.
///
/// # Errors
/// [`Unavailable`] if the module is not loaded or has no device.
pub fn probe() -> Result<Vec<PathBuf>, Unavailable> {
    let unavailable = |errno| Unavailable {
        what: "peerbuf.ko",
        cause: SystemError::new("open", NODES, errno),
        remedy: remedy(
            &Sysfs::default().bound_to("peerbuf"),
            Path::new("/sys/module/peerbuf").exists(),
        ),
    };
    let entries = std::fs::read_dir(NODES).map_err(|error| unavailable(Errno::from(&error)))?;
    // The directory also has the provider's and the importer's node.
    let is_device = |entry: &std::fs::DirEntry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.parse::<PciAddress>().is_ok())
    };
    let mut nodes: Vec<PathBuf> = entries
        .flatten()
        .filter(is_device)
        .map(|entry| entry.path())
        .collect();
    if nodes.is_empty() {
        return Err(unavailable(Errno(rustix::io::Errno::NOENT.raw_os_error())));
    }
    nodes.sort();
    Ok(nodes)
}

/// The remedy for a missing node.
fn remedy(bound: &[PciAddress], loaded: bool) -> String {
    if !bound.is_empty() {
        let bound: Vec<String> = bound.iter().map(ToString::to_string).collect();
        return format!(
            "the module has {}, but this /dev has no node for it: a container needs {NODES}/<BDF> passed in",
            bound.join(", ")
        );
    }
    if loaded {
        "the module is loaded, but no device is bound to it: write `peerbuf` to the device's \
         driver_override in sysfs, then its address to /sys/bus/pci/drivers_probe"
    } else {
        "load peerbuf.ko and bind a device to it (see kmod/)"
    }
    .into()
}

/// An open device.
#[derive(Debug)]
pub struct Device {
    fd: OwnedFd,
    path: PathBuf,
    /// The device that provides the memory, if another driver owns it.
    provider: Option<PciAddress>,
}

/// A device's identity and the current state of its BARs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// The device's PCI address.
    pub address: PciAddress,
    /// PCI vendor id.
    pub vendor: u16,
    /// PCI device id.
    pub device: u16,
    /// Offsets and lengths of exports are multiples of this many bytes.
    pub page_size: u32,
    /// The device's memory BARs, by rising index.
    pub bars: Vec<BarInfo>,
}

impl DeviceInfo {
    /// The first BAR that can be exported in part; for a provider, its only BAR.
    pub fn exportable(&self) -> Option<&BarInfo> {
        self.bars.iter().find(|bar| bar.exportable)
    }
}

/// One memory BAR. Sizes are in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BarInfo {
    /// The BAR's index, 0 to 5.
    pub index: u8,
    /// The BAR's size; for a provider, the size of the pool in the BAR.
    pub size: u64,
    /// Bytes that no export uses.
    pub free: u64,
    /// The largest export possible now; for a provider, an upper bound.
    pub largest_free: u64,
    /// Number of exports that hold a range.
    pub exports: u64,
    /// Reads have no side effects.
    pub prefetchable: bool,
    /// The address register is 64 bits wide.
    pub is_64bit: bool,
    /// True if parts of the BAR can be exported.
    pub exportable: bool,
    /// CPU mappings of exports have struct pages, which disks need for direct I/O.
    pub pages: bool,
    /// CPU mappings of exports are write-combining, unless [`RangesRequest::uncached`] asks otherwise.
    pub write_combining: bool,
}

/// The parameters of an export.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// The BAR's index.
    pub bar: u8,
    /// Offset in the BAR in bytes; `None` lets the module choose.
    pub offset: Option<u64>,
    /// Length in bytes.
    pub length: u64,
    /// The access that the descriptor allows. [`Access::Write`] counts as [`Access::ReadWrite`].
    pub access: Access,
}

impl Device {
    /// Opens the node of the device at `address`.
    ///
    /// # Errors
    /// Those of [`Device::open_node`].
    pub fn open(address: PciAddress) -> Result<Device, ExportError> {
        Device::open_node(Path::new(NODES).join(address.to_string()))
    }

    /// Opens a node.
    ///
    /// # Errors
    /// [`ExportError::Unavailable`] if the node does not exist or may not be opened, and
    /// [`ExportError::Version`].
    pub fn open_node(path: impl Into<PathBuf>) -> Result<Device, ExportError> {
        let path = path.into();
        let opened = rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let fd = opened.map_err(|errno| Unavailable {
            what: "peerbuf.ko",
            cause: SystemError::new("open", path.display().to_string(), errno),
            remedy: match errno {
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    "only root may open the node; give this user access with chown or setfacl"
                }
                rustix::io::Errno::NOENT => "see `peerbuf info` for the devices that there are",
                _ => "see the error",
            }
            .into(),
        })?;
        Device::opened(fd, path, None)
    }

    /// Makes a device from a descriptor that accepts the ioctls of a node.
    pub(super) fn opened(
        fd: OwnedFd,
        path: PathBuf,
        provider: Option<PciAddress>,
    ) -> Result<Device, ExportError> {
        let device = Device { fd, path, provider };
        let found = device.raw_query()?.features;
        if FEATURES & !found != 0 {
            let object = device.path.display().to_string();
            return Err(ExportError::Version {
                object,
                found,
                needed: FEATURES,
            });
        }
        Ok(device)
    }

    /// The node's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn raw_query(&self) -> Result<peerbuf_uapi::Query, ExportError> {
        sys::peerbuf::query(self.fd.as_fd()).map_err(|errno| ExportError::System {
            cause: SystemError::new(
                "ioctl(PEERBUF_IOC_QUERY)",
                self.path.display().to_string(),
                errno,
            ),
            hint: String::new(),
        })
    }

    /// Queries the device and the free space of its BARs (`PEERBUF_IOC_QUERY`).
    ///
    /// # Errors
    /// The ioctl's error; `ENODEV` if the device was unbound.
    pub fn query(&self) -> Result<DeviceInfo, ExportError> {
        let query = self.raw_query()?;
        let memory = |(index, bar): (usize, &Bar)| {
            let has = |flag| bar.flags & flag != 0;
            has(BAR_MEMORY).then_some(BarInfo {
                index: index as u8,
                size: bar.size,
                free: bar.free,
                largest_free: bar.largest_free,
                exports: bar.exports,
                prefetchable: has(BAR_PREFETCHABLE),
                is_64bit: has(BAR_64BIT),
                exportable: has(BAR_EXPORT),
                pages: has(BAR_PAGES),
                write_combining: has(BAR_WRITE_COMBINING),
            })
        };
        let mut info = DeviceInfo {
            address: sys::peerbuf::address(query.address),
            vendor: query.vendor,
            device: query.device,
            page_size: query.page_size,
            bars: query.bars.iter().enumerate().filter_map(memory).collect(),
        };
        if let Some(pool) = self.provider.and_then(|at| Sysfs::default().pool(at)) {
            for bar in info.bars.iter_mut().filter(|bar| bar.exportable) {
                (bar.size, bar.free, bar.largest_free) =
                    (pool.size, pool.available, pool.available);
            }
        }
        Ok(info)
    }

    /// The kind of the device's buffers.
    fn kind(&self) -> Kind {
        match self.provider {
            Some(_) => Kind::Provider,
            None => Kind::Bar,
        }
    }

    /// Exports part of a BAR (`PEERBUF_IOC_EXPORT`). The range is taken until the last
    /// descriptor and mapping of the dma-buf are gone, in all processes.
    ///
    /// # Errors
    /// [`ExportError::System`] with the module's answer: `EINVAL` (not page-aligned, outside
    /// the BAR, not a memory BAR), `EBUSY` (part of the range is exported), `ENOSPC` (no room),
    /// `EOPNOTSUPP` (not exportable), `ENODEV` (the device is gone).
    pub fn export(&self, request: Request) -> Result<Buffer, ExportError> {
        self.export_ranges(&RangesRequest {
            bar: request.bar,
            ranges: vec![RangeRequest::Bar {
                offset: request.offset,
                length: request.length,
            }],
            may_move: false,
            devices_read: false,
            uncached: false,
            access: request.access,
        })
    }

    /// The buffer behind a descriptor that the module has just returned.
    fn exported(
        &self,
        fd: OwnedFd,
        info: &DeviceInfo,
        bar: u8,
        name: String,
    ) -> Result<Buffer, ExportError> {
        let provenance = Provenance {
            kind: self.kind(),
            device: Some(info.address),
            bar: Some(bar),
            name,
        };
        Ok(Buffer::from_dmabuf(DmaBuf::from_fd(fd)?, provenance))
    }
}

/// A hint about a refused export: the likely cause and the remedy.
fn explain(errno: Errno, info: &DeviceInfo, bar: u8, ranges: &[RangeRequest]) -> String {
    let Some(bar) = info.bars.iter().find(|found| found.index == bar) else {
        let have: Vec<String> = info.bars.iter().map(|bar| bar.index.to_string()).collect();
        return format!(": the memory BARs of this device are {}", have.join(", "));
    };
    let page = u64::from(info.page_size);
    let places = || {
        ranges.iter().map(|range| match *range {
            RangeRequest::Bar { offset, length } => (offset.unwrap_or(0), length, bar.size),
            RangeRequest::System { length } => (0, length, u64::MAX),
        })
    };
    match errno {
        Errno::NOSPC | Errno::BUSY => format!(
            ": {} of {} bytes are free, the longest run is {}",
            bar.free, bar.size, bar.largest_free
        ),
        Errno::INVAL if ranges.is_empty() => ": there is no range".into(),
        Errno::INVAL if places().any(|(_, length, _)| length == 0) => ": the length is 0".into(),
        Errno::INVAL
            if places().any(|(offset, length, _)| !(offset | length).is_multiple_of(page)) =>
        {
            format!(": offset and length must be multiples of {page}")
        }
        Errno::INVAL
            if places().any(|(offset, length, size)| {
                offset.checked_add(length).is_none_or(|end| end > size)
            }) =>
        {
            format!(": the BAR has {} bytes", bar.size)
        }
        _ => String::new(),
    }
}

const _: () = assert!(NUM_BARS <= u8::MAX as usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_any_range_says_what_can_be_done() {
        let info = DeviceInfo {
            address: "0000:04:00.0".parse().unwrap(),
            vendor: 0,
            device: 0,
            page_size: 4096,
            bars: vec![BarInfo {
                index: 2,
                size: 1 << 20,
                free: 8192,
                largest_free: 4096,
                exports: 1,
                prefetchable: true,
                is_64bit: true,
                exportable: true,
                pages: true,
                write_combining: true,
            }],
        };
        let bar = |offset, length| RangeRequest::Bar { offset, length };
        let system = |length| RangeRequest::System { length };
        let good = bar(None, 4096);
        let invalid = Errno::INVAL;
        for (errno, index, ranges, said) in [
            (
                invalid,
                3,
                &[good][..],
                "the memory BARs of this device are 2",
            ),
            (invalid, 2, &[], "there is no range"),
            (invalid, 2, &[good, system(0)], "the length is 0"),
            (invalid, 2, &[good, bar(Some(1), 4096)], "multiples of 4096"),
            (
                invalid,
                2,
                &[good, bar(Some(1 << 20), 4096)],
                "1048576 bytes",
            ),
            (Errno::BUSY, 2, &[good], "8192 of 1048576 bytes are free"),
        ] {
            let hint = explain(errno, &info, index, ranges);
            assert!(hint.contains(said), "{hint:?} does not say {said:?}");
        }
        // No limit applies to system memory here: only the kernel can refuse the size.
        assert_eq!(explain(invalid, &info, 2, &[good, system(1 << 40)]), "");
    }

    #[test]
    fn the_remedy_for_an_empty_dev_is_not_to_bind_what_is_bound() {
        let bound = ["0000:04:00.0".parse().unwrap()];
        let text = remedy(&bound, true);
        assert!(
            text.contains("0000:04:00.0") && text.contains("passed in"),
            "{text}"
        );
        assert!(remedy(&[], true).contains("driver_override"));
        assert!(remedy(&[], false).contains("load peerbuf.ko"));
    }
}
