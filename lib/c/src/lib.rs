//! The C API of peerbuf. The header is `include/peerbuf.h`; `docs/c.md` explains how to use it.
//!
//! Rules of the API:
//!
//! - A function that can fail returns a [`Code`](failure::Code). Each thread gets the details of its last
//!   failure from [`peerbuf_last_error`](failure::peerbuf_last_error).
//! - Objects are handles: pointers to opaque structs in C. A handle is a number that is never dereferenced,
//!   so a freed handle or one of another type is refused ([`handle`]).
//! - Panics do not cross the boundary: they become [`Code::Internal`](failure::Code::Internal).
//! - The caller keeps a descriptor that it passes in, and owns a descriptor that it gets.
//!
//! # Safety
//!
//! The same for every function: a string pointer is null or points to a NUL-terminated string; an output
//! pointer is null or points to memory for the result; no other thread uses either during the call; a
//! descriptor passed in is open.
//! the call; a descriptor that is given is open.
// The section above covers every function.
#![allow(clippy::missing_safety_doc)]

pub mod buffer;
pub mod failure;
pub mod file;
mod foreign;
pub mod handle;
pub mod rdma;
pub mod share;
