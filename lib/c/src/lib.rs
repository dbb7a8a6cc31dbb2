//! peerbuf for C. The header is `include/peerbuf.h`, and `docs/c.md` shows how to use it.
//!
//! The rules of the interface:
//!
//! - A function that can fail returns a [`Code`](failure::Code). The rest of what is known of the failure is in
//!   [`peerbuf_last_error`](failure::peerbuf_last_error), for each thread by itself.
//! - Objects are handles. C has them as pointers to structs that it knows nothing of; they are numbers and
//!   never followed, so one that was freed, or is of another type, is refused ([`handle`]).
//! - No panic leaves a function: it becomes [`Code::Internal`](failure::Code::Internal).
//! - A descriptor that is given stays the caller's, and one that is returned becomes the caller's.
//!
//! # Safety
//!
//! The same holds for every function: a pointer to a string is null or points to a text that ends with a zero
//! byte; a pointer to a place for a result is null or points to room for it; nobody else uses either during
//! the call; a descriptor that is given is open.
// The section above is all there is to say.
#![allow(clippy::missing_safety_doc)]

pub mod buffer;
pub mod failure;
pub mod file;
mod foreign;
pub mod handle;
pub mod rdma;
pub mod share;
