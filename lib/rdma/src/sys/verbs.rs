//! libibverbs, opened at run time (infiniband/verbs.h of rdma-core).
//!
//! Posting and polling are functions behind pointers in `struct ibv_context`, so the layouts of
//! the public structures are part of the library's binary interface, which has not changed since
//! its version 1.1; the lab compares them with the header.
//!
//! What keeps this sound: a card reads and writes memory of regions only, a region's pages are
//! pinned by the kernel until it is deregistered, and what is registered here is a window into a
//! [`Map`](peerbuf_core::memory::Map), of whose bytes there are no Rust references. So whatever is posted,
//! and whatever the other end does, no memory of Rust's changes.

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
