//! `/dev/iommu` (include/uapi/linux/iommufd.h).

use std::os::fd::{AsRawFd, BorrowedFd};

use crate::errno::Errno;

const MAP_FIXED_IOVA: u32 = 1 << 0;
const MAP_WRITEABLE: u32 = 1 << 1;
const MAP_READABLE: u32 = 1 << 2;

/// `struct iommu_destroy`
#[repr(C)]
pub struct Destroy {
    size: u32,
    id: u32,
}

/// `struct iommu_ioas_alloc`
#[repr(C)]
pub struct IoasAlloc {
    size: u32,
    flags: u32,
    out_ioas_id: u32,
}

/// `struct iommu_ioas_map_file`
#[repr(C)]
pub struct IoasMapFile {
    size: u32,
    flags: u32,
    ioas_id: u32,
    fd: i32,
    start: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_ioas_unmap`
#[repr(C)]
pub struct IoasUnmap {
    size: u32,
    ioas_id: u32,
    iova: u64,
    length: u64,
}

mod raw {
    nix::ioctl_write_ptr_bad!(destroy, nix::request_code_none!(b';', 0x80), super::Destroy);
    nix::ioctl_readwrite_bad!(
        ioas_alloc,
        nix::request_code_none!(b';', 0x81),
        super::IoasAlloc
    );
    nix::ioctl_readwrite_bad!(
        ioas_unmap,
        nix::request_code_none!(b';', 0x86),
        super::IoasUnmap
    );
    nix::ioctl_readwrite_bad!(
        ioas_map_file,
        nix::request_code_none!(b';', 0x8f),
        super::IoasMapFile
    );
}

/// `IOMMU_IOAS_ALLOC`. Returns the address space's id.
pub(crate) fn allocate(iommu: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut argument = IoasAlloc {
        size: size_of::<IoasAlloc>() as u32,
        flags: 0,
        out_ioas_id: 0,
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::ioas_alloc(iommu.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.out_ioas_id)
}

/// `IOMMU_DESTROY`
pub(crate) fn destroy(iommu: BorrowedFd<'_>, id: u32) -> Result<(), Errno> {
    let argument = Destroy {
        size: size_of::<Destroy>() as u32,
        id,
    };
    // SAFETY: the argument is what the ioctl reads, with its size in it.
    unsafe { raw::destroy(iommu.as_raw_fd(), &argument) }
        .map(drop)
        .map_err(super::ioctl_errno)
}

/// `IOMMU_IOAS_MAP_FILE`, for part of a memfd or of a dma-buf that the kernel accepts here.
pub(crate) fn map_file(
    iommu: BorrowedFd<'_>,
    ioas: u32,
    file: BorrowedFd<'_>,
    start: u64,
    length: u64,
    iova: u64,
    writable: bool,
) -> Result<(), Errno> {
    let writeable = if writable { MAP_WRITEABLE } else { 0 };
    let mut argument = IoasMapFile {
        size: size_of::<IoasMapFile>() as u32,
        flags: MAP_FIXED_IOVA | MAP_READABLE | writeable,
        ioas_id: ioas,
        fd: file.as_raw_fd(),
        start,
        length,
        iova,
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::ioas_map_file(iommu.as_raw_fd(), &mut argument) }
        .map(drop)
        .map_err(super::ioctl_errno)
}

/// `IOMMU_IOAS_UNMAP`. Returns the number of bytes that were mapped there.
pub(crate) fn unmap(
    iommu: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    length: u64,
) -> Result<u64, Errno> {
    let mut argument = IoasUnmap {
        size: size_of::<IoasUnmap>() as u32,
        ioas_id: ioas,
        iova,
        length,
    };
    // SAFETY: the argument is the struct that the ioctl takes, with its size in it.
    unsafe { raw::ioas_unmap(iommu.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.length)
}
