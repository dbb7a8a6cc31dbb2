//! Compiles the examples of the READMEs and of `docs/`. They are not the crates' own documentation tests: the
//! repository's pages are outside of every crate, and a published crate must not name files outside of it.

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
pub struct Repository;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/disks.md")]
pub struct Disks;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/sharing.md")]
pub struct Sharing;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/README.md")]
pub struct Peerbuf;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/core/README.md")]
pub struct Core;

#[cfg(doctest)]
#[doc = include_str!("../../../lib/rdma/README.md")]
pub struct Rdma;
