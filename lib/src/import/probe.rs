//! The importer of peerbuf_probe.ko, which asks the kernel for the mapping that a driver would
//! get.
//!
//! A [`Probe`] attaches any dma-buf on behalf of a PCI device and maps it, as the device's
//! driver would, and reports the route of the addresses. It starts no DMA and reads no byte.
//! The report is the kernel's answer, which is no proof that bytes arrive: see [`crate::plan`].
//!
//! For tests of exporters, the importer can also emulate a driver that misbehaves:
//! [`OnInvalidate::Hold`], [`Options::linger`], [`Attachment::fence`].
//!
//! ```no_run
//! use peerbuf::export::peerbuf::{Device, Request};
//! use peerbuf::import::probe::{Direction, Options, Probe};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let gpu = Device::open("0000:03:00.0".parse()?)?;
//! let request = Request { bar: 2, offset: None, length: 1 << 20, access: peerbuf::Access::ReadWrite };
//! let buffer = gpu.export(request)?;
//! let dmabuf = buffer.dmabuf().expect("device memory is a dma-buf");
//! // What would the driver of this disk get?
//! let disk = "0000:04:00.0".parse()?;
//! let attachment = Probe::open()?.attach(dmabuf, disk, Options::default())?;
//! let mapping = attachment.map(Direction::FromDevice)?;
//! println!("{:?} of {:?}", mapping.route(), mapping.provider);
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use peerbuf_uapi::probe as abi;
use rustix::fs::{Mode, OFlags};

use super::{Attached, Importer, impossible};
use crate::buffer::{Buffer, BufferRange, DmaBuf};
use crate::errno::Errno;
use crate::error::{ImportError, ProbeError, SystemError};
use crate::plan::{Path, Plan, ReasonCode};
use crate::sys::importer::{self as ioctl, Step};
use crate::sys::peerbuf::{address, number};
use crate::topology::PciAddress;

/// The importer's node, which exists while peerbuf_probe.ko is loaded.
pub const NODE: &str = "/dev/peerbuf/importer";

/// Maximum duration for a misbehaving attachment.
pub const LONGEST: Duration = Duration::from_millis(abi::MAX_MS as u64);

/// The open importer.
#[derive(Debug)]
pub struct Probe {
    fd: OwnedFd,
}

/// The kind of importer to emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Kind {
    /// Accepts invalidations and peer memory.
    #[default]
    Peer,
    /// Accepts invalidations, and system memory only.
    System,
    /// Accepts peer memory but no invalidations, and pins before it maps. Most RDMA drivers.
    Pinning,
    /// Static attachment: system memory that stays in place while it is mapped.
    Static,
}

/// The reaction to an exporter's notification that a mapping is stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnInvalidate {
    /// Unmap at once.
    #[default]
    Unmap,
    /// Unmap at once, and map again soon after.
    Remap,
    /// Misbehave: keep the mapping for a time, or with `None` until [`Attachment::unmap`].
    Hold(Option<Duration>),
}

/// The parameters of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The kind of importer to emulate.
    pub kind: Kind,
    /// Only for kinds that accept invalidations ([`Kind::Peer`], [`Kind::System`]).
    pub on_invalidate: OnInvalidate,
    /// Time that the attachment stays after its descriptor was closed.
    pub linger: Duration,
}

/// The device's access to the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Read and write.
    Bidirectional,
    /// Read (`DMA_TO_DEVICE`).
    ToDevice,
    /// Write (`DMA_FROM_DEVICE`).
    FromDevice,
}

/// The usage of a fence on the buffer (`enum dma_resv_usage`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Usage {
    /// Memory management, such as a move: all users wait for it.
    Kernel,
    /// A write.
    Write,
    /// A read.
    Read,
    /// Other work, for which only memory management waits.
    Bookkeep,
}

/// The route to a mapping's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Route {
    /// System memory only.
    System,
    /// Peer memory by bus addresses, which the switch between the devices routes.
    BusAddress,
    /// Peer memory, through the host bridge.
    HostBridge,
    /// More than one of these.
    Mixed,
    /// The kernel gave addresses that lead neither to system memory nor to a BAR that it knows.
    Unknown,
}

/// The kernel's result for a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Mapping {
    /// DMA segments.
    pub segments: u64,
    /// Total number of bytes.
    pub bytes: u64,
    /// Bytes in system memory.
    pub system_bytes: u64,
    /// Bytes in a BAR, by bus address.
    pub bus_bytes: u64,
    /// Bytes in a BAR, through the host bridge.
    pub bridge_bytes: u64,
    /// Bytes elsewhere.
    pub other_bytes: u64,
    /// The device whose BAR the first peer segment is in.
    pub provider: Option<PciAddress>,
    /// Time that the kernel took to make the mapping.
    pub took: Duration,
}

impl Mapping {
    /// The route to the mapping's bytes, as one value.
    pub fn route(&self) -> Route {
        match [
            self.system_bytes,
            self.bus_bytes,
            self.bridge_bytes,
            self.other_bytes,
        ] {
            [_, 0, 0, 0] => Route::System,
            [0, _, 0, 0] => Route::BusAddress,
            [0, 0, _, 0] => Route::HostBridge,
            [0, 0, 0, _] => Route::Unknown,
            _ => Route::Mixed,
        }
    }

    /// True if any of the mapping's bytes are in another device.
    pub fn has_peer_memory(&self) -> bool {
        self.bus_bytes + self.bridge_bytes != 0
    }
}

/// The state of an attachment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The current mapping, or the last one; `None` before the first.
    pub mapping: Option<Mapping>,
    /// The attachment is mapped.
    pub mapped: bool,
    /// The attachment is still mapped after an invalidation.
    pub stale: bool,
    /// The attachment has pinned the buffer.
    pub pinned: bool,
    /// Mapped into the kernel's address space; `Some(true)` if the memory is device memory.
    pub vmapped: Option<bool>,
    /// A fence of the attachment has not signalled.
    pub fenced: bool,
    /// The attachment is detached from the buffer.
    pub detached: bool,
    /// The attachment was detached because the device's driver unbound.
    pub device_gone: bool,
    /// Number of invalidations that the attachment received.
    pub invalidations: u64,
    /// Number of mappings made.
    pub maps: u64,
    /// Number of these mappings made on an invalidation, by [`OnInvalidate::Remap`].
    pub remaps: u64,
    /// The error of the last automatic remap.
    pub remap_error: Option<Errno>,
}

impl Probe {
    /// Opens [`NODE`].
    ///
    /// # Errors
    /// [`ProbeError::Unavailable`] if peerbuf_probe.ko is not loaded or the node may not be
    /// opened.
    pub fn open() -> Result<Probe, ProbeError> {
        let opened = rustix::fs::open(NODE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let fd = opened.map_err(|errno| ProbeError::Unavailable {
            cause: SystemError::new("open", NODE, errno),
            remedy: match errno {
                rustix::io::Errno::NOENT => "load peerbuf_probe.ko (see kmod/)",
                rustix::io::Errno::ACCESS | rustix::io::Errno::PERM => {
                    "only root may open the node; give this user access with chown or setfacl"
                }
                _ => "see the error",
            },
        })?;
        Ok(Probe { fd })
    }

    /// Attaches a dma-buf on behalf of a PCI device, whose driver must do DMA through the
    /// kernel. The attachment keeps the buffer and the device alive until it is dropped. The
    /// device's driver can still be unbound, which ends the attachment.
    ///
    /// # Errors
    /// [`ProbeError::System`] with the answer of the module (`ENXIO`: no such device;
    /// `EUNATCH`: no driver that does DMA; `EINVAL`: a time above [`LONGEST`], or a time for a
    /// kind without invalidations) or of the exporter (`EOPNOTSUPP` and others).
    pub fn attach(
        &self,
        dmabuf: &DmaBuf,
        device: PciAddress,
        options: Options,
    ) -> Result<Attachment, ProbeError> {
        let (on_invalidate, hold) = match options.on_invalidate {
            OnInvalidate::Unmap => (abi::ON_INVALIDATE_UNMAP, None),
            OnInvalidate::Remap => (abi::ON_INVALIDATE_REMAP, None),
            OnInvalidate::Hold(time) => (abi::ON_INVALIDATE_HOLD, time),
        };
        let request = abi::Attach {
            flags: match options.kind {
                Kind::Peer => abi::DYNAMIC | abi::PEER,
                Kind::System => abi::DYNAMIC,
                Kind::Pinning => abi::PEER,
                Kind::Static => 0,
            },
            fd_flags: OFlags::CLOEXEC.bits(),
            on_invalidate,
            hold_ms: hold.map_or(0, |time| millis(time).max(1)),
            detach_ms: millis(options.linger),
            address: number(device),
            ..abi::Attach::default()
        };
        let object = format!("{} for {device}", dmabuf.exporter());
        let (fd, ns) = ioctl::attach(self.fd.as_fd(), dmabuf.as_fd(), request)
            .map_err(|errno| system("ioctl(PEERBUF_PROBE_IOC_ATTACH)", object.clone(), errno))?;
        Ok(Attachment {
            fd,
            object,
            took: Duration::from_nanos(ns),
        })
    }
}

/// Milliseconds, rounded up. A value that does not fit is above [`LONGEST`] in any case.
fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u32::MAX)
}

/// A dma-buf attached on behalf of a device. Dropping it detaches the dma-buf after
/// [`Options::linger`].
#[derive(Debug)]
pub struct Attachment {
    fd: OwnedFd,
    object: String,
    took: Duration,
}

impl Attachment {
    /// Time that the kernel took to attach.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Maps the buffer for the device, and waits until its bytes are in place.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `EBUSY` (already mapped), `EINVAL` (the kernel has no route, or a
    /// [`Kind::Pinning`] has not pinned), `ENODEV` (revoked), `ENOTCONN` (detached),
    /// `ETIMEDOUT` (the bytes were not in place after 30 seconds), or another error of the
    /// exporter.
    pub fn map(&self, direction: Direction) -> Result<Mapping, ProbeError> {
        let direction = match direction {
            Direction::Bidirectional => abi::BIDIRECTIONAL,
            Direction::ToDevice => abi::TO_DEVICE,
            Direction::FromDevice => abi::FROM_DEVICE,
        };
        ioctl::map(self.fd.as_fd(), direction)
            .map_err(|errno| system("ioctl(PEERBUF_PROBE_IOC_MAP)", &self.object, errno))?;
        Ok(mapping(&self.raw_query()?))
    }

    /// Unmaps the buffer, and returns the time that the kernel took.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `ENOENT` if the buffer is not mapped, such as after an
    /// invalidation.
    pub fn unmap(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Unmap, "ioctl(PEERBUF_PROBE_IOC_UNMAP)")
    }

    /// Pins the buffer: asks the exporter to keep it in place.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `EINVAL` (a [`Kind::Static`]), `EBUSY` (pinned already), `ENOTCONN`
    /// (detached), or another error of the exporter.
    pub fn pin(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Pin, "ioctl(PEERBUF_PROBE_IOC_PIN)")
    }

    /// Unpins the buffer.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `ENOENT` (not pinned), `EBUSY` (mapped, and a [`Kind::Pinning`]),
    /// `ENOTCONN` (detached).
    pub fn unpin(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Unpin, "ioctl(PEERBUF_PROBE_IOC_UNPIN)")
    }

    /// Adds a fence to the buffer, which signals by itself after `limit`.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `EBUSY` (the previous fence has not signalled), `EINVAL` (a time
    /// of zero, or above [`LONGEST`]), `ENOTCONN` (detached).
    pub fn fence(&self, usage: Usage, limit: Duration) -> Result<(), ProbeError> {
        let usage = match usage {
            Usage::Kernel => abi::FENCE_KERNEL,
            Usage::Write => abi::FENCE_WRITE,
            Usage::Read => abi::FENCE_READ,
            Usage::Bookkeep => abi::FENCE_BOOKKEEP,
        };
        ioctl::fence(self.fd.as_fd(), usage, millis(limit))
            .map_err(|errno| system("ioctl(PEERBUF_PROBE_IOC_FENCE)", &self.object, errno))
    }

    /// Signals the fence.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `ENOENT` if there is no fence any more.
    pub fn signal(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Signal, "ioctl(PEERBUF_PROBE_IOC_SIGNAL)")
    }

    /// Maps the buffer into the kernel's address space, without an access to its bytes.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `EBUSY` (already mapped), `EINVAL` (the exporter has no such
    /// mappings), `ENOTCONN` (detached), or another error of the exporter.
    pub fn vmap(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Vmap, "ioctl(PEERBUF_PROBE_IOC_VMAP)")
    }

    /// Removes the mapping in the kernel's address space.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `ENOENT` if there is none.
    pub fn vunmap(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Vunmap, "ioctl(PEERBUF_PROBE_IOC_VUNMAP)")
    }

    /// Detaches at once, even if the attachment was told to hold its mapping. Returns the time
    /// that the kernel took. The report remains available.
    ///
    /// # Errors
    /// [`ProbeError::System`]: `ENOTCONN` if the attachment is already detached.
    pub fn detach(&self) -> Result<Duration, ProbeError> {
        self.step(Step::Detach, "ioctl(PEERBUF_PROBE_IOC_DETACH)")
    }

    /// Returns the attachment's state. Does not wait for the buffer.
    ///
    /// # Errors
    /// [`ProbeError::System`] if the descriptor does not belong to the module.
    pub fn report(&self) -> Result<Report, ProbeError> {
        let query = self.raw_query()?;
        let is = |flag| query.state & flag != 0;
        Ok(Report {
            mapping: (query.maps != 0).then(|| mapping(&query)),
            mapped: is(abi::MAPPED),
            stale: is(abi::STALE),
            pinned: is(abi::PINNED),
            vmapped: is(abi::VMAPPED).then(|| is(abi::VMAP_IOMEM)),
            fenced: is(abi::FENCED),
            detached: is(abi::DETACHED),
            device_gone: is(abi::DEVICE_GONE),
            invalidations: query.invalidations,
            maps: query.maps,
            remaps: query.remaps,
            remap_error: (query.remap_error != 0).then_some(Errno(query.remap_error as i32)),
        })
    }

    fn raw_query(&self) -> Result<abi::Query, ProbeError> {
        ioctl::query(self.fd.as_fd())
            .map_err(|errno| system("ioctl(PEERBUF_PROBE_IOC_QUERY)", &self.object, errno))
    }

    fn step(&self, step: Step, call: &'static str) -> Result<Duration, ProbeError> {
        ioctl::step(self.fd.as_fd(), step)
            .map(Duration::from_nanos)
            .map_err(|errno| system(call, &self.object, errno))
    }
}

/// The importer as the driver of one device: an [`Importer`] that moves no bytes.
#[derive(Debug)]
pub struct OnBehalf {
    probe: Probe,
    device: PciAddress,
    options: Options,
}

impl OnBehalf {
    /// Makes an importer on behalf of this device.
    pub fn new(probe: Probe, device: PciAddress, options: Options) -> OnBehalf {
        OnBehalf {
            probe,
            device,
            options,
        }
    }

    /// Attaches a buffer and maps it, for both directions.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] with [`ReasonCode::NoDmaBuf`], or with
    /// [`ReasonCode::KernelRefused`] and the kernel's answer.
    pub fn map(&self, buffer: &Buffer) -> Result<(Attachment, Mapping), ImportError> {
        let name = self.device.to_string();
        let Some(dmabuf) = buffer.dmabuf() else {
            let evidence = "the buffer is host memory without a dma-buf".into();
            return Err(impossible(&name, buffer, ReasonCode::NoDmaBuf, evidence));
        };
        let refused = |error: ProbeError| {
            let code = ReasonCode::KernelRefused;
            impossible(&name, buffer, code, error.to_string())
        };
        let attachment = self.probe.attach(dmabuf, self.device, self.options);
        let attachment = attachment.map_err(refused)?;
        let mapping = attachment.map(Direction::Bidirectional).map_err(refused)?;
        Ok((attachment, mapping))
    }
}

impl Importer for OnBehalf {
    fn name(&self) -> String {
        format!("the driver of {}", self.device)
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        let (attachment, mapping) = self.map(range.buffer())?;
        let path = match mapping.route() {
            Route::BusAddress | Route::HostBridge => Path::PeerToPeer,
            Route::System => Path::SharedHostMemory,
            Route::Mixed | Route::Unknown => {
                let evidence = format!("the kernel gave {mapping:?}");
                let (name, code) = (Importer::name(self), ReasonCode::PlacementUnknown);
                return Err(impossible(&name, range.buffer(), code, evidence));
            }
        };
        Ok(Box::new(Asked {
            _attachment: attachment,
            path,
        }))
    }
}

/// A mapping in the kernel that no device uses.
struct Asked {
    /// Keeps the mapping alive.
    _attachment: Attachment,
    path: Path,
}

impl Attached for Asked {
    fn plan(&self) -> Plan {
        Plan {
            path: self.path,
            reasons: Vec::new(),
        }
    }

    fn write(&mut self, _: &[u8]) -> Result<Option<Plan>, ImportError> {
        Ok(None)
    }

    fn read(&mut self, _: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        Ok(None)
    }
}

impl AsFd for Attachment {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn mapping(query: &abi::Query) -> Mapping {
    Mapping {
        segments: query.segments,
        bytes: query.bytes,
        system_bytes: query.system_bytes,
        bus_bytes: query.bus_bytes,
        bridge_bytes: query.bridge_bytes,
        other_bytes: query.other_bytes,
        provider: (query.provider != abi::PROVIDER_NONE).then(|| address(query.provider)),
        took: Duration::from_nanos(query.map_ns),
    }
}

fn system(call: &'static str, object: impl Into<String>, errno: Errno) -> ProbeError {
    let hint = match errno {
        Errno::NXIO => ": there is no such PCI device",
        Errno::UNATCH => {
            ": no driver of the device uses the kernel's DMA API, or bus mastering is off"
        }
        Errno::OPNOTSUPP => ": the exporter refuses an importer of this kind",
        Errno::NODEV => ": the exporter's device is gone, or its memory was revoked",
        Errno::NOTCONN => ": the attachment is detached from the buffer",
        _ => "",
    };
    ProbeError::System {
        cause: SystemError::new(call, object, errno),
        hint,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_says_its_route_in_a_word() {
        let bytes = |system_bytes, bus_bytes, bridge_bytes, other_bytes| Mapping {
            system_bytes,
            bus_bytes,
            bridge_bytes,
            other_bytes,
            ..Mapping::default()
        };
        assert_eq!(bytes(1, 0, 0, 0).route(), Route::System);
        assert_eq!(bytes(0, 1, 0, 0).route(), Route::BusAddress);
        assert_eq!(bytes(0, 0, 1, 0).route(), Route::HostBridge);
        assert_eq!(bytes(0, 0, 0, 1).route(), Route::Unknown);
        assert_eq!(bytes(1, 0, 1, 0).route(), Route::Mixed);
        assert!(bytes(1, 0, 1, 0).has_peer_memory());
        assert!(!bytes(1, 0, 0, 1).has_peer_memory());
    }

    #[test]
    fn times_are_rounded_up_and_never_wrap() {
        assert_eq!(millis(Duration::ZERO), 0);
        assert_eq!(millis(Duration::from_micros(1)), 1);
        assert_eq!(millis(LONGEST), abi::MAX_MS);
        assert_eq!(millis(Duration::MAX), u32::MAX);
    }
}
