//! Devices that this process drives, through `vfio-pci`.
//!
//! A device is opened through its IOMMU group, in its own container with the type 1 IOMMU.
//! Every kernel with VFIO has this interface. Many kernels lack the newer interface of iommufd.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytemuck::Pod;
use rustix::fs::{Mode, OFlags};

use crate::errno::Errno;
use crate::error::{BufferError, SystemError, Unavailable};
use crate::sys::memory::Map;
use crate::sys::vfio as sys;
use crate::topology::PciAddress;

const WHAT: &str = "VFIO";
const CONTAINER: &str = "/dev/vfio/vfio";

/// The region of the configuration space, and the offset of the command register in it.
const CONFIGURATION: u32 = 7;
const COMMAND: u64 = 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;

/// The devices bound to `vfio-pci`, in order of address.
///
/// # Errors
/// [`Unavailable`] if there is none.
pub fn devices() -> Result<Vec<PciAddress>, Unavailable> {
    const DRIVER: &str = "/sys/bus/pci/drivers/vfio-pci";
    let unavailable = |errno| Unavailable {
        what: WHAT,
        cause: SystemError::new("open", DRIVER, errno),
        remedy: if Path::new(DRIVER).exists() {
            "no device is bound to vfio-pci: write `vfio-pci` to the device's driver_override in \
             sysfs, then its address to /sys/bus/pci/drivers_probe"
        } else {
            "`modprobe vfio-pci`, and bind a device to it"
        }
        .into(),
    };
    let entries = std::fs::read_dir(DRIVER).map_err(|error| unavailable(Errno::from(&error)))?;
    let mut found: Vec<PciAddress> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    if found.is_empty() {
        return Err(unavailable(rustix::io::Errno::NODEV.into()));
    }
    found.sort();
    Ok(found)
}

/// An open device. Clones refer to the same device.
#[derive(Debug, Clone)]
pub struct VfioDevice {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    // Field order is close order: the kernel releases the group only after the device is
    // closed.
    device: OwnedFd,
    _group: OwnedFd,
    container: OwnedFd,
    address: PciAddress,
}

/// The device's file, for features of VFIO that this crate does not have.
impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device()
    }
}

impl VfioDevice {
    /// Opens the device at `address`. No process may have its group open.
    ///
    /// # Errors
    /// [`Unavailable`], with the obstacle.
    pub fn open(address: PciAddress) -> Result<VfioDevice, Unavailable> {
        let unavailable = |call, object: String, errno: Errno, remedy: &str| Unavailable {
            what: WHAT,
            cause: SystemError::new(call, object, errno),
            remedy: remedy.into(),
        };
        let link = format!("/sys/bus/pci/devices/{address}/iommu_group");
        let group = std::fs::read_link(&link).map_err(|error| {
            let remedy = "the device has no IOMMU group: switch the IOMMU on (in the firmware, and \
                          with intel_iommu=on or amd_iommu=on)";
            unavailable("readlink", link.clone(), Errno::from(&error), remedy)
        })?;
        let group = Path::new("/dev/vfio").join(group.file_name().unwrap_or_default());
        let container = open(Path::new(CONTAINER), "`modprobe vfio-pci`, as root")?;
        let asked = sys::api_version(container.as_fd()).and_then(|version| {
            Ok((
                version,
                sys::has_extension(container.as_fd(), sys::TYPE1_V2)?,
            ))
        });
        if !matches!(asked, Ok((sys::API_VERSION, true))) {
            let errno = asked.err().unwrap_or(Errno::OPNOTSUPP);
            let remedy = "`modprobe vfio_iommu_type1`, or a kernel with CONFIG_VFIO_IOMMU_TYPE1";
            let call = "ioctl(VFIO_CHECK_EXTENSION)";
            return Err(unavailable(call, CONTAINER.into(), errno, remedy));
        }
        let group_name = || group.display().to_string();
        let opened = open(
            &group,
            "bind every device of the group to vfio-pci; one process has a group at a time",
        )?;
        let viable = sys::group_flags(opened.as_fd()).map_err(|errno| {
            unavailable("ioctl(VFIO_GROUP_GET_STATUS)", group_name(), errno, "")
        })? & sys::GROUP_VIABLE;
        if viable == 0 {
            let remedy = "another driver has a device of the group: bind every device of the group to vfio-pci";
            let call = "ioctl(VFIO_GROUP_GET_STATUS)";
            return Err(unavailable(call, group_name(), Errno::PERM, remedy));
        }
        sys::set_container(opened.as_fd(), container.as_fd()).map_err(|errno| {
            let call = "ioctl(VFIO_GROUP_SET_CONTAINER)";
            unavailable(call, group_name(), errno, "see the error")
        })?;
        sys::set_iommu(container.as_fd(), sys::TYPE1_V2).map_err(|errno| {
            let remedy = "where the IOMMU does not remap interrupts, \
                          vfio_iommu_type1.allow_unsafe_interrupts=1 on the kernel's command line";
            unavailable("ioctl(VFIO_SET_IOMMU)", group_name(), errno, remedy)
        })?;
        let name = CString::new(address.to_string()).unwrap_or_default();
        let device = sys::device_fd(opened.as_fd(), &name).map_err(|errno| {
            let remedy = "bind the device to vfio-pci";
            let call = "ioctl(VFIO_GROUP_GET_DEVICE_FD)";
            unavailable(call, address.to_string(), errno, remedy)
        })?;
        let inner = Arc::new(Inner {
            device,
            _group: opened,
            container,
            address,
        });
        Ok(VfioDevice { inner })
    }

    /// The device's PCI address.
    pub fn address(&self) -> PciAddress {
        self.inner.address
    }

    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.inner.device.as_fd()
    }

    pub(crate) fn container(&self) -> BorrowedFd<'_> {
        self.inner.container.as_fd()
    }

    /// Duplicates the device's descriptor, for mappings of the device.
    pub(crate) fn another_descriptor(&self) -> Result<OwnedFd, SystemError> {
        let cloned = self.inner.device.try_clone();
        cloned.map_err(|error| self.failed("fcntl(F_DUPFD_CLOEXEC)")((&error).into()))
    }

    pub(crate) fn region(&self, index: u32) -> Result<sys::RegionInfo, SystemError> {
        let info = sys::region_info(self.device(), index);
        info.map_err(self.failed("ioctl(VFIO_DEVICE_GET_REGION_INFO)"))
    }

    /// The size of a BAR in bytes; 0 for a BAR that the device does not have.
    ///
    /// # Errors
    /// The ioctl's error: `EINVAL` for an index above 5.
    pub fn bar_size(&self, bar: u8) -> Result<u64, SystemError> {
        if bar > 5 {
            return Err(self.failed("ioctl(VFIO_DEVICE_GET_REGION_INFO)")(
                Errno::INVAL,
            ));
        }
        Ok(self.region(bar.into())?.size)
    }

    /// Enables the device's BARs and its DMA (memory decoding and bus mastering).
    ///
    /// # Errors
    /// The error of reading or writing the configuration space.
    pub fn enable(&self) -> Result<(), SystemError> {
        let at = self.region(CONFIGURATION)?.offset + COMMAND;
        let mut command = [0; 2];
        let short = |moved| {
            if moved == 2 {
                Ok(())
            } else {
                Err(rustix::io::Errno::IO)
            }
        };
        rustix::io::pread(self.device(), &mut command, at)
            .and_then(short)
            .map_err(|errno| self.failed("pread of the configuration space")(errno.into()))?;
        let command = u16::from_le_bytes(command) | COMMAND_MEMORY | COMMAND_MASTER;
        rustix::io::pwrite(self.device(), &command.to_le_bytes(), at)
            .and_then(short)
            .map_err(|errno| self.failed("pwrite of the configuration space")(errno.into()))
    }

    /// Maps a BAR, for access to the device's registers.
    ///
    /// # Errors
    /// The call that failed; `EINVAL` for a BAR that does not exist or cannot be mapped.
    pub fn registers(&self, bar: u8) -> Result<Registers, SystemError> {
        let region = self.region(bar.into())?;
        if bar > 5 || region.size == 0 || region.flags & sys::REGION_MMAP == 0 {
            return Err(self.failed("mmap of a BAR")(Errno::INVAL));
        }
        let map = Map::shared(self.device(), region.offset, region.size, true);
        let map = map.map_err(self.failed("mmap of a BAR"))?;
        Ok(Registers {
            map,
            size: region.size,
            name: format!("{} BAR {bar}", self.address()),
        })
    }

    pub(crate) fn failed(&self, call: &'static str) -> impl Fn(Errno) -> SystemError {
        let address = self.address();
        move |errno| SystemError::new(call, address.to_string(), errno)
    }
}

fn open(path: &Path, remedy: &str) -> Result<OwnedFd, Unavailable> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| Unavailable {
        what: WHAT,
        cause: SystemError::new("open", PathBuf::from(path).display().to_string(), errno),
        remedy: remedy.into(),
    })
}

/// A mapped BAR. An access to an aligned value of 1, 2, 4 or 8 bytes is a single bus access.
///
/// After a reset or an unplug of the device, or after its memory decoding was disabled, an
/// access raises `SIGBUS`.
#[derive(Debug)]
pub struct Registers {
    map: Map,
    size: u64,
    name: String,
}

impl Registers {
    /// Reads a value at `offset`, in bytes.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`].
    pub fn read<T: Pod>(&self, offset: u64) -> Result<T, BufferError> {
        let mut value = T::zeroed();
        let offset = self.check(offset, size_of::<T>())?;
        self.map
            .copy_out(offset, bytemuck::bytes_of_mut(&mut value));
        Ok(value)
    }

    /// Writes a value at `offset`, in bytes.
    ///
    /// # Errors
    /// [`BufferError::OutOfRange`].
    pub fn write<T: Pod>(&mut self, offset: u64, value: T) -> Result<(), BufferError> {
        let offset = self.check(offset, size_of::<T>())?;
        self.map.copy_in(offset, bytemuck::bytes_of(&value));
        Ok(())
    }

    fn check(&self, offset: u64, length: usize) -> Result<usize, BufferError> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.size => Ok(offset as usize),
            _ => Err(BufferError::OutOfRange {
                object: self.name.clone(),
                offset,
                length: length as u64,
                size: self.size,
            }),
        }
    }
}
