//! Memory regions of a libfabric domain that the program has opened (rdma/fi_domain.h).
//!
//! What the header calls `fi_mr_regattr`, `fi_mr_bind`, `fi_mr_enable` and `fi_close` are inline
//! functions over tables of pointers in the objects themselves. So nothing of the library is linked
//! or opened here: whoever has a domain has it loaded.
//!
//! What keeps this sound: a provider may read and write what is registered until the region is
//! closed, from other threads and for other machines. It is given windows into a
//! [`Map`](peerbuf_core::memory::Map) only, of whose bytes there are no Rust references, and a [`Region`]
//! owns what it was made of and lets go of it only once the provider has said that it is closed.

mod abi;
#[cfg(test)]
mod tests;

use std::ffi::{c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

pub(crate) use abi::{
    MR_BASIC, MR_ENDPOINT, MR_RAW, MR_VIRT_ADDR, READ, RECV, REMOTE_READ, REMOTE_WRITE, SEND,
    WRITE, layout,
};

use crate::error::RdmaError;
use peerbuf::Errno;
use peerbuf_core::memory::Window;

/// A domain of the program's, and an endpoint where regions are bound to one.
///
/// # Invariants
/// Both are live for as long as this is. The domain's functions may be called whenever a region is
/// made or dropped: what [`Domain::from_raw`] has of its caller.
pub(crate) struct Handle {
    domain: NonNull<abi::Domain>,
    endpoint: Option<NonNull<abi::Fid>>,
}

// SAFETY: by the invariant.
unsafe impl Send for Handle {}
// SAFETY: by the invariant.
unsafe impl Sync for Handle {}

/// What is to be known of a domain, from the `fi_info` that it was opened with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// `fabric_attr->prov_name`, such as `tcp` or `verbs;ofi_rxm`. For people.
    pub provider: String,
    /// `fabric_attr->api_version`: the version of the interface that the program asked for, as
    /// `FI_VERSION(major, minor)` has it. Below 1.20 there are no dma-bufs.
    pub api_version: u32,
    /// `domain_attr->mr_mode`: how regions are addressed, and who chooses keys.
    pub mr_mode: u64,
}

/// A domain of the program's. Clones are the same. See [`Domain::from_raw`].
#[derive(Clone)]
pub struct Domain {
    handle: Arc<Handle>,
    opened: Arc<Opened>,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Domain").field(&self.opened).finish()
    }
}

impl Domain {
    /// A domain that the program has opened with `fi_domain`: `domain` is its `struct fid_domain *`.
    /// It stays the program's, which closes it.
    ///
    /// # Errors
    /// [`RdmaError::Mismatch`] for an object that says of itself that it is no domain, or one
    /// without `fi_mr_regattr`.
    ///
    /// # Safety
    /// - `domain` is live, and is closed after this value, its clones and every [`Registration`] of
    ///   it are gone. `opened` is from the `fi_info` that it was opened with.
    /// - Its threading is `FI_THREAD_SAFE`, or nobody is in a call on it, or on an endpoint of it,
    ///   while a registration is made or dropped.
    /// - It is bound to no event queue with `FI_REG_MR`: registrations are made when the call returns.
    /// - When a registration is dropped no work on it is in flight, neither this process's nor a
    ///   peer's. (libfabric asks that of whoever closes a region. A provider that is software copies
    ///   to the addresses, which are unmapped then.)
    ///
    /// [`Registration`]: crate::libfabric::Registration
    pub unsafe fn from_raw(domain: *mut c_void, opened: Opened) -> Result<Domain, RdmaError> {
        let wrong = |what: String| RdmaError::Mismatch { what };
        let Some(domain) = NonNull::new(domain.cast::<abi::Domain>()) else {
            return Err(wrong("a null pointer, and a domain of libfabric".into()));
        };
        // SAFETY: the caller's word.
        let (class, table) = unsafe { ((*domain.as_ptr()).fid.fclass, (*domain.as_ptr()).mr) };
        if class != abi::CLASS_DOMAIN {
            let what = format!("an object of libfabric's class {class}, and a domain");
            return Err(wrong(what));
        }
        // SAFETY: a domain has the table, which begins with its size.
        if table.is_null() || unsafe { (*table).size } < size_of::<abi::MrOps>() {
            let what = "this domain, and fi_mr_regattr, which it does not have".into();
            return Err(wrong(what));
        }
        // INVARIANT: the caller's word.
        let handle = Handle {
            domain,
            endpoint: None,
        };
        Ok(Domain {
            handle: Arc::new(handle),
            opened: Arc::new(opened),
        })
    }

    /// The same domain, whose regions are bound to this endpoint (`struct fid_ep *`) and enabled
    /// before they are used: what providers with `FI_MR_ENDPOINT` need. The endpoint is enabled.
    ///
    /// # Safety
    /// `endpoint` is a live endpoint of this domain, and is closed after the value that is returned,
    /// its clones and every registration of it are gone.
    #[must_use]
    pub unsafe fn for_endpoint(&self, endpoint: *mut c_void) -> Domain {
        // INVARIANT: the caller's word, also that of `from_raw`.
        let handle = Handle {
            domain: self.handle.domain,
            endpoint: NonNull::new(endpoint.cast()),
        };
        Domain {
            handle: Arc::new(handle),
            opened: Arc::clone(&self.opened),
        }
    }

    /// What is known of it.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    pub(crate) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }
}

impl Handle {
    /// Whether regions are bound to an endpoint.
    pub(crate) fn has_endpoint(&self) -> bool {
        self.endpoint.is_some()
    }
}

/// A dma-buf, and the offset in bytes from which on it is registered; without one, a number that is no
/// descriptor is given for it.
pub(crate) type DmaBufPart<'d> = (Option<BorrowedFd<'d>>, u64);

/// A registered region, with what it is made of. Dropping it closes it, and lets go of that.
///
/// # Invariants
/// The region is live, and `kept` keeps mapped what was registered.
pub(crate) struct Region<K> {
    mr: NonNull<abi::Mr>,
    /// Where the region begins in this process.
    address: *mut c_void,
    domain: Arc<Handle>,
    kept: ManuallyDrop<K>,
}

// SAFETY: as for `Handle`; the fields of a region that are read here do not change.
unsafe impl<K: Send> Send for Region<K> {}
// SAFETY: as for `Handle`.
unsafe impl<K: Sync> Sync for Region<K> {}

impl<K> Region<K> {
    /// `fi_mr_regattr`, and where the domain has an endpoint `fi_mr_bind` and `fi_mr_enable`.
    ///
    /// `window` is the memory of `kept` to be registered; it is mapped for as long as `kept` is there.
    /// With a dma-buf it is the same bytes as this process has them mapped: so their addresses are
    /// good for providers that copy short messages, too.
    pub(crate) fn register(
        domain: &Arc<Handle>,
        mut kept: K,
        window: impl FnOnce(&mut K) -> Window<'_>,
        dmabuf: Option<DmaBufPart<'_>>,
        access: u64,
        key: u64,
    ) -> Result<Region<K>, Errno> {
        let (mr, address) = register(domain, window(&mut kept), dmabuf, access, key)?;
        // INVARIANT: just made, of what is kept.
        let region = Region {
            mr,
            address,
            domain: Arc::clone(domain),
            kept: ManuallyDrop::new(kept),
        };
        // What fails here is closed by dropping it.
        region.enable()?;
        Ok(region)
    }

    fn enable(&self) -> Result<(), Errno> {
        let Some(endpoint) = self.domain.endpoint else {
            return Ok(());
        };
        let fid = self.mr.as_ptr().cast::<abi::Fid>();
        // SAFETY: the region is live (invariant), begins with its fid, and so is the endpoint.
        check(unsafe { ((*(*fid).ops).bind)(fid, endpoint.as_ptr(), 0) })?;
        // SAFETY: the region is live; this command takes no argument.
        check(unsafe { ((*(*fid).ops).control)(fid, abi::ENABLE, ptr::null_mut()) })
    }

    /// `fi_mr_key`; `FI_KEY_NOTAVAIL` is `None`.
    pub(crate) fn key(&self) -> Option<u64> {
        // SAFETY: live by the invariant.
        let key = unsafe { (*self.mr.as_ptr()).key };
        (key != u64::MAX).then_some(key)
    }

    /// `fi_mr_desc`
    pub(crate) fn descriptor(&self) -> *mut c_void {
        // SAFETY: live by the invariant.
        unsafe { (*self.mr.as_ptr()).mem_desc }
    }

    /// Where byte `offset` of the region is in this process. The offset is inside, or its end.
    pub(crate) fn address(&self, offset: u64) -> *mut c_void {
        self.address.wrapping_byte_add(offset as usize)
    }

    /// What it is made of.
    pub(crate) fn kept(&self) -> &K {
        &self.kept
    }
}

impl<K> Drop for Region<K> {
    fn drop(&mut self) {
        let fid = self.mr.as_ptr().cast::<abi::Fid>();
        // SAFETY: live by the invariant, and not used again where it was closed.
        if check(unsafe { ((*(*fid).ops).close)(fid) }).is_ok() {
            // SAFETY: dropped once, here; nothing uses what was registered any more.
            unsafe { ManuallyDrop::drop(&mut self.kept) };
        }
        // Otherwise the provider may still use the memory, which stays where it is for that reason.
    }
}

fn register(
    domain: &Handle,
    window: Window<'_>,
    dmabuf: Option<DmaBufPart<'_>>,
    access: u64,
    key: u64,
) -> Result<(NonNull<abi::Mr>, *mut c_void), Errno> {
    let writes = access & (RECV | READ | REMOTE_WRITE) != 0;
    if writes && !window.is_writable() {
        return Err(Errno::ACCES);
    }
    let address: *mut c_void = window.address().cast();
    let pages = abi::IoVec {
        base: address,
        length: window.length(),
    };
    let of_dmabuf = dmabuf.map(|(dmabuf, offset)| abi::DmaBuf {
        // No process can have so many open.
        fd: dmabuf.map_or(c_int::MAX, |dmabuf| dmabuf.as_raw_fd()),
        offset,
        len: window.length(),
        // The address of the region is this and the offset.
        base_addr: address.wrapping_byte_sub(offset as usize),
    });
    let (what, flags): (*const c_void, u64) = match &of_dmabuf {
        Some(dmabuf) => (ptr::from_ref(dmabuf).cast(), abi::MR_DMABUF),
        None => (ptr::from_ref(&pages).cast(), 0),
    };
    let attributes = abi::MrAttr {
        what,
        iov_count: 1,
        access,
        offset: 0,
        requested_key: key,
        context: ptr::null_mut(),
        auth_key_size: 0,
        auth_key: ptr::null_mut(),
        iface: abi::HMEM_SYSTEM,
        device: 0,
        hmem_data: ptr::null_mut(),
        page_size: 0,
        base_mr: ptr::null(),
        sub_mr_cnt: 0,
    };
    let mut mr = ptr::null_mut();
    let fid = domain.domain.as_ptr().cast::<abi::Fid>();
    // SAFETY: the domain is live (its invariant) and begins with its fid; its table was looked at
    // when it was taken. The attributes and what they point to are ours and whole, and the provider
    // copies what it wants to keep of them. Nobody has a reference to the bytes of the window, which
    // stay mapped until the region is closed: what was made is closed before what it was made of
    // goes (`Region`).
    check(unsafe {
        let table = (*domain.domain.as_ptr()).mr;
        ((*table).regattr)(fid, &attributes, flags, &mut mr)
    })?;
    // One that reports success and gives nothing has broken the interface.
    let mr = NonNull::new(mr).ok_or(Errno::IO)?;
    Ok((mr, address))
}

/// The answer of a function of libfabric's: 0, or a number of its own or of the system's, negative.
fn check(status: c_int) -> Result<(), Errno> {
    match status {
        0 => Ok(()),
        number => Err(Errno(number.saturating_abs())),
    }
}
