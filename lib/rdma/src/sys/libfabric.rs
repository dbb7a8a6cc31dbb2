//! Memory regions in a libfabric domain that the program has opened (rdma/fi_domain.h).
//!
//! `fi_mr_regattr`, `fi_mr_bind`, `fi_mr_enable` and `fi_close` are inline functions in the header; they call
//! through tables of function pointers in the objects. So this module neither links nor opens the library: a
//! program with a domain has loaded it.
//!
//! Soundness: a provider may read and write registered memory until the region is closed, from other threads
//! and for other machines. It only gets windows into a [`Map`](peerbuf_core::memory::Map), to whose bytes no
//! Rust reference exists. A [`Region`] owns its memory, and drops it only after the provider has confirmed
//! the close.

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
use peerbuf_core::fork::Process;
use peerbuf_core::memory::Window;

/// A domain of the program, and an endpoint if regions must be bound to one.
///
/// # Invariants Both are live as long as this object. The domain's functions may be called whenever a region
/// is made or dropped, as the caller of [`Domain::from_raw`] promised.
pub(crate) struct Handle {
    domain: NonNull<abi::Domain>,
    endpoint: Option<NonNull<abi::Fid>>,
    /// The process that made this object. A forked child leaves its regions alone: they are the parent's.
    owner: Process,
}

// SAFETY: by the invariant its functions may be called from the thread that drops a region.
unsafe impl Send for Handle {}
// SAFETY: by the invariant its functions may be called whenever a region is made or dropped.
unsafe impl Sync for Handle {}

/// Facts about a domain, from the `fi_info` that it was opened with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// `fabric_attr->prov_name`, such as `tcp` or `verbs;ofi_rxm`; for diagnostics.
    pub provider: String,
    /// `fabric_attr->api_version`: the API version that the program requested, as `FI_VERSION(major, minor)`.
    /// Below 1.20 there are no dma-bufs.
    pub api_version: u32,
    /// `domain_attr->mr_mode`: how regions are addressed, and who chooses keys.
    pub mr_mode: u64,
}

/// A domain of the program. Clones refer to the same domain. See [`Domain::from_raw`].
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
    /// Wraps a domain that the program has opened with `fi_domain`: `domain` is its `struct fid_domain *`.
    /// The program still owns and closes it.
    ///
    /// # Errors [`RdmaError::Mismatch`] for an object of another class, or without `fi_mr_regattr`.
    ///
    /// # Safety
    /// - `domain` is live, and is closed after this value, its clones and every [`Registration`] in it are
    ///   gone. `opened` is from the `fi_info` that it was opened with.
    /// - Its threading is `FI_THREAD_SAFE`, or no other thread is in a call on it or on an endpoint of it
    ///   while a registration is made or dropped.
    /// - It is not bound to an event queue with `FI_REG_MR`: a registration is complete when the call
    ///   returns.
    /// - When a registration is dropped, no work on it is in flight, neither this process's nor a peer's.
    ///   (libfabric demands that of a caller of `fi_close`. A software provider copies to the addresses,
    ///   which are unmapped then.)
    ///
    /// [`Registration`]: crate::libfabric::Registration
    pub unsafe fn from_raw(domain: *mut c_void, opened: Opened) -> Result<Domain, RdmaError> {
        let wrong = |what: String| RdmaError::Mismatch { what };
        let Some(domain) = NonNull::new(domain.cast::<abi::Domain>()) else {
            return Err(wrong("the libfabric domain is null".into()));
        };
        // SAFETY: the domain is live, by the caller's promise.
        let (class, table) = unsafe { ((*domain.as_ptr()).fid.fclass, (*domain.as_ptr()).mr) };
        if class != abi::CLASS_DOMAIN {
            let what = format!("the libfabric object has class {class}, but must be a domain");
            return Err(wrong(what));
        }
        // SAFETY: a domain has this table, which begins with its size.
        if table.is_null() || unsafe { (*table).size } < size_of::<abi::MrOps>() {
            let what = "the domain has no fi_mr_regattr".into();
            return Err(wrong(what));
        }
        // INVARIANT: by the caller's promise.
        let handle = Handle {
            domain,
            endpoint: None,
            owner: Process::current(),
        };
        Ok(Domain {
            handle: Arc::new(handle),
            opened: Arc::new(opened),
        })
    }

    /// The same domain, with regions bound to this endpoint (`struct fid_ep *`) and enabled, as providers
    /// with `FI_MR_ENDPOINT` need. The endpoint is enabled.
    ///
    /// # Safety `endpoint` is a live endpoint of this domain, and is closed after the returned value, its
    /// clones and every registration in it are gone.
    #[must_use]
    pub unsafe fn for_endpoint(&self, endpoint: *mut c_void) -> Domain {
        // INVARIANT: by the caller's promise, here and at `from_raw`.
        let handle = Handle {
            domain: self.handle.domain,
            endpoint: NonNull::new(endpoint.cast()),
            owner: self.handle.owner,
        };
        Domain {
            handle: Arc::new(handle),
            opened: Arc::clone(&self.opened),
        }
    }

    /// Facts about the domain.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    pub(crate) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }
}

impl Handle {
    /// True in a forked child of the process that made this object.
    pub(crate) fn is_inherited(&self) -> bool {
        !self.owner.is_current()
    }

    /// Whether regions are bound to an endpoint.
    pub(crate) fn has_endpoint(&self) -> bool {
        self.endpoint.is_some()
    }
}

/// A dma-buf, and the offset in bytes of the registered range. `None` registers an invalid descriptor.
pub(crate) type DmaBufPart<'d> = (Option<BorrowedFd<'d>>, u64);

/// A registered region with its memory. Dropping it closes the region and then drops the memory.
///
/// # Invariants The region is live, and `kept` keeps the registered memory mapped.
pub(crate) struct Region<K> {
    mr: NonNull<abi::Mr>,
    /// The region's start address in this process.
    address: *mut c_void,
    domain: Arc<Handle>,
    kept: ManuallyDrop<K>,
}

// SAFETY: as for `Handle`; the fields that are read do not change.
unsafe impl<K: Send> Send for Region<K> {}
// SAFETY: as for `Handle`; the fields that are read do not change.
unsafe impl<K: Sync> Sync for Region<K> {}

impl<K> Region<K> {
    /// `fi_mr_regattr`, followed by `fi_mr_bind` and `fi_mr_enable` if the domain has an endpoint.
    ///
    /// `window` is the part of `kept` to register; it stays mapped as long as `kept`. With a dma-buf it is
    /// this process's mapping of the same bytes, because some providers copy short messages through the
    /// address.
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
        // INVARIANT: the region was just made from `kept`.
        let region = Region {
            mr,
            address,
            domain: Arc::clone(domain),
            kept: ManuallyDrop::new(kept),
        };
        // On an error the drop closes the region.
        region.enable()?;
        Ok(region)
    }

    fn enable(&self) -> Result<(), Errno> {
        let Some(endpoint) = self.domain.endpoint else {
            return Ok(());
        };
        let fid = self.mr.as_ptr().cast::<abi::Fid>();
        // SAFETY: the region is live (invariant) and begins with its fid; the endpoint is live.
        check(unsafe { ((*(*fid).ops).bind)(fid, endpoint.as_ptr(), 0) })?;
        // SAFETY: the region is live; this command takes no argument.
        check(unsafe { ((*(*fid).ops).control)(fid, abi::ENABLE, ptr::null_mut()) })
    }

    /// `fi_mr_key`; `FI_KEY_NOTAVAIL` is `None`.
    pub(crate) fn key(&self) -> Option<u64> {
        // SAFETY: the region is live (invariant).
        let key = unsafe { (*self.mr.as_ptr()).key };
        (key != u64::MAX).then_some(key)
    }

    /// `fi_mr_desc`
    pub(crate) fn descriptor(&self) -> *mut c_void {
        // SAFETY: the region is live (invariant).
        unsafe { (*self.mr.as_ptr()).mem_desc }
    }

    /// The address of byte `offset` of the region in this process. The offset is inside the region, or its
    /// end.
    pub(crate) fn address(&self, offset: u64) -> *mut c_void {
        self.address.wrapping_byte_add(offset as usize)
    }

    /// The region's memory.
    pub(crate) fn kept(&self) -> &K {
        &self.kept
    }
}

impl<K> Drop for Region<K> {
    fn drop(&mut self) {
        if self.domain.is_inherited() {
            return;
        }
        let fid = self.mr.as_ptr().cast::<abi::Fid>();
        // SAFETY: the region is live (invariant), and not used again after a successful close.
        if check(unsafe { ((*(*fid).ops).close)(fid) }).is_ok() {
            // SAFETY: dropped only here; nothing uses the registered memory any more.
            unsafe { ManuallyDrop::drop(&mut self.kept) };
        }
        // If the close fails the provider may still use the memory, so it is leaked.
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
        // A descriptor number that no process can have.
        fd: dmabuf.map_or(c_int::MAX, |dmabuf| dmabuf.as_raw_fd()),
        offset,
        len: window.length(),
        // The provider adds the offset to this address.
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
    // SAFETY: the domain is live (invariant) and begins with its fid; `from_raw` checked its table. The
    // attributes and what they point to are complete local values, which the provider copies as needed. No
    // Rust reference to the bytes of the window exists, and the window stays mapped until the region is
    // closed: `Region` closes the region before it drops the memory.
    // goes (`Region`).
    check(unsafe {
        let table = (*domain.domain.as_ptr()).mr;
        ((*table).regattr)(fid, &attributes, flags, &mut mr)
    })?;
    // Success without a region violates the interface.
    let mr = NonNull::new(mr).ok_or(Errno::IO)?;
    Ok((mr, address))
}

/// The result of a libfabric function: 0, or a negative error number of libfabric or of the OS.
fn check(status: c_int) -> Result<(), Errno> {
    match status {
        0 => Ok(()),
        number => Err(Errno(number.saturating_abs())),
    }
}
