//! Buffers for RDMA cards, in a protection domain of the program.

use std::ffi::{c_char, c_void};
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};

use crate::buffer::Buffer;
use crate::failure::Code;
use crate::file::Report;
use crate::foreign::{access, make, place, run};
use crate::handle::{self, free, get};

/// The program's protection domain.
pub struct Domain(peerbuf_rdma::Domain);

/// A registered range of a buffer (memory region).
pub struct Registration(peerbuf_rdma::Registration);

/// The arguments of work requests.
#[repr(C)]
pub struct RegistrationInfo {
    /// The address of the range's first byte, in local and remote requests.
    pub address: u64,
    /// The length of the range in bytes.
    pub length: u64,
    /// The local key.
    pub lkey: u32,
    /// The remote key.
    pub rkey: u32,
    /// The rung by which the card got the buffer: `dma-buf-by-library`, `dma-buf-by-kernel`, `shared-memory`
    /// or `staged`.
    pub rung: *const c_char,
    /// The `struct ibv_mr *`, owned by the registration; null if libibverbs did not make it.
    pub mr: *mut c_void,
}

/// Takes a `struct ibv_pd *` of libibverbs.so.1. The program still owns it, and deallocates it after this
/// domain and its registrations are freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_domain_from_pd(
    pd: *mut c_void,
    domain: Option<&mut MaybeUninit<*mut Domain>>,
) -> Code {
    make(domain, || {
        // SAFETY: the caller's promise, as the function's description demands.
        let domain = unsafe { peerbuf_rdma::Domain::from_raw(pd) };
        Ok(Domain(domain?))
    })
}

/// Frees a domain. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_domain_free(domain: *mut Domain) -> Code {
    run(|| free(domain))
}

/// Registers a range of a buffer with the card, by the best rung that works. `length` may be PEERBUF_ANY.
/// `remote` is the access allowed to the peer: 0, or an access. `report` gets the path and the reason against
/// each better one; it may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_register(
    domain: *const Domain,
    buffer: *const Buffer,
    offset: u64,
    length: u64,
    remote: u32,
    registration: Option<&mut MaybeUninit<*mut Registration>>,
    report: Option<&mut MaybeUninit<*mut Report>>,
) -> Code {
    let mut said = None;
    let code = make(registration, || {
        let (domain, buffer) = (get(domain)?, get(buffer)?);
        let remote = match remote {
            0 => None,
            remote => Some(access(remote)?),
        };
        let registration = domain.0.register(&buffer.range(offset, length)?, remote)?;
        said = Some(Report::plan(registration.plan()));
        Ok(Registration(registration))
    });
    if let Some(report) = report {
        report.write(said.map_or(ptr::null_mut(), handle::keep));
    }
    code
}

/// Returns the arguments for work requests.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_registration_get(
    registration: *const Registration,
    info: Option<&mut MaybeUninit<RegistrationInfo>>,
) -> Code {
    use peerbuf_rdma::Rung;
    run(|| {
        let registration = get(registration)?;
        let registered = &registration.0;
        registered.check()?;
        let rung = match registered.rung() {
            Rung::DmaBufByLibrary => c"dma-buf-by-library",
            Rung::DmaBufByKernel => c"dma-buf-by-kernel",
            Rung::SharedMemory => c"shared-memory",
            Rung::Staged => c"staged",
            _ => c"unknown",
        };
        place("what it is", info)?.write(RegistrationInfo {
            address: registered.offset(),
            length: registered.len(),
            lkey: registered.lkey(),
            rkey: registered.rkey(),
            rung: rung.as_ptr(),
            mr: registered.as_raw().map_or(ptr::null_mut(), NonNull::as_ptr),
        });
        Ok(())
    })
}

/// Makes a range of the buffer visible to the card; to call before work that reads it. Copies only for
/// `staged`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_registration_refresh(
    registration: *const Registration,
    offset: u64,
    length: u64,
) -> Code {
    run(|| Ok(get(registration)?.0.refresh(offset, length).map(drop)?))
}

/// Makes the card's writes visible in the buffer; to call after that work. Copies only for `staged`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_registration_deliver(
    registration: *const Registration,
    offset: u64,
    length: u64,
) -> Code {
    run(|| Ok(get(registration)?.0.deliver(offset, length).map(drop)?))
}

/// Deregisters the range and frees the registration. Work in flight fails. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_registration_free(registration: *mut Registration) -> Code {
    run(|| free(registration))
}
