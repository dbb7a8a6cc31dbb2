//! The libraries of GPU runtimes. They are opened at run time, never linked, and never closed,
//! because they start threads and register handlers.
//!
//! Each runtime has its own error numbers. A failed call becomes a [`Failed`] with the
//! function's name.

pub(crate) mod cuda;
pub(crate) mod hsa;
pub(crate) mod level_zero;

use std::ffi::CStr;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use super::given::Given;
use crate::buffer::Mapping;

/// A failed function of a runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) call: &'static str,
    /// The runtime's error number.
    pub(crate) code: i32,
    /// The number's name, if the runtime has one.
    pub(crate) name: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name.as_str() {
            "" => write!(f, "error {}", self.code),
            name => write!(f, "{name} ({})", self.code),
        }
    }
}

impl std::error::Error for Failed {}

/// GPU memory whose lifetime a caller guarantees.
///
/// # Invariants
/// The allocation that contains these bytes stays until this value and its copies are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub(crate) pointer: u64,
    pub(crate) length: u64,
}

impl Allocated {
    /// # Safety
    /// If `pointer` is an address of one of the runtimes, the allocation with `length` bytes at
    /// this address stays until the value, its copies, and everything made from them are
    /// dropped.
    pub(crate) unsafe fn at(pointer: u64, length: u64) -> Allocated {
        // INVARIANT: the caller guarantees that the allocation stays.
        Allocated { pointer, length }
    }

    /// The same memory with neighbouring bytes: runtimes map and export whole pages or
    /// allocations.
    pub(crate) fn widened(self, before: u64, after: u64) -> Allocated {
        // INVARIANT: the pages of an allocation stay as long as the allocation.
        Allocated {
            pointer: self.pointer - before,
            length: self.length + before + after,
        }
    }

    /// A part of the memory.
    ///
    /// # Panics
    /// If the part exceeds the memory.
    pub(crate) fn part(self, offset: u64, length: u64) -> Allocated {
        let end = offset.checked_add(length);
        assert!(end.is_some_and(|end| end <= self.length), "outside");
        // INVARIANT: the whole memory stays, and so does its part.
        Allocated {
            pointer: self.pointer + offset,
            length,
        }
    }

    /// The address of `length` bytes at `offset`.
    ///
    /// # Panics
    /// If the range exceeds the memory.
    fn address(self, offset: u64, length: usize) -> u64 {
        let end = offset.checked_add(length as u64);
        assert!(end.is_some_and(|end| end <= self.length), "outside");
        self.pointer + offset
    }
}

/// A device of a runtime, which imports buffers that others made.
pub(crate) trait Imports: Send + Sync {
    /// Imports a dma-buf of so many bytes. The runtime is given the descriptor.
    fn dmabuf(&self, dmabuf: Given, size: u64) -> Result<Box<dyn Reached>, Failed>;

    /// Has the device reach what this process has mapped. `is_io` for memory in a BAR, which has to stay where it is.
    fn mapped(&self, mapping: Mapping, is_io: bool) -> Result<Box<dyn Reached>, Failed>;

    /// Whether the refusal is the same the next time, for a buffer of the same exporter.
    fn is_final(&self, failed: &Failed) -> bool;
}

/// A buffer that a device reaches, until this is dropped.
pub(crate) trait Reached: Send + Sync {
    /// The bytes, as the device has them.
    fn memory(&self) -> Allocated;

    /// Has the runtime copy bytes into it. They are there when it returns.
    ///
    /// # Panics
    /// When they are not all inside.
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed>;

    /// Has the runtime copy bytes out of it.
    ///
    /// # Panics
    /// When they are not all inside.
    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed>;
}

/// The address of a mapping's first byte, and its length; a registration needs the first in this process.
fn extent(mapping: &Mapping) -> Result<(*mut std::ffi::c_void, usize), Failed> {
    let at = mapping.as_ptr().cast();
    let failed = Failed {
        call: "mmap",
        code: 0,
        name: "the mapping is of the parent process".to_owned(),
    };
    match std::ptr::eq(at, std::ptr::null()) {
        true => Err(failed),
        false => Ok((at, mapping.len() as usize)),
    }
}

/// Declares the functions of a library: required ones, and optional ones that older versions
/// lack.
macro_rules! functions {
    (
        $file:literal
        { $($name:ident = $symbol:literal ($($argument:ty),*);)* }
        { $($newer:ident = $newer_symbol:literal ($($newer_argument:ty),*);)* }
    ) => {
        /// The library's file name.
        pub(crate) const NAME: &str = $file;

        /// The library's functions, with the types of the header.
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> std::ffi::c_int,)*
            $($newer: Option<unsafe extern "C" fn($($newer_argument),*) -> std::ffi::c_int>,)*
        }

        impl Functions {
            fn load() -> Result<Functions, String> {
                let library = super::open(NAME)?;
                // SAFETY: the header declares the symbols with these types.
                unsafe {
                    Ok(Functions {
                        $($name: *library
                            .get(concat!($symbol, "\0").as_bytes())
                            .map_err(|_| concat!($file, " has no ", $symbol))?,)*
                        $($newer: library
                            .get(concat!($newer_symbol, "\0").as_bytes())
                            .ok()
                            .map(|function| *function),)*
                    })
                }
            }
        }
    };
}
use functions;

/// Opens a library for the rest of the process.
fn open(name: &str) -> Result<&'static libloading::Library, String> {
    // SAFETY: the runtimes' initialisers prepare their own state, as in any program that links
    // them.
    let library = unsafe { libloading::Library::new(name) }.map_err(|error| error.to_string())?;
    Ok(Box::leak(Box::new(library)))
}

/// Loads the functions once. A failure is not cached, because the library may load later.
fn kept<F>(
    cell: &'static OnceLock<F>,
    load: fn() -> Result<F, String>,
) -> Result<&'static F, String> {
    match cell.get() {
        Some(functions) => Ok(functions),
        None => {
            let loaded = load()?;
            Ok(cell.get_or_init(|| loaded))
        }
    }
}

/// The library's name for a number; empty without one.
///
/// # Safety
/// `text` is null or points to a string that is never freed.
unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller guarantees that `text` points to a string.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

/// Takes ownership of a descriptor that a runtime returned; `None` for a negative number.
///
/// # Safety
/// A non-negative number is a descriptor that the runtime has opened for the caller.
unsafe fn descriptor(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the caller guarantees that the descriptor belongs to the caller.
    (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests;
