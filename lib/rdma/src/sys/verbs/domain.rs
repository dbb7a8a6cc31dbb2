//! An open device with its protection domain, and the regions registered in it.

use std::ffi::{CStr, c_int, c_void};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use super::abi::{Context, GidEntry, LOCAL_WRITE, Mr, Pd, PortAttr, REMOTE_WRITE};
use super::library::{Library, check, last};
use crate::sys::uverbs::{self, DmaBufRequest, Keys};
use peerbuf::Errno;
use peerbuf_core::fork::Process;
use peerbuf_core::memory::Window;

/// An open device and a protection domain on it.
///
/// # Invariants Both are live. The library's functions may be called on them from any thread
/// (ibv_open_device(3)): the library and its providers do the locking.
/// (ibv_open_device(3)): the library and its providers lock what needs it.
pub(crate) struct Domain {
    pub(super) library: &'static Library,
    pub(super) context: NonNull<Context>,
    pub(super) pd: NonNull<Pd>,
    /// This object made both, and deallocates both. Otherwise the program owns them.
    is_ours: bool,
    /// The process that made this object. The kernel's objects are the parent's: a forked child has the same
    /// descriptor, and destroys none of them.
    owner: Process,
}

// SAFETY: by the invariant any thread may use them.
unsafe impl Send for Domain {}
// SAFETY: by the invariant threads may use them concurrently.
unsafe impl Sync for Domain {}

impl Domain {
    /// True in a forked child of the process that made this object.
    pub(crate) fn is_inherited(&self) -> bool {
        !self.owner.is_current()
    }

    /// Opens the device with this name; `ENODEV` if there is none.
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
            // SAFETY: this function opened it, and nothing uses it.
            unsafe { (library.close_device)(context.as_ptr()) };
            return Err(errno);
        };
        // INVARIANT: both were just made.
        Ok(Domain {
            library,
            context,
            pd,
            is_ours: true,
            owner: Process::current(),
        })
    }

    /// Wraps a protection domain that the program owns. `None` for a null pointer, and for a domain without a
    /// device.
    ///
    /// # Safety `pd` is null, or a live `struct ibv_pd` made by the library, and it and its context stay live
    /// as long as the result.
    pub(crate) unsafe fn foreign(library: &'static Library, pd: *mut c_void) -> Option<Domain> {
        let pd = NonNull::new(pd.cast::<Pd>())?;
        // SAFETY: the domain is live, by the caller's promise; the field does not change.
        let context = NonNull::new(unsafe { (*pd.as_ptr()).context })?;
        // INVARIANT: both are live, by the caller's promise.
        Some(Domain {
            library,
            context,
            pd,
            is_ours: false,
            owner: Process::current(),
        })
    }

    /// The device's name.
    pub(crate) fn device_name(&self) -> String {
        // SAFETY: the context is live (invariant), and so is its device, whose name is a constant string.
        let name = unsafe {
            CStr::from_ptr((self.library.get_device_name)(
                (*self.context.as_ptr()).device,
            ))
        };
        name.to_string_lossy().into_owned()
    }

    /// The file descriptor of the device's uverbs node.
    pub(crate) fn uverbs(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is live (invariant) and keeps its descriptor open.
        unsafe { BorrowedFd::borrow_raw((*self.context.as_ptr()).cmd_fd) }
    }

    /// The domain's handle in the kernel.
    pub(crate) fn handle(&self) -> u32 {
        // SAFETY: the domain is live (invariant); the field does not change.
        unsafe { (*self.pd.as_ptr()).handle }
    }

    /// The attributes of a port; `EINVAL` if the device does not have it.
    pub(crate) fn port(&self, number: u8) -> Result<PortAttr, Errno> {
        let mut port = PortAttr::default();
        // SAFETY: the struct has room for what the call fills in.
        check(unsafe { (self.library.query_port)(self.context.as_ptr(), number, &mut port) })?;
        Ok(port)
    }

    /// The device's GIDs.
    pub(crate) fn gids(&self) -> Result<Vec<GidEntry>, Errno> {
        let mut entries = vec![GidEntry::default(); 256];
        // SAFETY: the vector has room for this many entries of this size.
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
        if !self.is_ours || self.is_inherited() {
            return;
        }
        // SAFETY: this object owns both. Regions and queue pairs hold a reference to it, so they are gone.
        unsafe {
            (self.library.dealloc_pd)(self.pd.as_ptr());
            (self.library.close_device)(self.context.as_ptr());
        }
    }
}

/// How a region was made, and must be deregistered.
enum Made {
    /// By the library.
    Library(NonNull<Mr>),
    /// By the kernel's method: driver ID and handle.
    Kernel(u32, u32),
}

/// A registered region. Dropping it deregisters it; no card can access it after that.
///
/// # Invariants The region is live.
pub(crate) struct Region {
    domain: Arc<Domain>,
    made: Made,
    keys: Keys,
}

// SAFETY: the library may be called from any thread, as for `Domain`.
unsafe impl Send for Region {}
// SAFETY: the fields are constant, and the library does its own locking.
unsafe impl Sync for Region {}

impl Region {
    fn of_library(domain: &Arc<Domain>, mr: *mut Mr) -> Result<Region, Errno> {
        let mr = NonNull::new(mr).ok_or_else(last)?;
        // SAFETY: the region was just made; the fields do not change.
        let (local, remote) = unsafe { ((*mr.as_ptr()).lkey, (*mr.as_ptr()).rkey) };
        // INVARIANT: just made.
        Ok(Region {
            domain: Arc::clone(domain),
            made: Made::Library(mr),
            keys: Keys { local, remote },
        })
    }

    /// `ibv_reg_dmabuf_mr`; `None` if the library is too old for it.
    pub(crate) fn by_library(
        domain: &Arc<Domain>,
        request: &DmaBufRequest<'_>,
    ) -> Option<Result<Region, Errno>> {
        use std::os::fd::AsRawFd;
        let register = domain.library.reg_dmabuf_mr?;
        let Ok(length) = usize::try_from(request.length) else {
            return Some(Err(Errno::INVAL));
        };
        // SAFETY: the domain is live, and the kernel checks the other arguments.
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

    /// The kernel's own method; see [`uverbs`].
    pub(crate) fn by_kernel(
        domain: &Arc<Domain>,
        request: &DmaBufRequest<'_>,
    ) -> Result<Region, Errno> {
        let driver = uverbs::driver_id(domain.uverbs())?;
        let (handle, keys) =
            uverbs::register_dmabuf(domain.uverbs(), driver, domain.handle(), request)?;
        // INVARIANT: just made.
        Ok(Region {
            domain: Arc::clone(domain),
            made: Made::Kernel(driver, handle),
            keys,
        })
    }

    /// `ibv_reg_mr_iova2`: registers the pages of mapped memory, which the kernel pins. The mapping need not
    /// outlive the region.
    pub(crate) fn of_pages(
        domain: &Arc<Domain>,
        window: Window<'_>,
        iova: u64,
        access: u32,
    ) -> Result<Region, Errno> {
        if access & (LOCAL_WRITE | REMOTE_WRITE) != 0 && !window.is_writable() {
            return Err(Errno::ACCES);
        }
        // SAFETY: the window is mapped during the call, which pins its pages. After that the card uses the
        // pages, not the address. No Rust reference to the bytes of a `Map` exists.
        let mr = unsafe {
            (domain.library.reg_mr_iova2)(
                domain.pd.as_ptr(),
                window.address().cast(),
                window.length(),
                iova,
                access,
            )
        };
        Region::of_library(domain, mr)
    }

    pub(crate) fn keys(&self) -> Keys {
        self.keys
    }

    /// The library's `struct ibv_mr`; `None` if the kernel made the region.
    pub(crate) fn raw(&self) -> Option<NonNull<c_void>> {
        match self.made {
            Made::Library(mr) => Some(mr.cast()),
            Made::Kernel(..) => None,
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.domain.is_inherited() {
            return;
        }
        match self.made {
            // The kernel refuses only a region with bound memory windows, and this crate binds none.
            Made::Library(mr) => {
                // SAFETY: the region is live, owned by this object, and not used again.
                unsafe { (self.domain.library.dereg_mr)(mr.as_ptr()) };
            }
            Made::Kernel(driver, handle) => {
                let _ = uverbs::deregister(self.domain.uverbs(), driver, handle);
            }
        }
    }
}
