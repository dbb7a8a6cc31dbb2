//! libibverbs, opened at run time (infiniband/verbs.h of rdma-core).
//!
//! Posting and polling are calls through function pointers in `struct ibv_context`, so the layout of the
//! public structures is part of the library's ABI. It has not changed since version 1.1; a test in the lab
//! compares it with the header.
//!
//! Soundness: a card accesses only the memory of regions, and the kernel pins a region's pages until it is
//! deregistered. All regions here are windows into a [`Map`](peerbuf_core::memory::Map), to whose bytes no
//! Rust reference exists. So no request, local or remote, changes memory that Rust owns.

mod abi;
mod domain;
mod library;
mod queue;

pub(crate) use super::uverbs::{DmaBufRequest, Keys};
pub(crate) use abi::{
    GID_ROCE_V2, GidEntry, LOCAL_WRITE, PortAttr, REMOTE_READ, REMOTE_WRITE, layout,
};
pub(crate) use domain::{Domain, Region};
pub(crate) use library::{NAME, WHAT, needed};
pub(crate) use queue::{Done, Local, Pair, Peer, QueuePair, Route, Verb};
