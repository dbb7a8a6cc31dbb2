//! Protection domains: a card's own, or one that another library made. What is done in them is in `registration`.

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

use super::verbs;
use crate::error::RdmaError;

/// A protection domain of libibverbs (`struct ibv_pd`), in which buffers are registered. Clones are the same.
///
/// A program that has queue pairs of its own, by whichever bindings, brings its domain along
/// ([`Domain::from_raw`]), and names in its work requests what a
/// [`Registration`](crate::Registration) has for it: address and key ([`Registration::sge`](crate::Registration::sge), for its own work;
/// [`Registration::remote`](crate::Registration::remote), for the other end's).
///
/// ```no_run
/// use std::ffi::c_void;
/// use peerbuf::{Access, Buffer};
/// use peerbuf_rdma::{Domain, Registration, RdmaError};
///
/// /// `pd` is the `ibv_pd` of rdma-mummy-sys, sideway, or a C program.
/// fn register(pd: *mut c_void, buffer: &Buffer) -> Result<Registration, RdmaError> {
///     // SAFETY: it is live, and is deallocated after the registration.
///     let domain = unsafe { Domain::from_raw(pd) }?;
///     let region = domain.register(&buffer.whole(), Some(Access::Write))?;
///     let first = region.sge(0, 4096)?;
///     println!("addr {:#x}, length {}, lkey {:#x}", first.address, first.length, first.lkey);
///     Ok(region)
/// }
/// ```
#[doc(alias = "ProtectionDomain")]
#[doc(alias = "ibv_pd")]
#[derive(Clone)]
pub struct Domain {
    inner: Arc<Inner>,
}

struct Inner {
    verbs: Arc<verbs::Domain>,
    name: String,
    /// The card has no device of its own: the processor does its work.
    software: bool,
}

impl std::fmt::Debug for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Domain").field(&self.inner.name).finish()
    }
}

impl Domain {
    pub(crate) fn of(verbs: verbs::Domain) -> Domain {
        let name = verbs.device_name();
        let device = Path::new("/sys/class/infiniband")
            .join(&name)
            .join("device");
        let inner = Inner {
            verbs: Arc::new(verbs),
            name,
            software: !device.exists(),
        };
        Domain {
            inner: Arc::new(inner),
        }
    }

    /// The name of its card.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn verbs(&self) -> &Arc<verbs::Domain> {
        &self.inner.verbs
    }

    /// Whether these are clones of each other.
    pub(crate) fn is(&self, other: &Domain) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// True where the card is software, such as soft-RoCE: the processor moves its bytes.
    pub fn is_software(&self) -> bool {
        self.inner.software
    }

    /// A protection domain that the program has (`struct ibv_pd *`). It stays the program's, which deallocates it.
    ///
    /// # Errors
    /// [`RdmaError::Unavailable`] without libibverbs, [`RdmaError::Mismatch`] for a null pointer.
    ///
    /// # Safety
    /// - `pd` was made by `libibverbs.so.1` as the dynamic loader gives it to this process. `rdma-mummy-sys`,
    ///   `sideway`, and programs that link the shared library have that one; a program with a static libibverbs
    ///   has another.
    /// - It is live, and is deallocated, and its context closed, after this value, its clones and every
    ///   [`Registration`](crate::Registration) of it are gone.
    ///
    /// Work that is in flight when a registration is dropped fails, here or at the other end: peerbuf does not
    /// know the program's queue pairs, and cannot stop them first.
    pub unsafe fn from_raw(pd: *mut c_void) -> Result<Domain, RdmaError> {
        let library = verbs::needed()?;
        // SAFETY: the caller's word.
        let domain = unsafe { verbs::Domain::foreign(library, pd) };
        let what = "a null pointer, or a domain without a device, and registrations".to_owned();
        domain.map(Domain::of).ok_or(RdmaError::Mismatch { what })
    }
}
