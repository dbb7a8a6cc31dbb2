//! The libraries of GPU runtimes: opened at run time, never linked, and never closed, since they have threads and
//! handlers of their own.
//!
//! Each runtime has an error type of numbers. A call that fails becomes a [`Failed`] with the function's name.

pub(crate) mod cuda;
pub(crate) mod hsa;
pub(crate) mod level_zero;

use std::ffi::CStr;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

/// A function of a runtime that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) call: &'static str,
    /// The runtime's number.
    pub(crate) code: i32,
    /// Its name, where the runtime has one.
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

/// Memory of a GPU that somebody vouched for.
///
/// # Invariants
/// The allocation that has these bytes stays until this value and its clones are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Allocated {
    pub(crate) pointer: u64,
    pub(crate) length: u64,
}

impl Allocated {
    /// # Safety
    /// If `pointer` is an address of one of the runtimes, the allocation that has `length` bytes from there on stays
    /// until the value, its clones, and everything that is made of them are dropped.
    pub(crate) unsafe fn at(pointer: u64, length: u64) -> Allocated {
        // INVARIANT: the caller's word.
        Allocated { pointer, length }
    }

    /// The same memory with neighbouring bytes: runtimes map, and export, whole pages or allocations.
    pub(crate) fn widened(self, before: u64, after: u64) -> Allocated {
        // INVARIANT: pages of an allocation stay as long as it.
        Allocated {
            pointer: self.pointer - before,
            length: self.length + before + after,
        }
    }

    /// A part of it.
    ///
    /// # Panics
    /// When it is not all inside.
    pub(crate) fn part(self, offset: u64, length: u64) -> Allocated {
        let end = offset.checked_add(length);
        assert!(end.is_some_and(|end| end <= self.length), "outside");
        // INVARIANT: what it is part of stays.
        Allocated {
            pointer: self.pointer + offset,
            length,
        }
    }

    /// The address of `length` bytes at `offset`.
    ///
    /// # Panics
    /// When they are not all inside.
    fn address(self, offset: u64, length: usize) -> u64 {
        let end = offset.checked_add(length as u64);
        assert!(end.is_some_and(|end| end <= self.length), "outside");
        self.pointer + offset
    }
}

/// Declares the functions that are taken from a library: those that each version has, and those that older ones lack.
macro_rules! functions {
    (
        $file:literal
        { $($name:ident = $symbol:literal ($($argument:ty),*);)* }
        { $($newer:ident = $newer_symbol:literal ($($newer_argument:ty),*);)* }
    ) => {
        /// The library's file.
        pub(crate) const NAME: &str = $file;

        /// The library's functions, each with the type that its header gives it.
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
    // SAFETY: the runtimes' initialisers prepare their own state, as in any program that links the library.
    let library = unsafe { libloading::Library::new(name) }.map_err(|error| error.to_string())?;
    Ok(Box::leak(Box::new(library)))
}

/// Loads the functions once. A failure is not kept: the program may load the library later.
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

/// A name that a library has for a number; empty without one.
///
/// # Safety
/// `text` is null or a string that stays for ever.
unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: `text` is a string (caller's word).
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

/// The descriptor that a runtime gave, which is the caller's from now on; `None` for a number that is none.
///
/// # Safety
/// A number that is not negative is a descriptor that the runtime has opened for the caller.
unsafe fn descriptor(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: the descriptor is the caller's (caller's word).
    (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}
