//! The libfabric engine in `fixtures/fabric/engine.c`, compiled in the guest, and buffers registered in its
//! domain.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;
use peerbuf::export::{heap, memfd, udmabuf};
use peerbuf::{Buffer, BufferRange, Errno};
use peerbuf_rdma::libfabric::{Domain, Local, Opened, RUNGS, Registration, Remote, Rung};

use crate::bytes::{get, put};
use crate::rdma::{ALL, bar, random};

/// The providers that work in the guest.
pub const PROVIDERS: [&str; 3] = ["tcp", "verbs;ofi_rxm", "verbs"];
/// `FI_VERSION(1, 20)`, the first version with dma-bufs.
pub const VERSION: u32 = 1 << 16 | 20;

/// The guest's address.
const ADDRESS: &CStr = c"10.0.2.15";
const SOURCE: &str = include_str!("../fixtures/fabric/engine.c");
/// The function that librxe lacks. Compiled into the engine, it takes precedence over libibverbs's own.
const LIBRXE: &str = include_str!("../fixtures/preload/reg_dmabuf_mr.c");

static WITH_LIBRXE: OnceLock<bool> = OnceLock::new();

/// Adds the function that librxe lacks for dma-buf registrations to the engine. Every test of a program must
/// call it before anything else in this module.
///
/// # Panics
///
/// If the engine was already made without it.
pub fn as_if_librxe_took_dma_bufs() {
    assert!(WITH_LIBRXE.get_or_init(|| true), "too late");
}

type Open = unsafe extern "C" fn(*const c_char, *const c_char, u32, u64, *mut *mut c_void) -> c_int;
type Rma = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    *mut c_void,
    usize,
    *mut c_void,
    u64,
    u64,
) -> c_int;
type Send = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    *mut c_void,
    usize,
    *mut c_void,
    *mut c_void,
    *mut c_void,
) -> c_int;

/// The engine's functions.
struct Functions {
    open: Open,
    close: unsafe extern "C" fn(*mut c_void) -> c_int,
    rma: Rma,
    send: Send,
    call: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    domain: unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    endpoint: unsafe extern "C" fn(*mut c_void, c_int) -> *mut c_void,
    provider: unsafe extern "C" fn(*mut c_void) -> *const c_char,
    api_version: unsafe extern "C" fn(*mut c_void) -> u32,
    mr_mode: unsafe extern "C" fn(*mut c_void) -> u64,
    library: unsafe extern "C" fn() -> u32,
    layout: unsafe extern "C" fn() -> *const c_char,
}

fn functions() -> &'static Functions {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    FUNCTIONS.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let [engine, librxe, made] =
            ["engine.c", "librxe.c", "engine.so"].map(|name| directory.path().join(name));
        std::fs::write(&engine, SOURCE).unwrap();
        let with_librxe = *WITH_LIBRXE.get_or_init(|| false);
        std::fs::write(&librxe, if with_librxe { LIBRXE } else { "" }).unwrap();
        let output = Command::new("gcc-14")
            .args(["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"])
            .args(["-DWITHOUT_ATOMICS", "-o"])
            .args([&made, &engine, &librxe])
            .args(["-lfabric", "-libverbs"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "gcc-14: {said}");
        // SAFETY: the library was made from the source above, and has no initialisers.
        let library: &'static Library =
            Box::leak(Box::new(unsafe { Library::new(&made) }.unwrap()));
        macro_rules! symbols {
            ($($name:ident)*) => {
                // SAFETY: the functions have these types there.
                unsafe { Functions {
                    $($name: *library
                        .get(concat!("engine_", stringify!($name)).as_bytes())
                        .unwrap(),)*
                } }
            };
        }
        symbols!(open close rma send call domain endpoint provider api_version mr_mode library layout)
    })
}

/// The library's version, major and minor.
pub fn library() -> (u32, u32) {
    // SAFETY: the function has no arguments.
    let version = unsafe { (functions().library)() };
    (version >> 16, version & 0xffff)
}

/// The header's field offsets and constants: one line `NAME NUMBER` each.
pub fn layout() -> &'static str {
    // SAFETY: the function returns a constant string.
    let text = unsafe { CStr::from_ptr((functions().layout)()) };
    text.to_str().unwrap()
}

/// A failed call of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// The libfabric function, or the awaited event.
    pub call: String,
    /// The error number.
    pub errno: Errno,
}

/// A domain with two endpoints connected to each other.
pub struct Engine {
    raw: *mut c_void,
}

impl Engine {
    /// Opens an engine. `caps` are requested in addition to messages and RMA.
    ///
    /// # Errors
    ///
    /// The failed call.
    pub fn open(provider: &str, version: u32, caps: u64) -> Result<Engine, Failed> {
        let provider = CString::new(provider).unwrap();
        let mut raw = std::ptr::null_mut();
        // SAFETY: the strings live during the call, and the output has room for the result.
        let status = unsafe {
            (functions().open)(provider.as_ptr(), ADDRESS.as_ptr(), version, caps, &mut raw)
        };
        assert!(!raw.is_null());
        let engine = Engine { raw };
        match engine.check(status) {
            Ok(()) => Ok(engine),
            Err(failed) => {
                engine.close();
                Err(failed)
            }
        }
    }

    fn check(&self, status: c_int) -> Result<(), Failed> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the engine exists, and returns a constant string.
        let call = unsafe { CStr::from_ptr((functions().call)(self.raw)) };
        Err(Failed {
            call: call.to_str().unwrap().to_owned(),
            errno: Errno(-status),
        })
    }

    /// The facts in the engine's `fi_info`.
    pub fn opened(&self) -> Opened {
        let functions = functions();
        // SAFETY: the engine and its `fi_info` exist.
        unsafe {
            Opened {
                provider: CStr::from_ptr((functions.provider)(self.raw))
                    .to_str()
                    .unwrap()
                    .to_owned(),
                api_version: (functions.api_version)(self.raw),
                mr_mode: (functions.mr_mode)(self.raw),
            }
        }
    }

    /// The engine's domain, wrapped for peerbuf.
    ///
    /// # Panics
    ///
    /// If peerbuf refuses the domain.
    pub fn domain(&self) -> Domain {
        // SAFETY: tests drop everything made from the domain before they close the engine. The
        // engine acts only when called, and one thread makes all calls.
        unsafe { Domain::from_raw((functions().domain)(self.raw), self.opened()) }.unwrap()
    }

    /// An endpoint, as an object that is not a domain.
    pub fn endpoint(&self) -> *mut c_void {
        // SAFETY: the engine exists.
        unsafe { (functions().endpoint)(self.raw, 0) }
    }

    /// Endpoint `at` writes to the other endpoint's memory, and waits.
    ///
    /// # Errors
    ///
    /// The failed call, or the failed completion.
    pub fn write(&self, at: usize, from: Local, to: Remote) -> Result<(), Failed> {
        self.rma(at, false, from, to)
    }

    /// Endpoint `at` reads from the other endpoint's memory, and waits.
    ///
    /// # Errors
    ///
    /// As [`Engine::write`].
    pub fn read(&self, at: usize, into: Local, from: Remote) -> Result<(), Failed> {
        self.rma(at, true, into, from)
    }

    fn rma(&self, at: usize, read: bool, here: Local, there: Remote) -> Result<(), Failed> {
        // SAFETY: the registrations live until the call returns, and nothing is in flight then.
        self.check(unsafe {
            (functions().rma)(
                self.raw,
                at as c_int,
                c_int::from(read),
                here.pointer,
                here.length,
                here.descriptor,
                there.address,
                there.key,
            )
        })
    }

    /// Endpoint `at` sends to the other endpoint, and waits for both.
    ///
    /// # Errors
    ///
    /// As [`Engine::write`].
    pub fn send(&self, at: usize, from: Local, to: Local) -> Result<(), Failed> {
        assert_eq!(from.length, to.length);
        // SAFETY: the registrations live until the call returns, and nothing is in flight then.
        self.check(unsafe {
            (functions().send)(
                self.raw,
                at as c_int,
                from.pointer,
                from.length,
                from.descriptor,
                to.pointer,
                to.descriptor,
            )
        })
    }

    /// Closes the engine, after everything made from its domain was dropped. Returns an object's close error:
    /// a domain with regions is busy.
    pub fn close(self) -> Option<Errno> {
        // SAFETY: the engine is not used again.
        let status = unsafe { (functions().close)(self.raw) };
        (status != 0).then_some(Errno(-status))
    }
}

/// The key for a test's registration, with providers that let the caller choose.
pub const KEY: u64 = 0x1001;
/// The key for the other registration of a test.
pub const OTHER_KEY: u64 = 0x1002;

/// A buffer of each kind.
///
/// # Panics
///
/// If one cannot be made.
pub fn buffers(size: u64) -> Vec<(&'static str, Buffer)> {
    let heap = heap::Heap::open("system").unwrap();
    vec![
        ("memfd", memfd::export("memfd", size).unwrap()),
        ("udmabuf", udmabuf::export("udmabuf", size).unwrap()),
        ("heap", heap.export("heap", size).unwrap()),
        ("bar", bar(size)),
    ]
}

/// A registered range, with its surroundings in the buffer.
pub struct Under {
    /// The registration of the range.
    pub registration: Registration,
    /// The registered range.
    pub range: BufferRange,
    /// The range with the bytes around it.
    pub around: BufferRange,
}

/// Writes to, reads from, sends to and sends from a registration, and checks each byte, also those around the
/// range.
///
/// # Panics
///
/// If a byte is wrong, or libfabric failed.
pub fn exercise(engine: &Engine, domain: &Domain, under: &Under) {
    let Under {
        registration,
        range,
        around,
    } = under;
    let (length, lead) = (range.len(), range.offset() - around.offset());
    let what = |step: &str| {
        let provider = &domain.opened().provider;
        format!("{provider}, {registration:?}, {step}")
    };
    let done = |step: &str, result: Result<(), Failed>| {
        assert_eq!(result, Ok(()), "{}", what(step));
    };
    let bytes = |seed| random(length, seed);
    let other = memfd::export("other end", length).unwrap().whole();
    let mine = domain.register(&other, ALL, OTHER_KEY).unwrap();
    assert_eq!(mine.rung(), Rung::SharedMemory);
    let staged = match registration.rung() {
        Rung::Staged => length,
        _ => 0,
    };
    let canary = random(around.len(), 77);
    let arrived = |seed: u64, step: &str| {
        assert_eq!(registration.deliver(0, length).unwrap(), staged);
        let mut expected = canary.clone();
        expected[lead as usize..][..length as usize].copy_from_slice(&bytes(seed));
        let got = get(around);
        let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{}: first wrong byte", what(step));
    };
    let there = || mine.local(0, length).unwrap();
    let here = || registration.local(0, length).unwrap();
    put(around, &canary);
    registration.refresh(0, length).unwrap();

    put(&other, &bytes(1));
    let shown = registration.remote(0, length).unwrap();
    done("write", engine.write(0, there(), shown));
    arrived(1, "written to");
    put(range, &bytes(2));
    assert_eq!(registration.refresh(0, length).unwrap(), staged);
    done("read", engine.read(0, there(), shown));
    assert!(get(&other) == bytes(2), "{}", what("read from"));

    put(&other, &bytes(3));
    done("send to", engine.send(0, there(), here()));
    arrived(3, "sent to");
    put(range, &bytes(4));
    registration.refresh(0, length).unwrap();
    done("send from", engine.send(1, here(), there()));
    assert!(get(&other) == bytes(4), "{}", what("sent from"));

    let shown = mine.remote(0, length).unwrap();
    put(range, &bytes(5));
    registration.refresh(0, length).unwrap();
    done("write from", engine.write(1, here(), shown));
    assert!(get(&other) == bytes(5), "{}", what("written from"));
    put(&other, &bytes(6));
    done("read into", engine.read(1, here(), shown));
    arrived(6, "read into");

    // A part short enough for the provider to copy it.
    let part = length.min(100);
    let at = length - part;
    put(&other, &bytes(7));
    let mut both = bytes(6);
    both[at as usize..].copy_from_slice(&bytes(7)[at as usize..]);
    let shown = registration.remote(at, part).unwrap();
    let piece = mine.local(at, part).unwrap();
    done("write a part", engine.write(0, piece, shown));
    registration.deliver(at, part).unwrap();
    assert!(get(range) == both, "{}", what("a part written to"));
}

/// Registers a buffer of each kind by each rung, with an engine on a provider, and [`exercise`]s each
/// registration. `works` returns the rungs that must work for a kind.
///
/// # Panics
///
/// If other rungs work, or a byte is wrong.
pub fn exercise_each_rung(provider: &str, works: impl Fn(&str) -> Vec<Rung>) {
    let engine = Engine::open(provider, VERSION, 0).expect(provider);
    let domain = engine.domain();
    for (kind, buffer) in buffers(256 << 10) {
        for rung in RUNGS {
            let whole = buffer.whole();
            let result = domain.register_by(&whole, ALL, KEY, &[rung]);
            let right = result.is_ok() == works(kind).contains(&rung);
            assert!(right, "{provider}, {kind}: {result:?}");
            let Ok(registration) = result else { continue };
            assert_eq!(registration.rung(), rung);
            let under = Under {
                registration,
                range: whole.clone(),
                around: whole,
            };
            exercise(&engine, &domain, &under);
        }
    }
    drop(domain);
    assert_eq!(engine.close(), None, "{provider}");
}

/// Like [`exercise_each_rung`], with ranges that begin and end at, before and after a page
/// boundary.
///
/// # Panics
///
/// As [`exercise_each_rung`].
pub fn exercise_edges(provider: &str, works: impl Fn(&str) -> Vec<Rung>) {
    let engine = Engine::open(provider, VERSION, 0).expect(provider);
    let domain = engine.domain();
    for (kind, buffer) in buffers(32 << 10) {
        for rung in works(kind) {
            for (offset, length) in [(0, 1), (1, 4095), (4095, 2), (4096, 4096), (12287, 8194)] {
                let range = buffer.range(offset, length).unwrap();
                let registration = domain.register_by(&range, ALL, KEY, &[rung]).unwrap();
                let under = Under {
                    registration,
                    range,
                    around: buffer.whole(),
                };
                exercise(&engine, &domain, &under);
            }
        }
    }
    drop(domain);
    assert_eq!(engine.close(), None, "{provider}");
}

/// The result of a provider for each kind of buffer, and the errors of the better rungs: the lines of the
/// table in docs/libfabric.md.
///
/// # Panics
///
/// If a kind cannot be registered at all.
pub fn table(provider: &str) -> String {
    let engine = Engine::open(provider, VERSION, 0).expect(provider);
    let domain = engine.domain();
    let mut lines = String::new();
    for (kind, buffer) in buffers(64 << 10) {
        let registration = domain.register(&buffer.whole(), ALL, KEY).unwrap();
        let refused: Vec<String> = registration
            .attempts()
            .iter()
            .map(|attempt| {
                let answer = match attempt.errno.and_then(Errno::name) {
                    Some(name) => format!("{name}, "),
                    None => String::new(),
                };
                let code = attempt.code;
                format!("`{}`: {answer}{} (`{code}`)", attempt.rung, attempt.layer)
            })
            .collect();
        let refused = refused.join("; ");
        let rung = registration.rung();
        lines += &format!("| `{provider}` | {kind} | `{rung}` | {refused} |\n");
    }
    drop(domain);
    assert_eq!(engine.close(), None, "{provider}");
    lines
}
