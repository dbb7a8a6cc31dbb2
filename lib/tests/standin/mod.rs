//! Stand-ins for the libraries of GPU runtimes, compiled here and loaded into this process
//! under the runtimes' names.
//!
//! A stand-in has no GPU. Its answers follow the runtime's documentation and reported
//! behaviour, case by case. The tests therefore cover peerbuf's calls and its conclusions from
//! the answers, not the runtime.

use std::ffi::{CString, c_char, c_int, c_long};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use libloading::Library;

const COMMON: &str = include_str!("standin.h");

/// The source of a stand-in, and the library's name for the loader.
pub struct Source {
    text: &'static str,
    soname: &'static str,
}

/// The stand-ins' state is global in a process, so a test holds this lock.
static LOCK: Mutex<()> = Mutex::new(());

pub const HSA: Source = Source {
    text: include_str!("hsa.c"),
    soname: "libhsa-runtime64.so.1",
};

pub const LEVEL_ZERO: Source = Source {
    text: include_str!("level_zero.c"),
    soname: "libze_loader.so.1",
};

pub const CUDA: Source = Source {
    text: include_str!("cuda.c"),
    soname: "libcuda.so.1",
};

/// A loaded stand-in.
pub struct StandIn {
    library: Library,
}

/// A stand-in held by a test, with the initial settings.
pub struct Held {
    standin: &'static StandIn,
    _lock: MutexGuard<'static, ()>,
}

impl Source {
    /// Compiles the source into a directory. Fails without a C compiler.
    pub fn compile(
        &self,
        directory: &Path,
        defines: &[&str],
    ) -> Result<std::path::PathBuf, String> {
        let [header, source, made] =
            ["standin.h", "standin.c", self.soname].map(|name| directory.join(name));
        std::fs::write(header, COMMON).unwrap();
        std::fs::write(&source, self.text).unwrap();
        let mut missing = String::new();
        for compiler in ["cc", "gcc", "gcc-14"] {
            let output = Command::new(compiler)
                .args([
                    "-std=gnu11",
                    "-O1",
                    "-Wall",
                    "-Wextra",
                    "-Werror",
                    "-fvisibility=hidden",
                ])
                .args(["-shared", "-fPIC", "-pthread"])
                .args(defines)
                .arg(format!("-Wl,-soname,{}", self.soname))
                .arg("-o")
                .args([&made, &source])
                .output();
            match output {
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stderr);
                    assert!(output.status.success(), "{compiler}: {said}");
                    return Ok(made);
                }
                Err(error) => missing = format!("no {compiler}: {error}"),
            }
        }
        Err(missing)
    }

    /// Compiles and loads the stand-in. From then on the loader finds it under the runtime's
    /// name.
    pub fn load(&self, defines: &[&str]) -> Result<StandIn, String> {
        let directory = tempfile::tempdir().unwrap();
        let file = self.compile(directory.path(), defines)?;
        // SAFETY: the library was compiled from the source in this directory, and has no
        // initialisers.
        let library = unsafe { Library::new(file) }.unwrap();
        Ok(StandIn { library })
    }
}

impl StandIn {
    pub fn hold(&'static self) -> Held {
        let lock = LOCK.lock();
        let held = Held {
            standin: self,
            _lock: lock.unwrap_or_else(std::sync::PoisonError::into_inner),
        };
        // SAFETY: the source gives the function this type.
        unsafe { held.function::<unsafe extern "C" fn()>("standin_reset")() };
        held
    }
}

impl Held {
    /// # Safety
    /// `T` is the function's type.
    unsafe fn function<T: Copy>(&self, name: &str) -> T {
        // SAFETY: the caller guarantees the type.
        *unsafe { self.standin.library.get(name.as_bytes()) }.unwrap()
    }

    pub fn set(&self, name: &str, value: i64) {
        let name = CString::new(name).unwrap();
        type Set = unsafe extern "C" fn(*const c_char, c_long);
        // SAFETY: the source gives the function this type, and the function takes a C string.
        unsafe { self.function::<Set>("standin_set")(name.as_ptr(), value) };
    }

    pub fn get(&self, name: &str) -> i64 {
        let name = CString::new(name).unwrap();
        type Get = unsafe extern "C" fn(*const c_char) -> c_long;
        // SAFETY: the source gives the function this type, and the function takes a C string.
        unsafe { self.function::<Get>("standin_get")(name.as_ptr()) }
    }

    /// Memory of one segment, or of several segments of `size` bytes each.
    pub fn allocate(&self, size: u64, segments: i32, kind: i32, device: i32) -> u64 {
        type Allocate = unsafe extern "C" fn(u64, c_int, c_int, c_int) -> u64;
        // SAFETY: the source gives the function this type.
        let allocate: Allocate = unsafe { self.function("standin_allocate") };
        // SAFETY: the function takes numbers.
        let at = unsafe { allocate(size, segments, kind, device) };
        assert_ne!(at, 0);
        at
    }

    pub fn unmap(&self, address: u64) {
        // SAFETY: the source gives the function this type, and the function takes a number.
        unsafe { self.function::<unsafe extern "C" fn(u64)>("standin_unmap")(address) };
    }

    pub fn move_to(&self, address: u64, device: i32) {
        // SAFETY: the source gives the function this type, and the function takes numbers.
        unsafe {
            self.function::<unsafe extern "C" fn(u64, c_int)>("standin_move")(address, device)
        };
    }

    pub fn free(&self, base: u64) -> bool {
        // SAFETY: the source gives the function this type, and the function takes a number.
        unsafe { self.function::<unsafe extern "C" fn(u64) -> c_int>("standin_free")(base) != 0 }
    }
}

/// The bytes in a stand-in's memory, which is mapped in this process.
pub fn bytes_at(address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let at: *const u8 = std::ptr::with_exposed_provenance(address as usize);
    // SAFETY: the tests pass memory that the stand-in has mapped and that nobody writes
    // meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), length) };
    bytes
}

/// Writes bytes to a stand-in's memory.
pub fn put_at(address: u64, bytes: &[u8]) {
    let at: *mut u8 = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the tests pass memory that the stand-in has mapped and that nobody else uses
    // meanwhile.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
}
