//! All `unsafe` code of the crate: one module per kernel interface, each with a safe API.
#![allow(unsafe_code)]

pub(crate) mod copy;
pub(crate) mod dmabuf;
pub mod fork;
pub mod memory;
pub(crate) mod sync_file;
