//! VFIO's container, group and device (include/uapi/linux/vfio.h).

use std::ffi::{CStr, c_int, c_ulong};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::errno::Errno;
use crate::sys::memory::Window;

/// `VFIO_API_VERSION`
pub(crate) const API_VERSION: c_int = 0;
/// `VFIO_TYPE1v2_IOMMU`
pub(crate) const TYPE1_V2: c_ulong = 3;
/// `VFIO_GROUP_FLAGS_VIABLE`
pub(crate) const GROUP_VIABLE: u32 = 1 << 0;
/// `VFIO_REGION_INFO_FLAG_MMAP`
pub(crate) const REGION_MMAP: u32 = 1 << 2;

const MAP_READ: u32 = 1 << 0;
const MAP_WRITE: u32 = 1 << 1;
const FEATURE_GET: u32 = 1 << 16;
const FEATURE_DMA_BUF: u32 = 11;

/// `struct vfio_group_status`
#[repr(C)]
#[derive(Default)]
pub struct GroupStatus {
    argsz: u32,
    pub(crate) flags: u32,
}

/// `struct vfio_region_info`, without capabilities.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub struct RegionInfo {
    argsz: u32,
    pub(crate) flags: u32,
    index: u32,
    cap_offset: u32,
    pub(crate) size: u64,
    /// The region's offset in the device's descriptor.
    pub(crate) offset: u64,
}

/// `struct vfio_iommu_type1_dma_map`
#[repr(C)]
pub struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dma_unmap`
#[repr(C)]
pub struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// `struct vfio_device_feature`, with a `struct vfio_device_feature_dma_buf` of one range.
#[repr(C)]
pub struct FeatureDmaBuf {
    argsz: u32,
    flags: u32,
    region_index: u32,
    open_flags: u32,
    dma_buf_flags: u32,
    nr_ranges: u32,
    offset: u64,
    length: u64,
}

/// `_IO(';', 100 + n)`: VFIO's ioctl numbers contain no sizes.
macro_rules! number {
    ($n:expr) => {
        nix::request_code_none!(b';', 100 + $n)
    };
}

mod raw {
    nix::ioctl_none_bad!(get_api_version, number!(0));
    nix::ioctl_write_int_bad!(check_extension, number!(1));
    nix::ioctl_write_int_bad!(set_iommu, number!(2));
    nix::ioctl_readwrite_bad!(group_get_status, number!(3), super::GroupStatus);
    nix::ioctl_write_ptr_bad!(group_set_container, number!(4), std::ffi::c_int);
    nix::ioctl_write_ptr_bad!(group_get_device_fd, number!(6), std::ffi::c_char);
    nix::ioctl_readwrite_bad!(device_get_region_info, number!(8), super::RegionInfo);
    nix::ioctl_write_ptr_bad!(iommu_map_dma, number!(13), super::DmaMap);
    nix::ioctl_readwrite_bad!(iommu_unmap_dma, number!(14), super::DmaUnmap);
    nix::ioctl_write_ptr_bad!(device_feature, number!(17), super::FeatureDmaBuf);
}

/// `VFIO_GET_API_VERSION`
pub(crate) fn api_version(container: BorrowedFd<'_>) -> Result<c_int, Errno> {
    // SAFETY: the ioctl takes no argument.
    unsafe { raw::get_api_version(container.as_raw_fd()) }.map_err(super::ioctl_errno)
}

/// `VFIO_CHECK_EXTENSION`
pub(crate) fn has_extension(container: BorrowedFd<'_>, extension: c_ulong) -> Result<bool, Errno> {
    // SAFETY: the ioctl's argument is a number.
    unsafe { raw::check_extension(container.as_raw_fd(), extension as c_int) }
        .map(|answer| answer > 0)
        .map_err(super::ioctl_errno)
}

/// `VFIO_SET_IOMMU`
pub(crate) fn set_iommu(container: BorrowedFd<'_>, kind: c_ulong) -> Result<(), Errno> {
    // SAFETY: the ioctl's argument is a number.
    unsafe { raw::set_iommu(container.as_raw_fd(), kind as c_int) }
        .map(drop)
        .map_err(super::ioctl_errno)
}

/// `VFIO_GROUP_GET_STATUS`. Returns the flags.
pub(crate) fn group_flags(group: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut status = GroupStatus {
        argsz: size_of::<GroupStatus>() as u32,
        flags: 0,
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::group_get_status(group.as_raw_fd(), &mut status) }.map_err(super::ioctl_errno)?;
    Ok(status.flags)
}

/// `VFIO_GROUP_SET_CONTAINER`
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: the ioctl reads one descriptor's number.
    unsafe { raw::group_set_container(group.as_raw_fd(), &container.as_raw_fd()) }
        .map(drop)
        .map_err(super::ioctl_errno)
}

/// `VFIO_GROUP_GET_DEVICE_FD`. The name is the device's PCI address.
pub(crate) fn device_fd(group: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel reads up to the NUL, and the text lives through the call.
    let fd = unsafe { raw::group_get_device_fd(group.as_raw_fd(), name.as_ptr()) }
        .map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl returns a descriptor that it has opened for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_DEVICE_GET_REGION_INFO`. Regions 0 to 5 of a PCI device are its BARs, region 7 is its
/// configuration space.
pub(crate) fn region_info(device: BorrowedFd<'_>, index: u32) -> Result<RegionInfo, Errno> {
    let mut info = RegionInfo {
        argsz: size_of::<RegionInfo>() as u32,
        index,
        ..RegionInfo::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::device_get_region_info(device.as_raw_fd(), &mut info) }
        .map_err(super::ioctl_errno)?;
    Ok(info)
}

/// `VFIO_DEVICE_FEATURE_DMA_BUF`: exports part of a BAR as a dma-buf.
pub(crate) fn export_dma_buf(
    device: BorrowedFd<'_>,
    bar: u32,
    offset: u64,
    length: u64,
    open_flags: u32,
) -> Result<OwnedFd, Errno> {
    let argument = FeatureDmaBuf {
        argsz: size_of::<FeatureDmaBuf>() as u32,
        flags: FEATURE_GET | FEATURE_DMA_BUF,
        region_index: bar,
        open_flags,
        dma_buf_flags: 0,
        nr_ranges: 1,
        offset,
        length,
    };
    // SAFETY: the argument is the struct that the feature takes, with its size in it.
    let fd = unsafe { raw::device_feature(device.as_raw_fd(), &argument) }
        .map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl returns a descriptor that it has opened for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `VFIO_IOMMU_MAP_DMA`: maps the window for the container's devices at `iova`.
///
/// The kernel pins the pages, so the window's mapping may be removed before the device's
/// mapping.
pub(crate) fn map_dma(
    container: BorrowedFd<'_>,
    window: Window<'_>,
    iova: u64,
) -> Result<(), Errno> {
    let argument = DmaMap {
        argsz: size_of::<DmaMap>() as u32,
        flags: if window.is_writable() {
            MAP_READ | MAP_WRITE
        } else {
            MAP_READ
        },
        vaddr: window.address() as u64,
        iova,
        size: window.length() as u64,
    };
    // SAFETY: the window's bytes are mapped, are writable if the flags say so, and no reference
    // to them exists (invariant); they are shared memory that others change anyway.
    unsafe { raw::iommu_map_dma(container.as_raw_fd(), &argument) }
        .map(drop)
        .map_err(super::ioctl_errno)
}

/// `VFIO_IOMMU_UNMAP_DMA`. Returns the number of bytes that were mapped there.
pub(crate) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, size: u64) -> Result<u64, Errno> {
    let mut argument = DmaUnmap {
        argsz: size_of::<DmaUnmap>() as u32,
        flags: 0,
        iova,
        size,
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::iommu_unmap_dma(container.as_raw_fd(), &mut argument) }
        .map_err(super::ioctl_errno)?;
    Ok(argument.size)
}
