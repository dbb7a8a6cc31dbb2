//! libibverbs, opened at run time (infiniband/verbs.h of rdma-core).
//!
//! Posting and polling are functions behind pointers in `struct ibv_context`, so the layouts of
//! the public structures are part of the library's binary interface, which has not changed since
//! its version 1.1; the lab compares them with the header.
//!
//! What keeps this sound: a card reads and writes memory of regions only, a region's pages are
//! pinned by the kernel until it is deregistered, and what is registered here is a window into a
//! [`Map`](super::memory::Map), of whose bytes there are no Rust references. So whatever is posted,
//! and whatever the other end does, no memory of Rust's changes.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::{Arc, OnceLock};

use crate::errno::Errno;
use crate::sys::memory::Window;

/// `IBV_ACCESS_LOCAL_WRITE`
pub(crate) const LOCAL_WRITE: u32 = 1;
/// `IBV_ACCESS_REMOTE_WRITE`
pub(crate) const REMOTE_WRITE: u32 = 1 << 1;
/// `IBV_ACCESS_REMOTE_READ`
pub(crate) const REMOTE_READ: u32 = 1 << 2;

/// `IBV_SEND_SIGNALED`
const SEND_SIGNALED: c_uint = 1 << 1;
/// `IBV_QPT_RC`
const QPT_RC: c_int = 2;
/// `IBV_GID_TYPE_ROCE_V2`
pub(crate) const GID_ROCE_V2: u32 = 2;
/// `IBV_WC_WITH_IMM`
const WC_WITH_IMM: c_uint = 1 << 1;
/// The port that is used: cards with more than one show each as a device of its own these days.
const PORT: u8 = 1;

/// `struct ibv_context_ops`: pointers to functions, most of them of no use any more.
#[repr(C)]
pub struct ContextOps {
    unused_0: [*const c_void; 11],
    poll_cq: unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int,
    req_notify_cq: unsafe extern "C" fn(*mut Cq, c_int) -> c_int,
    unused_1: [*const c_void; 12],
    post_send: unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int,
    post_recv: unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int,
    unused_2: [*const c_void; 5],
}

/// The beginning of `struct ibv_context`, which only the library makes.
#[repr(C)]
pub struct Context {
    device: *mut c_void,
    ops: ContextOps,
    cmd_fd: c_int,
    async_fd: c_int,
}

/// `struct ibv_pd`
#[repr(C)]
pub struct Pd {
    context: *mut Context,
    handle: u32,
}

/// `struct ibv_mr`
#[repr(C)]
pub struct Mr {
    context: *mut Context,
    pd: *mut Pd,
    addr: *mut c_void,
    length: usize,
    handle: u32,
    lkey: u32,
    rkey: u32,
}

/// The beginning of `struct ibv_comp_channel`.
#[repr(C)]
pub struct CompChannel {
    context: *mut Context,
    fd: c_int,
}

/// The beginning of `struct ibv_cq`.
#[repr(C)]
pub struct Cq {
    context: *mut Context,
}

/// The beginning of `struct ibv_qp`.
#[repr(C)]
pub struct Qp {
    context: *mut Context,
    qp_context: *mut c_void,
    pd: *mut Pd,
    send_cq: *mut Cq,
    recv_cq: *mut Cq,
    srq: *mut c_void,
    handle: u32,
    qp_num: u32,
}

/// `struct ibv_sge`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Sge {
    addr: u64,
    length: u32,
    lkey: u32,
}

/// `struct ibv_send_wr`, with that of its unions that a reliable connection uses.
#[repr(C)]
pub struct SendWr {
    wr_id: u64,
    next: *mut SendWr,
    sg_list: *mut Sge,
    num_sge: c_int,
    opcode: c_int,
    send_flags: c_uint,
    imm_data: u32,
    remote_addr: u64,
    rkey: u32,
    unused: [u64; 9],
}

/// `struct ibv_recv_wr`
#[repr(C)]
pub struct RecvWr {
    wr_id: u64,
    next: *mut RecvWr,
    sg_list: *mut Sge,
    num_sge: c_int,
}

/// `struct ibv_wc`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Wc {
    wr_id: u64,
    status: c_int,
    opcode: c_int,
    vendor_err: u32,
    byte_len: u32,
    imm_data: u32,
    qp_num: u32,
    src_qp: u32,
    wc_flags: c_uint,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

/// `struct ibv_qp_cap`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct QpCap {
    max_send_wr: u32,
    max_recv_wr: u32,
    max_send_sge: u32,
    max_recv_sge: u32,
    max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`
#[repr(C)]
pub struct QpInitAttr {
    qp_context: *mut c_void,
    send_cq: *mut Cq,
    recv_cq: *mut Cq,
    srq: *mut c_void,
    cap: QpCap,
    qp_type: c_int,
    sq_sig_all: c_int,
}

/// `struct ibv_ah_attr`, and `struct ibv_global_route` in front of it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct AhAttr {
    /// `union ibv_gid`, which is aligned as its numbers are.
    dgid: [u64; 2],
    flow_label: u32,
    sgid_index: u8,
    hop_limit: u8,
    traffic_class: u8,
    dlid: u16,
    sl: u8,
    src_path_bits: u8,
    static_rate: u8,
    is_global: u8,
    port_num: u8,
}

/// `struct ibv_qp_attr`
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct QpAttr {
    qp_state: c_int,
    cur_qp_state: c_int,
    path_mtu: c_int,
    path_mig_state: c_int,
    qkey: u32,
    rq_psn: u32,
    sq_psn: u32,
    dest_qp_num: u32,
    qp_access_flags: c_uint,
    cap: QpCap,
    ah_attr: AhAttr,
    alt_ah_attr: AhAttr,
    pkey_index: u16,
    alt_pkey_index: u16,
    en_sqd_async_notify: u8,
    sq_draining: u8,
    max_rd_atomic: u8,
    max_dest_rd_atomic: u8,
    min_rnr_timer: u8,
    port_num: u8,
    timeout: u8,
    retry_cnt: u8,
    rnr_retry: u8,
    alt_port_num: u8,
    alt_timeout: u8,
    rate_limit: u32,
}

/// `struct ibv_gid_entry`
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct GidEntry {
    gid: [u64; 2],
    index: u32,
    port: u32,
    kind: u32,
    interface: u32,
}

impl GidEntry {
    /// As it is on the wire.
    pub(crate) fn gid(&self) -> [u8; 16] {
        bytemuck::cast(self.gid)
    }

    /// Its place in the port's table.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// `enum ibv_gid_type`
    pub(crate) fn kind(&self) -> u32 {
        self.kind
    }

    pub(crate) fn is_of_our_port(&self) -> bool {
        self.port == u32::from(PORT)
    }
}

/// The beginning of `struct ibv_port_attr`; `ibv_query_port` fills in no more than this has room
/// for.
#[repr(C)]
#[derive(Default)]
struct PortAttr {
    state: c_int,
    max_mtu: c_int,
    active_mtu: c_int,
    rest: [u32; 13],
}

/// Where each public field is, for the test that compares them with the header: name and offset.
pub(crate) fn layout() -> Vec<(&'static str, usize)> {
    macro_rules! offsets {
        ($($rust:ident $c:literal { $($field:ident),* })*) => {
            vec![$(
                $((concat!($c, ".", stringify!($field)), std::mem::offset_of!($rust, $field)),)*
            )*]
        };
    }
    let mut all = offsets! {
        ContextOps "ibv_context_ops" { poll_cq, req_notify_cq, post_send, post_recv }
        Context "ibv_context" { ops, cmd_fd, async_fd }
        Pd "ibv_pd" { handle }
        Mr "ibv_mr" { addr, length, handle, lkey, rkey }
        CompChannel "ibv_comp_channel" { fd }
        Qp "ibv_qp" { handle, qp_num }
        Sge "ibv_sge" { addr, length, lkey }
        SendWr "ibv_send_wr" { wr_id, next, sg_list, num_sge, opcode, send_flags, imm_data }
        RecvWr "ibv_recv_wr" { wr_id, next, sg_list, num_sge }
        Wc "ibv_wc" { wr_id, status, opcode, vendor_err, byte_len, imm_data, qp_num, src_qp,
                      wc_flags, pkey_index, slid, sl, dlid_path_bits }
        QpCap "ibv_qp_cap" { max_send_wr, max_recv_wr, max_send_sge, max_recv_sge,
                             max_inline_data }
        QpInitAttr "ibv_qp_init_attr" { qp_context, send_cq, recv_cq, srq, cap, qp_type,
                                        sq_sig_all }
        AhAttr "ibv_ah_attr" { dlid, sl, src_path_bits, static_rate, is_global, port_num }
        QpAttr "ibv_qp_attr" { qp_state, cur_qp_state, path_mtu, path_mig_state, qkey, rq_psn,
                               sq_psn, dest_qp_num, qp_access_flags, cap, ah_attr, alt_ah_attr,
                               pkey_index, alt_pkey_index, en_sqd_async_notify, sq_draining,
                               max_rd_atomic, max_dest_rd_atomic, min_rnr_timer, port_num,
                               timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout,
                               rate_limit }
        GidEntry "ibv_gid_entry" { gid }
        PortAttr "ibv_port_attr" { state, max_mtu, active_mtu }
    };
    // Those whose field is called otherwise, or is in a structure of its own.
    all.extend([
        (
            "ibv_send_wr.wr.rdma.remote_addr",
            std::mem::offset_of!(SendWr, remote_addr),
        ),
        (
            "ibv_send_wr.wr.rdma.rkey",
            std::mem::offset_of!(SendWr, rkey),
        ),
        ("ibv_ah_attr.grh.dgid", std::mem::offset_of!(AhAttr, dgid)),
        (
            "ibv_ah_attr.grh.flow_label",
            std::mem::offset_of!(AhAttr, flow_label),
        ),
        (
            "ibv_ah_attr.grh.sgid_index",
            std::mem::offset_of!(AhAttr, sgid_index),
        ),
        (
            "ibv_ah_attr.grh.hop_limit",
            std::mem::offset_of!(AhAttr, hop_limit),
        ),
        (
            "ibv_ah_attr.grh.traffic_class",
            std::mem::offset_of!(AhAttr, traffic_class),
        ),
        (
            "ibv_gid_entry.gid_index",
            std::mem::offset_of!(GidEntry, index),
        ),
        (
            "ibv_gid_entry.port_num",
            std::mem::offset_of!(GidEntry, port),
        ),
        (
            "ibv_gid_entry.gid_type",
            std::mem::offset_of!(GidEntry, kind),
        ),
        (
            "ibv_gid_entry.ndev_ifindex",
            std::mem::offset_of!(GidEntry, interface),
        ),
        ("sizeof ibv_sge", size_of::<Sge>()),
        ("sizeof ibv_send_wr", size_of::<SendWr>()),
        ("sizeof ibv_recv_wr", size_of::<RecvWr>()),
        ("sizeof ibv_wc", size_of::<Wc>()),
        ("sizeof ibv_qp_init_attr", size_of::<QpInitAttr>()),
        ("sizeof ibv_ah_attr", size_of::<AhAttr>()),
        ("sizeof ibv_qp_attr", size_of::<QpAttr>()),
        ("sizeof ibv_gid_entry", size_of::<GidEntry>()),
    ]);
    all
}

/// Declares the functions that are taken from the library.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The library's functions. It stays loaded until the process ends.
        pub(crate) struct Library {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
            /// Since rdma-core 34.
            reg_dmabuf_mr: Option<RegDmabufMr>,
        }

        impl Library {
            fn load() -> Result<Library, String> {
                // SAFETY: initialising libibverbs reads its configuration and has no other effect
                // on this process.
                let library = unsafe { libloading::Library::new(NAME) }
                    .map_err(|error| error.to_string())?;
                // A provider may have threads, and pointers to the library's code.
                let library = Box::leak(Box::new(library));
                // SAFETY: the symbols are those of verbs.h, with their types there.
                unsafe {
                    Ok(Library {
                        $($name: *library.get($symbol).map_err(|error| error.to_string())?,)*
                        reg_dmabuf_mr: library.get(b"ibv_reg_dmabuf_mr\0").ok().map(|f| *f),
                    })
                }
            }
        }
    };
}

type RegDmabufMr = unsafe extern "C" fn(*mut Pd, u64, usize, u64, c_int, c_int) -> *mut Mr;

functions! {
    get_device_list = b"ibv_get_device_list\0" (*mut c_int) -> *mut *mut c_void;
    free_device_list = b"ibv_free_device_list\0" (*mut *mut c_void) -> ();
    get_device_name = b"ibv_get_device_name\0" (*mut c_void) -> *const c_char;
    open_device = b"ibv_open_device\0" (*mut c_void) -> *mut Context;
    close_device = b"ibv_close_device\0" (*mut Context) -> c_int;
    query_port = b"ibv_query_port\0" (*mut Context, u8, *mut PortAttr) -> c_int;
    query_gid_table = b"_ibv_query_gid_table\0" (*mut Context, *mut GidEntry, usize, u32, usize) -> isize;
    alloc_pd = b"ibv_alloc_pd\0" (*mut Context) -> *mut Pd;
    dealloc_pd = b"ibv_dealloc_pd\0" (*mut Pd) -> c_int;
    reg_mr_iova2 = b"ibv_reg_mr_iova2\0" (*mut Pd, *mut c_void, usize, u64, c_uint) -> *mut Mr;
    dereg_mr = b"ibv_dereg_mr\0" (*mut Mr) -> c_int;
    create_comp_channel = b"ibv_create_comp_channel\0" (*mut Context) -> *mut CompChannel;
    destroy_comp_channel = b"ibv_destroy_comp_channel\0" (*mut CompChannel) -> c_int;
    create_cq = b"ibv_create_cq\0" (*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    destroy_cq = b"ibv_destroy_cq\0" (*mut Cq) -> c_int;
    get_cq_event = b"ibv_get_cq_event\0" (*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    ack_cq_events = b"ibv_ack_cq_events\0" (*mut Cq, c_uint) -> ();
    create_qp = b"ibv_create_qp\0" (*mut Pd, *mut QpInitAttr) -> *mut Qp;
    modify_qp = b"ibv_modify_qp\0" (*mut Qp, *mut QpAttr, c_int) -> c_int;
    destroy_qp = b"ibv_destroy_qp\0" (*mut Qp) -> c_int;
}

/// The library's file.
pub(crate) const NAME: &str = "libibverbs.so.1";

/// The library, loaded the first time.
///
/// # Errors
/// What the loader says, for people.
pub(crate) fn library() -> Result<&'static Library, &'static str> {
    static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();
    match LIBRARY.get_or_init(Library::load) {
        Ok(library) => Ok(library),
        Err(why) => Err(why),
    }
}

/// What `errno` is after a call of the library's that returned a null pointer.
fn last() -> Errno {
    Errno::from(&std::io::Error::last_os_error())
}

/// The answer of a call that returns an error number.
fn check(status: c_int) -> Result<(), Errno> {
    match status {
        0 => Ok(()),
        // Some return it, some say -1 and set it.
        -1 => Err(last()),
        number => Err(Errno(number.abs())),
    }
}

impl Library {
    /// Calls `each` with each device there is until it returns something.
    fn devices<T>(
        &self,
        mut each: impl FnMut(&str, *mut c_void) -> Option<T>,
    ) -> Result<Option<T>, Errno> {
        let mut count = 0;
        // SAFETY: it fills the number in.
        let list = unsafe { (self.get_device_list)(&mut count) };
        if list.is_null() {
            return Err(last());
        }
        let mut found = None;
        for at in 0..usize::try_from(count).unwrap_or(0) {
            // SAFETY: the list has so many entries, valid until it is freed.
            let device = unsafe { *list.add(at) };
            // SAFETY: a device's name is a string that stays as long as it.
            let name = unsafe { CStr::from_ptr((self.get_device_name)(device)) };
            found = each(&name.to_string_lossy(), device);
            if found.is_some() {
                break;
            }
        }
        // SAFETY: it is ours, and a device that was opened is kept by its context.
        unsafe { (self.free_device_list)(list) };
        Ok(found)
    }

    /// The names of the devices.
    pub(crate) fn names(&self) -> Result<Vec<String>, Errno> {
        let mut names = Vec::new();
        self.devices(|name, _| -> Option<()> {
            names.push(name.to_owned());
            None
        })?;
        Ok(names)
    }
}

/// An open device and a protection domain on it.
///
/// # Invariants
/// Both are live. The functions of the library may be called on them from any thread
/// (ibv_open_device(3)): the library and its providers lock what needs it.
pub(crate) struct Domain {
    library: &'static Library,
    context: NonNull<Context>,
    pd: NonNull<Pd>,
}

// SAFETY: by the invariant.
unsafe impl Send for Domain {}
// SAFETY: by the invariant.
unsafe impl Sync for Domain {}

impl Domain {
    /// Opens the device of this name; `ENODEV` where there is none.
    pub(crate) fn open(library: &'static Library, wanted: &str) -> Result<Domain, Errno> {
        let opened = library.devices(|name, device| {
            (name == wanted).then(|| {
                // SAFETY: the device is on the list, which is not freed yet.
                let context = unsafe { (library.open_device)(device) };
                NonNull::new(context).ok_or_else(last)
            })
        })?;
        let context = opened.unwrap_or(Err(Errno::NODEV))?;
        // SAFETY: the context is live.
        let Some(pd) = NonNull::new(unsafe { (library.alloc_pd)(context.as_ptr()) }) else {
            let errno = last();
            // SAFETY: it is ours, and nothing was made of it.
            unsafe { (library.close_device)(context.as_ptr()) };
            return Err(errno);
        };
        // INVARIANT: both were just made.
        Ok(Domain {
            library,
            context,
            pd,
        })
    }

    /// The descriptor of the device's uverbs node.
    pub(crate) fn uverbs(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is live (invariant) and keeps its descriptor open.
        unsafe { BorrowedFd::borrow_raw((*self.context.as_ptr()).cmd_fd) }
    }

    /// The domain's number in the kernel.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: live by the invariant; the field does not change.
        unsafe { (*self.pd.as_ptr()).handle }
    }

    /// `enum ibv_mtu` of the port now; `ENETDOWN` while it is not active.
    pub(crate) fn active_mtu(&self) -> Result<i32, Errno> {
        let mut port = PortAttr::default();
        // SAFETY: the struct has room for what this function fills in.
        check(unsafe { (self.library.query_port)(self.context.as_ptr(), PORT, &mut port) })?;
        // IBV_PORT_ACTIVE
        if port.state == 4 {
            Ok(port.active_mtu)
        } else {
            Err(Errno(100))
        }
    }

    /// The addresses that the device has.
    pub(crate) fn gids(&self) -> Result<Vec<GidEntry>, Errno> {
        let mut entries = vec![GidEntry::default(); 256];
        // SAFETY: so many entries of this size are ours.
        let count = unsafe {
            (self.library.query_gid_table)(
                self.context.as_ptr(),
                entries.as_mut_ptr(),
                entries.len(),
                0,
                size_of::<GidEntry>(),
            )
        };
        match usize::try_from(count) {
            Ok(count) => {
                entries.truncate(count);
                Ok(entries)
            }
            Err(_) => Err(Errno(count.unsigned_abs() as i32)),
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: ours, and what was made of them holds the domain, so is gone.
        unsafe {
            (self.library.dealloc_pd)(self.pd.as_ptr());
            (self.library.close_device)(self.context.as_ptr());
        }
    }
}

/// What a dma-buf is to be registered as.
pub(crate) struct DmaBufRequest<'d> {
    pub(crate) dmabuf: BorrowedFd<'d>,
    /// Bytes from the dma-buf's beginning.
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// The address of the first byte for whoever names the region's keys. Its place in a page is
    /// that of `offset`.
    pub(crate) iova: u64,
    /// `IBV_ACCESS_*`
    pub(crate) access: u32,
}

/// A region's keys: for work of this end, and of the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Keys {
    pub(crate) local: u32,
    pub(crate) remote: u32,
}

/// How a region was made, and is to be ended.
enum Made {
    /// By the library.
    Library(NonNull<Mr>),
    /// By the kernel's method: driver and handle.
    Kernel(u32, u32),
}

/// A registered region. Dropping it deregisters it: no card reaches it then.
///
/// # Invariants
/// The region is live.
pub(crate) struct Region {
    domain: Arc<Domain>,
    made: Made,
    keys: Keys,
}

// SAFETY: as for `Domain`.
unsafe impl Send for Region {}
// SAFETY: as for `Domain`.
unsafe impl Sync for Region {}

impl Region {
    fn of_library(domain: &Arc<Domain>, mr: *mut Mr) -> Result<Region, Errno> {
        let mr = NonNull::new(mr).ok_or_else(last)?;
        // SAFETY: just made; the fields do not change.
        let (local, remote) = unsafe { ((*mr.as_ptr()).lkey, (*mr.as_ptr()).rkey) };
        // INVARIANT: just made.
        Ok(Region {
            domain: Arc::clone(domain),
            made: Made::Library(mr),
            keys: Keys { local, remote },
        })
    }

    /// `ibv_reg_dmabuf_mr`; `None` where the library is too old to have it.
    pub(crate) fn by_library(
        domain: &Arc<Domain>,
        request: &DmaBufRequest<'_>,
    ) -> Option<Result<Region, Errno>> {
        use std::os::fd::AsRawFd;
        let register = domain.library.reg_dmabuf_mr?;
        let Ok(length) = usize::try_from(request.length) else {
            return Some(Err(Errno::INVAL));
        };
        // SAFETY: the domain is live, and the kernel checks the rest.
        let mr = unsafe {
            register(
                domain.pd.as_ptr(),
                request.offset,
                length,
                request.iova,
                request.dmabuf.as_fd().as_raw_fd(),
                request.access as c_int,
            )
        };
        Some(Region::of_library(domain, mr))
    }

    /// The kernel's own method; see [`super::uverbs`].
    pub(crate) fn by_kernel(
        domain: &Arc<Domain>,
        request: &DmaBufRequest<'_>,
    ) -> Result<Region, Errno> {
        let driver = super::uverbs::driver_id(domain.uverbs())?;
        let (handle, keys) =
            super::uverbs::register_dmabuf(domain.uverbs(), driver, domain.handle(), request)?;
        // INVARIANT: just made.
        Ok(Region {
            domain: Arc::clone(domain),
            made: Made::Kernel(driver, handle),
            keys,
        })
    }

    /// `ibv_reg_mr_iova2`: the pages of mapped memory, which the kernel pins. The mapping need not
    /// outlive the region.
    pub(crate) fn of_pages(
        domain: &Arc<Domain>,
        window: Window<'_>,
        iova: u64,
        access: u32,
    ) -> Result<Region, Errno> {
        if access & (LOCAL_WRITE | REMOTE_WRITE) != 0 && !window.writable {
            return Err(Errno(13));
        }
        // SAFETY: the window is mapped now, which is when its pages are pinned; from then on the card
        // has the pages and not the address. Nobody has a reference to the bytes of a `Map`.
        let mr = unsafe {
            (domain.library.reg_mr_iova2)(
                domain.pd.as_ptr(),
                window.address.cast(),
                window.length,
                iova,
                access,
            )
        };
        Region::of_library(domain, mr)
    }

    pub(crate) fn keys(&self) -> Keys {
        self.keys
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        match self.made {
            // The kernel refuses only a region that memory windows are bound to, of which there are
            // none here.
            Made::Library(mr) => {
                // SAFETY: live, ours, and not used again.
                unsafe { (self.domain.library.dereg_mr)(mr.as_ptr()) };
            }
            Made::Kernel(driver, handle) => {
                let _ = super::uverbs::deregister(self.domain.uverbs(), driver, handle);
            }
        }
    }
}

/// Part of a region, for work of this end. Without bytes, no key is looked at.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Local {
    pub(crate) iova: u64,
    pub(crate) length: u32,
    pub(crate) key: u32,
}

/// What this end asks its card to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    /// RDMA write to an address of the other end's, with a number for it to see or without.
    Write {
        to: u64,
        key: u32,
        immediate: Option<u32>,
    },
    /// RDMA read.
    Read { from: u64, key: u32 },
    /// Send, with a number or without.
    Send { immediate: Option<u32> },
}

/// What became of one request.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Done {
    pub(crate) id: u64,
    /// `enum ibv_wc_status`
    pub(crate) status: i32,
    pub(crate) vendor: u32,
    /// Bytes that arrived, of a receive or a read.
    pub(crate) bytes: u32,
    pub(crate) immediate: Option<u32>,
}

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) gid: [u8; 16],
    pub(crate) queue: u32,
    pub(crate) sequence: u32,
    /// `enum ibv_mtu`
    pub(crate) mtu: i32,
}

/// A queue pair of the reliable-connected kind, with a completion queue and channel of its own.
///
/// # Invariants
/// All three are live. Posting and polling are called by the one [`QueuePair`] only, with
/// `&mut self`, so from one thread at a time; changing the state from any.
pub(crate) struct Pair {
    domain: Arc<Domain>,
    channel: NonNull<CompChannel>,
    cq: NonNull<Cq>,
    qp: NonNull<Qp>,
}

// SAFETY: nothing in them is tied to a thread.
unsafe impl Send for Pair {}
// SAFETY: what is called with `&self` is `ibv_modify_qp`, which may be called from any thread
// (libibverbs and its providers lock what needs it), and reading fields that do not change.
unsafe impl Sync for Pair {}

/// The right to post to a [`Pair`] and to poll it.
pub(crate) struct QueuePair {
    pair: Arc<Pair>,
}

impl QueuePair {
    /// Makes one for so many requests in each direction.
    pub(crate) fn new(domain: &Arc<Domain>, depth: u32) -> Result<QueuePair, Errno> {
        let library = domain.library;
        let entries = c_int::try_from(depth.saturating_mul(2)).map_err(|_| Errno::INVAL)?;
        // SAFETY: the context is live, by `Domain`'s invariant.
        let channel = unsafe { (library.create_comp_channel)(domain.context.as_ptr()) };
        let channel = NonNull::new(channel).ok_or_else(last)?;
        // SAFETY: as above, and the channel was just made.
        let cq = unsafe {
            (library.create_cq)(
                domain.context.as_ptr(),
                entries,
                ptr::null_mut(),
                channel.as_ptr(),
                0,
            )
        };
        let Some(cq) = NonNull::new(cq) else {
            let errno = last();
            // SAFETY: ours, and nothing uses it.
            unsafe { (library.destroy_comp_channel)(channel.as_ptr()) };
            return Err(errno);
        };
        let mut wanted = QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: ptr::null_mut(),
            cap: QpCap {
                max_send_wr: depth,
                max_recv_wr: depth,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: the domain and the completion queue are live.
        let qp = unsafe { (library.create_qp)(domain.pd.as_ptr(), &mut wanted) };
        let Some(qp) = NonNull::new(qp) else {
            let errno = last();
            // SAFETY: ours, and nothing uses them.
            unsafe {
                (library.destroy_cq)(cq.as_ptr());
                (library.destroy_comp_channel)(channel.as_ptr());
            }
            return Err(errno);
        };
        // INVARIANT: just made, and there is one `QueuePair` for it.
        let pair = Pair {
            domain: Arc::clone(domain),
            channel,
            cq,
            qp,
        };
        let pair = QueuePair {
            pair: Arc::new(pair),
        };
        pair.pair.modify(
            QpAttr {
                qp_state: 1, // INIT
                port_num: PORT,
                qp_access_flags: REMOTE_WRITE | REMOTE_READ,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, ACCESS_FLAGS, PKEY_INDEX, PORT
            1 << 0 | 1 << 3 | 1 << 4 | 1 << 5,
        )?;
        Ok(pair)
    }

    /// What other threads may stop it by.
    pub(crate) fn pair(&self) -> &Arc<Pair> {
        &self.pair
    }

    /// Its number, 24 bits.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: live; the field does not change.
        unsafe { (*self.pair.qp.as_ptr()).qp_num }
    }

    /// Connects it: `RTR`, then `RTS`. `source` is the place of this end's address in its table,
    /// `sequence` the number of its first packet.
    pub(crate) fn connect(&self, peer: &Peer, source: u8, sequence: u32) -> Result<(), Errno> {
        let route = AhAttr {
            dgid: bytemuck::cast(peer.gid),
            sgid_index: source,
            hop_limit: 64,
            is_global: 1,
            port_num: PORT,
            ..AhAttr::default()
        };
        self.pair.modify(
            QpAttr {
                qp_state: 2, // RTR
                path_mtu: peer.mtu,
                dest_qp_num: peer.queue,
                rq_psn: peer.sequence,
                max_dest_rd_atomic: 16,
                min_rnr_timer: 12, // 0.64 ms
                ah_attr: route,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, AV, PATH_MTU, RQ_PSN, MIN_RNR_TIMER, MAX_DEST_RD_ATOMIC, DEST_QPN
            1 << 0 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20,
        )?;
        self.pair.modify(
            QpAttr {
                qp_state: 3, // RTS
                sq_psn: sequence,
                timeout: 18, // 1.07 s, of which there are seven
                // Not 7, which is for ever with soft-RoCE: nobody would hear of a peer that is gone.
                retry_cnt: 6,
                rnr_retry: 7, // for ever: the other end has not posted a receive yet
                max_rd_atomic: 16,
                ..QpAttr::default()
            },
            // IBV_QP_STATE, TIMEOUT, RETRY_CNT, RNR_RETRY, MAX_QP_RD_ATOMIC, SQ_PSN
            1 << 0 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16,
        )
    }

    /// Posts a request of this end. Its completion has the id.
    pub(crate) fn post(&mut self, id: u64, local: Local, verb: Verb) -> Result<(), Errno> {
        let mut piece = sge(local);
        // enum ibv_wr_opcode
        let (opcode, remote_addr, rkey, immediate) = match verb {
            Verb::Write {
                to,
                key,
                immediate: None,
            } => (0, to, key, None),
            Verb::Write { to, key, immediate } => (1, to, key, immediate),
            Verb::Send { immediate: None } => (2, 0, 0, None),
            Verb::Send { immediate } => (3, 0, 0, immediate),
            Verb::Read { from, key } => (4, from, key, None),
        };
        let mut request = SendWr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &mut piece,
            num_sge: c_int::from(local.length != 0),
            opcode,
            send_flags: SEND_SIGNALED,
            imm_data: immediate.unwrap_or(0).to_be(),
            remote_addr,
            rkey,
            unused: [0; 9],
        };
        let mut bad = ptr::null_mut();
        // SAFETY: the pair is live, and its context's functions are the provider's. The request is
        // copied during the call.
        check(unsafe {
            let post = (*self.pair.domain.context.as_ptr()).ops.post_send;
            post(self.pair.qp.as_ptr(), &mut request, &mut bad)
        })
    }

    /// Posts room for what the other end sends.
    pub(crate) fn post_receive(&mut self, id: u64, local: Local) -> Result<(), Errno> {
        let mut piece = sge(local);
        let mut request = RecvWr {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &mut piece,
            num_sge: c_int::from(local.length != 0),
        };
        let mut bad = ptr::null_mut();
        // SAFETY: as in `post`.
        check(unsafe {
            let post = (*self.pair.domain.context.as_ptr()).ops.post_recv;
            post(self.pair.qp.as_ptr(), &mut request, &mut bad)
        })
    }

    /// What has been done and was not told yet, one request.
    pub(crate) fn poll(&mut self) -> Result<Option<Done>, Errno> {
        let mut done = Wc::default();
        // SAFETY: the queue is live, and there is room for the one completion that is asked for.
        let count = unsafe {
            let poll = (*self.pair.domain.context.as_ptr()).ops.poll_cq;
            poll(self.pair.cq.as_ptr(), 1, &mut done)
        };
        match count {
            0 => Ok(None),
            1 => Ok(Some(Done {
                id: done.wr_id,
                status: done.status,
                vendor: done.vendor_err,
                bytes: done.byte_len,
                immediate: (done.wc_flags & WC_WITH_IMM != 0).then(|| u32::from_be(done.imm_data)),
            })),
            error => Err(Errno(error.abs())),
        }
    }

    /// Asks for an event at the next completion. One that comes before this call makes none.
    pub(crate) fn arm(&mut self) -> Result<(), Errno> {
        // SAFETY: the queue is live.
        check(unsafe {
            let notify = (*self.pair.domain.context.as_ptr()).ops.req_notify_cq;
            notify(self.pair.cq.as_ptr(), 0)
        })
    }

    /// Readable when there is an event.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel is live and keeps its descriptor open.
        unsafe { BorrowedFd::borrow_raw((*self.pair.channel.as_ptr()).fd) }
    }

    /// Takes one event, once [`QueuePair::events`] is readable.
    pub(crate) fn take_event(&mut self) -> Result<(), Errno> {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the channel is live.
        check(unsafe {
            (self.pair.domain.library.get_cq_event)(
                self.pair.channel.as_ptr(),
                &mut cq,
                &mut context,
            )
        })?;
        // SAFETY: it is the queue's event, which is acknowledged once.
        unsafe { (self.pair.domain.library.ack_cq_events)(cq, 1) };
        Ok(())
    }
}

fn sge(local: Local) -> Sge {
    Sge {
        addr: local.iova,
        length: local.length,
        lkey: local.key,
    }
}

impl Pair {
    fn modify(&self, mut attributes: QpAttr, mask: c_int) -> Result<(), Errno> {
        // SAFETY: the pair is live, and the struct is whole.
        check(unsafe { (self.domain.library.modify_qp)(self.qp.as_ptr(), &mut attributes, mask) })
    }

    /// Ends all work: what is posted completes as flushed.
    pub(crate) fn stop(&self) -> Result<(), Errno> {
        let attributes = QpAttr {
            qp_state: 6, // ERR
            ..QpAttr::default()
        };
        self.modify(attributes, 1 << 0)
    }

    /// Ends all work, of both ends, and forgets it: when this returns the card is done with every
    /// region, and nothing more completes.
    pub(crate) fn forget(&self) -> Result<(), Errno> {
        // First, since what is flushed by it can still be polled.
        self.stop()?;
        // IBV_QPS_RESET. Soft-RoCE keeps the region of a message of which only a part has come until
        // then, and deregistering it would wait for the rest.
        self.modify(QpAttr::default(), 1 << 0)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        let library = self.domain.library;
        // The card has stopped when the pair is destroyed.
        // SAFETY: ours, live, and in this order nothing uses what is destroyed; events are all
        // acknowledged, for which destroying a queue would wait.
        unsafe {
            (library.destroy_qp)(self.qp.as_ptr());
            (library.destroy_cq)(self.cq.as_ptr());
            (library.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}
