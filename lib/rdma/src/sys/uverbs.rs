//! Registers dma-bufs by the kernel's own method (include/uapi/rdma/rdma_user_ioctl_cmds.h and
//! ib_user_ioctl_cmds.h), for cards whose driver in libibverbs lacks it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use peerbuf::Errno;

/// The arguments of a dma-buf registration.
pub(crate) struct DmaBufRequest<'d> {
    pub(crate) dmabuf: BorrowedFd<'d>,
    /// Offset in the dma-buf, in bytes.
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// The address of the first byte in requests that use the region's keys. Its offset in a page equals that
    /// of `offset`.
    pub(crate) iova: u64,
    /// `IBV_ACCESS_*`
    pub(crate) access: u32,
}

/// A region's local and remote key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Keys {
    pub(crate) local: u32,
    pub(crate) remote: u32,
}

/// `UVERBS_OBJECT_MR`
const OBJECT_MR: u16 = 7;
/// `UVERBS_METHOD_MR_DESTROY`
const METHOD_MR_DESTROY: u16 = 1;
/// `UVERBS_METHOD_REG_DMABUF_MR`
const METHOD_REG_DMABUF_MR: u16 = 4;
/// `UVERBS_ATTR_F_MANDATORY`
const MANDATORY: u16 = 1;

/// An object type that no kernel has. The kernel answers `EINVAL` if the request names the wrong driver, and
/// `EPROTONOSUPPORT` otherwise.
const OBJECT_NONE: u16 = 0xfff;
/// `enum rdma_driver_id` has about twenty; numbers are never reused.
const DRIVER_IDS: std::ops::Range<u32> = 0..64;

/// `struct ib_uverbs_attr`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Attribute {
    attr_id: u16,
    len: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}

impl Attribute {
    /// The handle of an object, or the place for a new object's handle.
    fn handle(attr_id: u16, handle: u32) -> Attribute {
        let data = handle.into();
        Attribute {
            attr_id,
            flags: MANDATORY,
            data,
            ..Attribute::default()
        }
    }

    /// A value of up to eight bytes, stored in the attribute itself.
    fn value(attr_id: u16, bytes: u16, data: u64) -> Attribute {
        Attribute {
            len: bytes,
            ..Attribute {
                data,
                ..Attribute::handle(attr_id, 0)
            }
        }
    }
}

/// `struct ib_uverbs_ioctl_hdr`, with as many attributes as the longest request needs.
#[repr(C)]
pub struct Request {
    length: u16,
    object_id: u16,
    method_id: u16,
    num_attrs: u16,
    reserved1: u64,
    driver_id: u32,
    reserved2: u32,
    attrs: [Attribute; 9],
}

/// `sizeof(struct ib_uverbs_ioctl_hdr)` without attributes, which is part of the ioctl number.
const HEADER: usize = 24;

mod raw {
    nix::ioctl_readwrite_bad!(
        verbs,
        nix::request_code_readwrite!(0x1b, 1, super::HEADER),
        super::Request
    );
}

/// # Safety Each pointer in an attribute refers to memory of the stated length that is valid during the call.
/// as long as they say.
unsafe fn call(
    fd: BorrowedFd<'_>,
    driver_id: u32,
    (object_id, method_id): (u16, u16),
    attributes: &[Attribute],
) -> Result<[Attribute; 9], Errno> {
    let mut attrs = [Attribute::default(); 9];
    attrs[..attributes.len()].copy_from_slice(attributes);
    let mut request = Request {
        length: (HEADER + size_of_val(attributes)) as u16,
        object_id,
        method_id,
        num_attrs: attributes.len() as u16,
        reserved1: 0,
        driver_id,
        reserved2: 0,
        attrs,
    };
    // SAFETY: the argument is the ioctl's struct, with its length and its number of attributes; their
    // pointers are valid, by the caller's promise.
    unsafe { raw::verbs(fd.as_raw_fd(), &mut request) }.map_err(super::ioctl_errno)?;
    Ok(request.attrs)
}

/// The kernel's driver ID for the device of this descriptor.
///
/// Each request contains the number. libibverbs does not expose it, and the kernel refuses a wrong one before
/// it checks anything else. So this function asks the kernel with a request that has no effect.
pub(crate) fn driver_id(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut last = Errno::INVAL;
    for id in DRIVER_IDS {
        // SAFETY: the request has no attributes.
        match unsafe { call(fd, id, (OBJECT_NONE, 0), &[]) } {
            Err(Errno::INVAL) => {}
            Err(Errno::PROTONOSUPPORT) => return Ok(id),
            Err(other) => last = other,
            Ok(_) => return Err(Errno::INVAL),
        }
    }
    Err(last)
}

/// `UVERBS_METHOD_REG_DMABUF_MR`: returns the region's handle and keys.
///
/// Errors: `EPROTONOSUPPORT` if the driver does not accept dma-bufs; other errors of uverbs, the driver or
/// the exporter.
/// exporter answered.
pub(crate) fn register_dmabuf(
    fd: BorrowedFd<'_>,
    driver_id: u32,
    pd: u32,
    request: &DmaBufRequest<'_>,
) -> Result<(u32, Keys), Errno> {
    let (mut local, mut remote) = (0u32, 0u32);
    let dmabuf = request.dmabuf.as_fd().as_raw_fd() as u32;
    let attributes = [
        Attribute::handle(0, 0),
        Attribute::handle(1, pd),
        Attribute::value(2, 8, request.offset),
        Attribute::value(3, 8, request.length),
        Attribute::value(4, 8, request.iova),
        Attribute::value(5, 4, dmabuf.into()),
        Attribute::value(6, 4, request.access.into()),
        Attribute::value(7, 4, (&raw mut local).expose_provenance() as u64),
        Attribute::value(8, 4, (&raw mut remote).expose_provenance() as u64),
    ];
    // SAFETY: the last two attributes point to four bytes each.
    let attributes = unsafe {
        call(
            fd,
            driver_id,
            (OBJECT_MR, METHOD_REG_DMABUF_MR),
            &attributes,
        )
    }?;
    // The kernel wrote both through their addresses.
    // SAFETY: both are initialised local variables.
    let (local, remote) = unsafe {
        (
            (&raw const local).read_volatile(),
            (&raw const remote).read_volatile(),
        )
    };
    Ok((attributes[0].data as u32, Keys { local, remote }))
}

/// `UVERBS_METHOD_MR_DESTROY`
pub(crate) fn deregister(fd: BorrowedFd<'_>, driver_id: u32, handle: u32) -> Result<(), Errno> {
    let attributes = [Attribute::handle(0, handle)];
    // SAFETY: no attribute is a pointer.
    unsafe { call(fd, driver_id, (OBJECT_MR, METHOD_MR_DESTROY), &attributes) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(size_of::<Attribute>(), 16);
        assert_eq!(std::mem::offset_of!(Request, attrs), HEADER);
        assert_eq!(std::mem::offset_of!(Request, driver_id), 16);
        // RDMA_VERBS_IOCTL
        assert_eq!(nix::request_code_readwrite!(0x1b, 1, HEADER), 0xc018_1b01);
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel")]
    fn what_is_no_uverbs_node_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(driver_id(null.as_fd()), Err(Errno::NOTTY));
    }
}
