//! A stand-in for a provider: records the calls and their order, and refuses to close regions on request. The
//! lab has tests with libfabric's own providers.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Mutex;

use super::abi::{Domain as RawDomain, Fid, Mr, MrAttr, MrOps, Ops};
use super::{MR_ENDPOINT, MR_RAW, MR_VIRT_ADDR};
use crate::error::RdmaError;
use crate::libfabric::{Domain, Opened, Registration, Rung};
use peerbuf::buffer::{Access, Buffer};
use peerbuf::export::memfd;

#[repr(C)]
struct Provider {
    domain: RawDomain,
    asked: Mutex<Vec<String>>,
    enable: c_int,
    close: c_int,
}

#[repr(C)]
struct Region {
    mr: Mr,
    provider: *const Provider,
}

static REGION: Ops = Ops {
    size: size_of::<Ops>(),
    close,
    bind,
    control,
};

static REGIONS: MrOps = MrOps {
    size: size_of::<MrOps>(),
    reg: ptr::null(),
    regv: ptr::null(),
    regattr,
};

// SAFETY: the pointers in the tables are null or constant functions.
unsafe impl Sync for MrOps {}

fn asked(region: *mut Fid, what: &str) -> &'static Provider {
    // SAFETY: `regattr` made the region; its provider outlives it in each test.
    let provider = unsafe { &*(*region.cast::<Region>()).provider };
    provider.asked.lock().unwrap().push(what.to_owned());
    provider
}

unsafe extern "C" fn regattr(
    domain: *mut Fid,
    attributes: *const MrAttr,
    flags: u64,
    mr: *mut *mut Mr,
) -> c_int {
    let provider = domain.cast::<Provider>();
    // SAFETY: this crate calls it with valid pointers.
    unsafe {
        let MrAttr {
            requested_key,
            access,
            ..
        } = *attributes;
        let text = format!("register {requested_key} {access:#x} {flags}");
        (*provider).asked.lock().unwrap().push(text);
        let region = Region {
            mr: Mr {
                fid: Fid {
                    fclass: 12,
                    context: ptr::null_mut(),
                    ops: &REGION,
                },
                mem_desc: ptr::without_provenance_mut(0x77),
                key: requested_key,
            },
            provider,
        };
        *mr = Box::into_raw(Box::new(region)).cast();
    }
    0
}

unsafe extern "C" fn bind(region: *mut Fid, endpoint: *mut Fid, _: u64) -> c_int {
    asked(region, &format!("bind {}", endpoint.addr()));
    0
}

unsafe extern "C" fn control(region: *mut Fid, command: c_int, _: *mut c_void) -> c_int {
    asked(region, &format!("control {command}")).enable
}

unsafe extern "C" fn close(region: *mut Fid) -> c_int {
    let status = asked(region, "close").close;
    if status == 0 {
        // SAFETY: `Box::into_raw` made the pointer, which is not used again.
        drop(unsafe { Box::from_raw(region.cast::<Region>()) });
    }
    status
}

/// A provider, and its domain opened with these modes. It lives until the process ends, as do regions that it
/// does not close.
fn provider(mr_mode: u64, enable: c_int, close: c_int) -> (&'static Provider, Domain) {
    let provider = Box::leak(Box::new(Provider {
        domain: RawDomain {
            fid: Fid {
                fclass: 2,
                context: ptr::null_mut(),
                ops: ptr::null(),
            },
            ops: ptr::null(),
            mr: &REGIONS,
        },
        asked: Mutex::default(),
        enable,
        close,
    }));
    let provider = ptr::from_mut(provider);
    let opened = Opened {
        provider: "made up".into(),
        api_version: 2 << 16,
        mr_mode,
    };
    // SAFETY: it is never closed, has only regions, and does no work on them.
    unsafe {
        let domain = Domain::from_raw(provider.cast(), opened).unwrap();
        (&*provider, domain)
    }
}

fn registered(domain: &Domain, buffer: &Buffer) -> Registration {
    let range = buffer.range(100, 1000).unwrap();
    domain.register(&range, Some(Access::Read), 9).unwrap()
}

#[test]
fn a_registration_may_go_from_thread_to_thread() {
    fn check<T: Send + Sync>() {}
    check::<Registration>();
    check::<Domain>();
}

#[test]
#[cfg_attr(miri, ignore = "a system call that Miri does not have")]
fn regions_have_the_key_the_access_and_the_address_that_the_domain_says() {
    let buffer = memfd::export("test", 4096).unwrap();
    let (asked, domain) = provider(0, 0, 0);
    let registration = registered(&domain, &buffer);
    assert_eq!(registration.rung(), Rung::SharedMemory);
    let remote = registration.remote(3, 5).unwrap();
    assert_eq!((remote.address, remote.length, remote.key), (3, 5, 9));
    let local = registration.local(3, 5).unwrap();
    assert_eq!(local.length, 5);
    assert_eq!(local.descriptor.addr(), 0x77);
    drop(registration);
    // FI_SEND, FI_WRITE, FI_RECV, FI_READ and FI_REMOTE_READ; the buffer has no dma-buf.
    assert_eq!(
        *asked.asked.lock().unwrap(),
        ["register 9 0x1f00 0", "close"]
    );
    assert_eq!(buffer.handles(), 1);

    let (_, domain) = provider(MR_VIRT_ADDR, 0, 0);
    let registration = registered(&domain, &buffer);
    let (local, remote) = (registration.local(3, 5), registration.remote(3, 5));
    assert_eq!(
        local.unwrap().pointer.addr() as u64,
        remote.unwrap().address
    );
}

#[test]
#[cfg_attr(miri, ignore = "a system call that Miri does not have")]
fn a_forked_child_closes_no_region_of_its_parent_and_makes_none() {
    let buffer = memfd::export("test", 4096).unwrap();
    let (asked, domain) = provider(0, 0, 0);
    let registration = registered(&domain, &buffer);
    let range = buffer.whole();
    // SAFETY: the child ends by `_exit`, and takes no lock that another thread of this process has.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let refused = domain.register(&range, None, 9);
            let is_refused = matches!(refused, Err(RdmaError::Inherited { .. }));
            drop(registration);
            let calls = asked.asked.lock().unwrap().len();
            // SAFETY: ends the process and nothing else.
            unsafe { nix::libc::_exit(i32::from(!is_refused || calls != 1)) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    drop(registration);
    let asked = asked.asked.lock().unwrap();
    assert_eq!(*asked, ["register 9 0x1f00 0", "close"]);
}

#[test]
#[cfg_attr(miri, ignore = "a system call that Miri does not have")]
fn where_regions_are_an_endpoints_they_are_bound_and_enabled_first() {
    let buffer = memfd::export("test", 4096).unwrap();
    let (asked, domain) = provider(MR_ENDPOINT, 0, 0);
    let without = domain.register(&buffer.whole(), None, 9);
    assert!(matches!(without, Err(RdmaError::Mismatch { .. })));
    // SAFETY: the stand-in does not use the endpoint.
    let domain = unsafe { domain.for_endpoint(ptr::without_provenance_mut(64)) };
    drop(registered(&domain, &buffer));
    assert_eq!(
        *asked.asked.lock().unwrap(),
        ["register 9 0x1f00 0", "bind 64", "control 6", "close"]
    );

    // On every rung, a region that cannot be enabled is closed and is no registration.
    let (asked, domain) = provider(MR_ENDPOINT, -22, 0);
    // SAFETY: the stand-in does not use the endpoint.
    let domain = unsafe { domain.for_endpoint(ptr::without_provenance_mut(64)) };
    let refused = domain.register(&buffer.whole(), None, 9).unwrap_err();
    assert!(refused.to_string().contains("EINVAL"), "{refused}");
    let asked = asked.asked.lock().unwrap();
    assert_eq!(asked.iter().filter(|what| *what == "close").count(), 2);
    assert_eq!(buffer.handles(), 1);
}

#[test]
#[cfg_attr(miri, ignore = "a system call that Miri does not have")]
fn keys_that_are_no_numbers_are_refused_for_peers_only() {
    let buffer = memfd::export("test", 4096).unwrap();
    let (_, domain) = provider(MR_RAW, 0, 0);
    let refused = domain.register(&buffer.whole(), Some(Access::Read), 9);
    assert!(matches!(refused, Err(RdmaError::Mismatch { .. })));
    let own = domain.register(&buffer.whole(), None, 9).unwrap();
    own.local(0, 4096).unwrap();
    assert!(matches!(own.remote(0, 1), Err(RdmaError::NotShared { .. })));
}

#[test]
#[cfg_attr(miri, ignore = "a system call that Miri does not have")]
fn memory_that_a_provider_does_not_let_go_of_stays() {
    let buffer = memfd::export("test", 4096).unwrap();
    buffer.whole().write_bytes(b"here").unwrap();
    let (_, domain) = provider(0, 0, -16);
    let registration = domain.register(&buffer.whole(), None, 9).unwrap();
    let at = registration.local(0, 4).unwrap().pointer.cast::<[u8; 4]>();
    drop(registration);
    assert!(buffer.handles() > 1);
    // SAFETY: still mapped, which is what the test checks.
    assert_eq!(&unsafe { at.read_volatile() }, b"here");
}
