//! The part of V4L2 that buffers need (include/uapi/linux/videodev2.h): single-planar capture.
//!
//! No crate fits: `v4l` supports neither `VIDIOC_EXPBUF` nor dma-buf memory, and `v4l2r` needs
//! libclang and the kernel headers of the build machine.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;

use crate::errno::Errno;

/// `V4L2_BUF_TYPE_VIDEO_CAPTURE`
const CAPTURE: u32 = 1;
/// `V4L2_CAP_VIDEO_CAPTURE`
pub(crate) const CAP_VIDEO_CAPTURE: u32 = 0x1;
/// `V4L2_CAP_STREAMING`
pub(crate) const CAP_STREAMING: u32 = 0x0400_0000;
/// `V4L2_CAP_DEVICE_CAPS`
pub(crate) const CAP_DEVICE_CAPS: u32 = 0x8000_0000;
/// `V4L2_BUF_CAP_SUPPORTS_DMABUF`
pub(crate) const BUF_CAP_DMABUF: u32 = 1 << 2;
/// `V4L2_BUF_FLAG_ERROR`
pub(crate) const BUF_ERROR: u32 = 0x40;

/// The kind of memory of a queue's buffers (`enum v4l2_memory`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Memory {
    /// The driver's memory, `V4L2_MEMORY_MMAP`.
    Own = 1,
    /// A dma-buf, `V4L2_MEMORY_DMABUF`.
    DmaBuf = 4,
}

/// `struct v4l2_capability`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Capability {
    pub(crate) driver: [u8; 16],
    pub(crate) card: [u8; 32],
    pub(crate) bus_info: [u8; 32],
    version: u32,
    pub(crate) capabilities: u32,
    pub(crate) device_caps: u32,
    reserved: [u32; 3],
}

/// `struct v4l2_pix_format`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct PixFormat {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) pixelformat: u32,
    field: u32,
    pub(crate) bytesperline: u32,
    pub(crate) sizeimage: u32,
    colorspace: u32,
    private: u32,
    flags: u32,
    ycbcr_enc: u32,
    quantization: u32,
    xfer_func: u32,
}

/// `struct v4l2_format`. The union contains pointers for other types, hence its alignment.
#[repr(C)]
pub struct Format {
    kind: u32,
    union: FormatUnion,
}

#[repr(C, align(8))]
struct FormatUnion {
    pix: PixFormat,
    rest: [u8; 200 - size_of::<PixFormat>()],
}

/// `struct v4l2_requestbuffers`
#[repr(C)]
#[derive(Debug, Default)]
pub struct RequestBuffers {
    pub(crate) count: u32,
    kind: u32,
    memory: u32,
    pub(crate) capabilities: u32,
    flags: u8,
    reserved: [u8; 3],
}

/// `struct v4l2_buffer`, with the `m.fd` of its union.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Buffer {
    pub(crate) index: u32,
    kind: u32,
    pub(crate) bytesused: u32,
    pub(crate) flags: u32,
    field: u32,
    timestamp: libc::timeval,
    timecode: [u32; 4],
    pub(crate) sequence: u32,
    memory: u32,
    fd: i32,
    /// Padding: the union has the width of a pointer.
    pad: u32,
    pub(crate) length: u32,
    reserved2: u32,
    request_fd: u32,
}

/// `struct v4l2_exportbuffer`
#[repr(C)]
#[derive(Default)]
pub struct ExportBuffer {
    kind: u32,
    index: u32,
    plane: u32,
    flags: u32,
    fd: i32,
    reserved: [u32; 11],
}

/// `struct v4l2_control`
#[repr(C)]
pub struct Control {
    id: u32,
    value: i32,
}

// The ioctl numbers contain these sizes, for 64-bit machines.
const _: () = {
    assert!(size_of::<Capability>() == 104);
    assert!(size_of::<PixFormat>() == 48);
    assert!(size_of::<Format>() == 208);
    assert!(size_of::<RequestBuffers>() == 20);
    assert!(size_of::<Buffer>() == 88);
    assert!(size_of::<ExportBuffer>() == 64);
};

mod raw {
    nix::ioctl_read!(querycap, b'V', 0, super::Capability);
    nix::ioctl_readwrite!(g_fmt, b'V', 4, super::Format);
    nix::ioctl_readwrite!(s_fmt, b'V', 5, super::Format);
    nix::ioctl_readwrite!(reqbufs, b'V', 8, super::RequestBuffers);
    nix::ioctl_readwrite!(qbuf, b'V', 15, super::Buffer);
    nix::ioctl_readwrite!(expbuf, b'V', 16, super::ExportBuffer);
    nix::ioctl_readwrite!(dqbuf, b'V', 17, super::Buffer);
    nix::ioctl_write_ptr!(streamon, b'V', 18, std::ffi::c_int);
    nix::ioctl_write_ptr!(streamoff, b'V', 19, std::ffi::c_int);
    nix::ioctl_readwrite!(s_ctrl, b'V', 28, super::Control);
}

fn buffer(index: u32, memory: Memory) -> Buffer {
    Buffer {
        index,
        kind: CAPTURE,
        bytesused: 0,
        flags: 0,
        field: 0,
        timestamp: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        timecode: [0; 4],
        sequence: 0,
        memory: memory as u32,
        fd: -1,
        pad: 0,
        length: 0,
        reserved2: 0,
        request_fd: 0,
    }
}

/// `VIDIOC_QUERYCAP`
pub(crate) fn capability(device: BorrowedFd<'_>) -> Result<Capability, Errno> {
    let mut argument = Capability::default();
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::querycap(device.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument)
}

fn format_argument(pix: PixFormat) -> Format {
    Format {
        kind: CAPTURE,
        union: FormatUnion {
            pix,
            rest: [0; 200 - size_of::<PixFormat>()],
        },
    }
}

/// `VIDIOC_G_FMT`
pub(crate) fn format(device: BorrowedFd<'_>) -> Result<PixFormat, Errno> {
    let mut argument = format_argument(PixFormat::default());
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::g_fmt(device.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.union.pix)
}

/// `VIDIOC_S_FMT`. Returns the format that the driver chose.
pub(crate) fn set_format(
    device: BorrowedFd<'_>,
    width: u32,
    height: u32,
    pixelformat: u32,
) -> Result<PixFormat, Errno> {
    let mut argument = format_argument(PixFormat {
        width,
        height,
        pixelformat,
        ..PixFormat::default()
    });
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::s_fmt(device.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument.union.pix)
}

/// `VIDIOC_REQBUFS`. Returns the number and the capabilities of the new buffers. A count of 0
/// frees the existing ones.
pub(crate) fn request_buffers(
    device: BorrowedFd<'_>,
    count: u32,
    memory: Memory,
) -> Result<RequestBuffers, Errno> {
    let mut argument = RequestBuffers {
        count,
        kind: CAPTURE,
        memory: memory as u32,
        ..RequestBuffers::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::reqbufs(device.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument)
}

/// `VIDIOC_QBUF` for the driver's own buffer, or with a dma-buf as the buffer's memory.
pub(crate) fn queue(
    device: BorrowedFd<'_>,
    index: u32,
    dmabuf: Option<(BorrowedFd<'_>, u32)>,
) -> Result<(), Errno> {
    let mut argument = match dmabuf {
        None => buffer(index, Memory::Own),
        Some((fd, length)) => Buffer {
            fd: fd.as_raw_fd(),
            length,
            ..buffer(index, Memory::DmaBuf)
        },
    };
    // SAFETY: the argument is the struct that the ioctl takes; single-planar, so that it
    // contains no pointer to planes. The kernel takes its own reference to the dma-buf.
    unsafe { raw::qbuf(device.as_raw_fd(), &mut argument) }
        .map(drop)
        .map_err(super::ioctl_errno)
}

/// `VIDIOC_DQBUF`. `EAGAIN` if no buffer is done and the descriptor is non-blocking.
pub(crate) fn dequeue(device: BorrowedFd<'_>, memory: Memory) -> Result<Buffer, Errno> {
    let mut argument = buffer(0, memory);
    // SAFETY: the argument is the struct that the ioctl takes; single-planar, so that it
    // contains no pointer to planes.
    unsafe { raw::dqbuf(device.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    Ok(argument)
}

/// `VIDIOC_EXPBUF`
pub(crate) fn export(
    device: BorrowedFd<'_>,
    index: u32,
    open_flags: u32,
) -> Result<OwnedFd, Errno> {
    let mut argument = ExportBuffer {
        kind: CAPTURE,
        index,
        flags: open_flags,
        ..ExportBuffer::default()
    };
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::expbuf(device.as_raw_fd(), &mut argument) }.map_err(super::ioctl_errno)?;
    // SAFETY: on success the ioctl has opened this descriptor for the caller, who owns it
    // alone.
    Ok(unsafe { OwnedFd::from_raw_fd(argument.fd) })
}

/// `VIDIOC_STREAMON` and `VIDIOC_STREAMOFF`
pub(crate) fn stream(device: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    let kind = CAPTURE as c_int;
    let fd = device.as_raw_fd();
    // SAFETY: the argument is the number that the ioctls read.
    let result = unsafe {
        if on {
            raw::streamon(fd, &kind)
        } else {
            raw::streamoff(fd, &kind)
        }
    };
    result.map(drop).map_err(super::ioctl_errno)
}

/// `VIDIOC_S_CTRL`
pub(crate) fn set_control(device: BorrowedFd<'_>, id: u32, value: i32) -> Result<(), Errno> {
    let mut argument = Control { id, value };
    // SAFETY: the argument is the struct that the ioctl takes.
    unsafe { raw::s_ctrl(device.as_raw_fd(), &mut argument) }
        .map(drop)
        .map_err(super::ioctl_errno)
}
