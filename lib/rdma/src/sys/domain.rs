//! Protection domains, a card's own or the program's. `registration` has the operations in them.

use std::ffi::c_void;
use std::path::Path;
use std::sync::Arc;

use super::verbs;
use crate::error::RdmaError;

/// A protection domain of libibverbs (`struct ibv_pd`) in which buffers are registered. Clones refer to the
/// same domain.
///
/// A program with its own queue pairs, from any binding, passes its domain to [`Domain::from_raw`]. Its work
/// requests use the address and the key of a [`Registration`](crate::Registration):
/// [`Registration::sge`](crate::Registration::sge) for local memory,
/// [`Registration::remote`](crate::Registration::remote) for the peer's requests.
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
    /// The card has no hardware: the CPU does its work.
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

    /// The card's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn verbs(&self) -> &Arc<verbs::Domain> {
        &self.inner.verbs
    }

    /// Refuses use in a forked child: the kernel's objects are the parent's, and some of the library's memory is not
    /// there.
    pub(crate) fn here(&self) -> Result<(), RdmaError> {
        match self.inner.verbs.is_inherited() {
            false => Ok(()),
            true => Err(RdmaError::Inherited {
                card: self.inner.name.clone(),
            }),
        }
    }

    /// Whether the two are clones of each other.
    pub(crate) fn is(&self, other: &Domain) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// True for a software card, such as soft-RoCE: the CPU moves its bytes.
    pub fn is_software(&self) -> bool {
        self.inner.software
    }

    /// Wraps a protection domain of the program (`struct ibv_pd *`), which the program still owns and
    /// deallocates.
    ///
    /// # Errors [`RdmaError::Unavailable`] without libibverbs, [`RdmaError::Mismatch`] for a null pointer.
    ///
    /// # Safety
    /// - `pd` was made by the `libibverbs.so.1` that the dynamic loader gives to this process.
    ///   `rdma-mummy-sys`, `sideway`, and programs that link the shared library use that one; a program with
    ///   a static libibverbs uses another.
    /// - It is live. It is deallocated, and its context closed, after this value, its clones and every
    ///   [`Registration`](crate::Registration) in it are gone.
    ///
    /// Dropping a registration makes work in flight on it fail, locally or at the peer: peerbuf does not know
    /// the program's queue pairs and cannot stop them first.
    pub unsafe fn from_raw(pd: *mut c_void) -> Result<Domain, RdmaError> {
        let library = verbs::needed()?;
        // SAFETY: the caller's promise.
        let domain = unsafe { verbs::Domain::foreign(library, pd) };
        let what = "the protection domain is null, or has no device".to_owned();
        domain.map(Domain::of).ok_or(RdmaError::Mismatch { what })
    }
}
