//! The least that reads: system calls, and a C program's loop on liburing.

use std::ffi::{c_char, c_int, c_uint, c_ulong, c_void};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;
use peerbuf::Access;
use peerbuf::buffer::Mapping;
use peerbuf::export::memfd;

/// Memory of the same kind as the buffers have that it is compared with.
pub struct Memory {
    mapping: Mapping,
    length: u64,
}

impl Memory {
    pub fn new(length: u64) -> Memory {
        let buffer = memfd::export("memory", length).unwrap();
        let zeros = vec![0; length as usize];
        buffer.whole().write_bytes(&zeros).unwrap();
        let mapping = buffer.whole().map(Access::ReadWrite).unwrap();
        Memory { mapping, length }
    }

    /// Fills all of it by one call.
    pub fn pread(&self, file: &File, offset: u64) {
        let (fd, length) = (file.as_raw_fd(), self.length as usize);
        // SAFETY: the mapping has so many bytes, and nobody has a reference to them.
        let read = unsafe { libc::pread(fd, self.mapping.as_ptr().cast(), length, offset as i64) };
        assert_eq!(read, length as isize);
    }
}

type Run = unsafe extern "C" fn(
    *mut c_void,
    c_uint,
    c_int,
    *mut c_char,
    c_ulong,
    c_uint,
    *const c_ulong,
    c_ulong,
) -> c_int;

/// The functions of `reads.c`.
struct Reads {
    open: unsafe extern "C" fn(c_uint) -> *mut c_void,
    close: unsafe extern "C" fn(*mut c_void),
    run: Run,
}

/// Compiles them.
fn reads() -> &'static Reads {
    static READS: OnceLock<Reads> = OnceLock::new();
    READS.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let [source, made] = ["reads.c", "reads.so"].map(|name| directory.path().join(name));
        std::fs::write(&source, include_str!("reads.c")).unwrap();
        let output = Command::new("gcc-14")
            .args([
                "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o",
            ])
            .args([&made, &source])
            .arg("-luring")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "gcc-14: {said}");
        // SAFETY: the library was made from the source above, and has no initialisers.
        let library: &'static Library =
            Box::leak(Box::new(unsafe { Library::new(&made) }.unwrap()));
        // SAFETY: the functions have these types there.
        unsafe {
            Reads {
                open: *library.get(b"reads_open").unwrap(),
                close: *library.get(b"reads_close").unwrap(),
                run: *library.get(b"reads_run").unwrap(),
            }
        }
    })
}

/// A ring for so many requests at a time.
pub struct Bare {
    ring: *mut c_void,
    depth: u32,
}

impl Bare {
    pub fn new(depth: u32) -> Bare {
        // SAFETY: it takes any number.
        let ring = unsafe { (reads().open)(depth) };
        assert!(!ring.is_null(), "io_uring_queue_init_params");
        Bare { ring, depth }
    }

    /// Reads pieces to one place in memory after the other.
    pub fn read(&mut self, file: &File, memory: &Memory, length: u64, places: &[u64]) {
        // SAFETY: the mapping has as many parts of this length, nobody has a reference to them, and all answers
        // are there when it returns.
        let result = unsafe {
            (reads().run)(
                self.ring,
                self.depth,
                file.as_raw_fd(),
                memory.mapping.as_ptr().cast(),
                memory.length / length,
                length as u32,
                places.as_ptr(),
                places.len() as u64,
            )
        };
        assert_eq!(result, 0, "a read of {length} bytes");
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // SAFETY: nothing is in flight, and nobody uses it any more.
        unsafe { (reads().close)(self.ring) }
    }
}
