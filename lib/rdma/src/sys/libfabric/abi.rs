//! The structures and constants of `rdma/fabric.h` and `rdma/fi_domain.h` for regions, with C layout, and the
//! offsets of their fields. They have not changed since version 1.20, except for new fields at the end of
//! `fi_mr_attr`, which older libraries ignore.

use std::ffi::{c_int, c_uint, c_void};

/// `FI_READ`
pub(crate) const READ: u64 = 1 << 8;
/// `FI_WRITE`
pub(crate) const WRITE: u64 = 1 << 9;
/// `FI_RECV`
pub(crate) const RECV: u64 = 1 << 10;
/// `FI_SEND`
pub(crate) const SEND: u64 = 1 << 11;
/// `FI_REMOTE_READ`
pub(crate) const REMOTE_READ: u64 = 1 << 12;
/// `FI_REMOTE_WRITE`
pub(crate) const REMOTE_WRITE: u64 = 1 << 13;

/// `FI_MR_BASIC`, from before version 1.5: implies [`MR_VIRT_ADDR`] and two flags that do not matter here.
pub(crate) const MR_BASIC: u64 = 1 << 0;
/// `FI_MR_RAW`
pub(crate) const MR_RAW: u64 = 1 << 3;
/// `FI_MR_VIRT_ADDR`
pub(crate) const MR_VIRT_ADDR: u64 = 1 << 4;
/// `FI_MR_ENDPOINT`
pub(crate) const MR_ENDPOINT: u64 = 1 << 9;

/// `FI_MR_DMABUF`
pub(super) const MR_DMABUF: u64 = 1 << 40;
/// `FI_CLASS_DOMAIN`
pub(super) const CLASS_DOMAIN: usize = 2;
/// `FI_ENABLE`
pub(super) const ENABLE: c_int = 6;
/// `FI_HMEM_SYSTEM`
pub(super) const HMEM_SYSTEM: c_uint = 0;

/// `struct fid`, the start of every object.
#[repr(C)]
pub(super) struct Fid {
    pub(super) fclass: usize,
    pub(super) context: *mut c_void,
    pub(super) ops: *const Ops,
}

/// The first fields of `struct fi_ops`.
#[repr(C)]
pub(super) struct Ops {
    pub(super) size: usize,
    pub(super) close: unsafe extern "C" fn(*mut Fid) -> c_int,
    pub(super) bind: unsafe extern "C" fn(*mut Fid, *mut Fid, u64) -> c_int,
    pub(super) control: unsafe extern "C" fn(*mut Fid, c_int, *mut c_void) -> c_int,
}

/// `struct fid_domain`
#[repr(C)]
pub(super) struct Domain {
    pub(super) fid: Fid,
    pub(super) ops: *const c_void,
    pub(super) mr: *const MrOps,
}

/// `struct fi_ops_mr`
#[repr(C)]
pub(super) struct MrOps {
    pub(super) size: usize,
    pub(super) reg: *const c_void,
    pub(super) regv: *const c_void,
    pub(super) regattr: unsafe extern "C" fn(*mut Fid, *const MrAttr, u64, *mut *mut Mr) -> c_int,
}

/// `struct fid_mr`
#[repr(C)]
pub(super) struct Mr {
    pub(super) fid: Fid,
    pub(super) mem_desc: *mut c_void,
    pub(super) key: u64,
}

/// `struct iovec`
#[repr(C)]
pub(super) struct IoVec {
    pub(super) base: *mut c_void,
    pub(super) length: usize,
}

/// `struct fi_mr_dmabuf`
#[repr(C)]
pub(super) struct DmaBuf {
    pub(super) fd: c_int,
    pub(super) offset: u64,
    pub(super) len: usize,
    pub(super) base_addr: *mut c_void,
}

/// `struct fi_mr_attr`
#[repr(C)]
pub(super) struct MrAttr {
    /// Points to an [`IoVec`] or to a [`DmaBuf`].
    pub(super) what: *const c_void,
    pub(super) iov_count: usize,
    pub(super) access: u64,
    pub(super) offset: u64,
    pub(super) requested_key: u64,
    pub(super) context: *mut c_void,
    pub(super) auth_key_size: usize,
    pub(super) auth_key: *mut u8,
    pub(super) iface: c_uint,
    pub(super) device: u64,
    pub(super) hmem_data: *mut c_void,
    /// Since 1.22; the following fields since 2.0.
    pub(super) page_size: usize,
    pub(super) base_mr: *const Mr,
    pub(super) sub_mr_cnt: usize,
}

/// Each field's offset and each constant's value, with the name in C, for the test that compares them with
/// the header.
pub(crate) fn layout() -> Vec<(&'static str, u64)> {
    macro_rules! numbers {
        ($($rust:ident $c:literal { $($field:ident),* })* = $($name:literal $value:expr),*) => {
            vec![
                $($((
                    concat!($c, ".", stringify!($field)),
                    std::mem::offset_of!($rust, $field) as u64
                ),)*)*
                $((concat!("sizeof ", $c), size_of::<$rust>() as u64),)*
                $(($name, $value as u64),)*
            ]
        };
    }
    let mut all = numbers! {
        Fid "fid" { fclass, context, ops }
        Domain "fid_domain" { fid, ops, mr }
        MrOps "fi_ops_mr" { size, reg, regv, regattr }
        Mr "fid_mr" { fid, mem_desc, key }
        DmaBuf "fi_mr_dmabuf" { fd, offset, len, base_addr }
        MrAttr "fi_mr_attr" { iov_count, access, offset, requested_key, context, auth_key_size,
                              auth_key, iface, device, hmem_data, page_size, base_mr, sub_mr_cnt }
        =
        "FI_READ" READ, "FI_WRITE" WRITE, "FI_RECV" RECV, "FI_SEND" SEND,
        "FI_REMOTE_READ" REMOTE_READ, "FI_REMOTE_WRITE" REMOTE_WRITE,
        "FI_MR_RAW" MR_RAW, "FI_MR_VIRT_ADDR" MR_VIRT_ADDR, "FI_MR_ENDPOINT" MR_ENDPOINT,
        "FI_MR_DMABUF" MR_DMABUF, "FI_CLASS_DOMAIN" CLASS_DOMAIN, "FI_ENABLE" ENABLE,
        "FI_HMEM_SYSTEM" HMEM_SYSTEM
    };
    // Types that are declared only in part, and fields with another name.
    all.extend([
        ("fi_ops.size", std::mem::offset_of!(Ops, size) as u64),
        ("fi_ops.close", std::mem::offset_of!(Ops, close) as u64),
        ("fi_ops.bind", std::mem::offset_of!(Ops, bind) as u64),
        ("fi_ops.control", std::mem::offset_of!(Ops, control) as u64),
        (
            "fi_mr_attr.mr_iov",
            std::mem::offset_of!(MrAttr, what) as u64,
        ),
        (
            "fi_mr_attr.dmabuf",
            std::mem::offset_of!(MrAttr, what) as u64,
        ),
        ("iovec.iov_base", std::mem::offset_of!(IoVec, base) as u64),
        ("iovec.iov_len", std::mem::offset_of!(IoVec, length) as u64),
    ]);
    all
}
