//! [`Buffer::for_engine`]: which handle of a buffer an engine takes that moves bytes between machines. docs/engines.md
//! says how each is known, and of which version.

use std::fmt;
use std::os::fd::BorrowedFd;

use crate::buffer::Buffer;
use crate::dmabuf::DmaBuf;
use crate::error::BufferError;

/// The handle of a buffer that an engine takes.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Handle<'a> {
    /// The address of a mapping of this memfd. [`BufferRange::map`](crate::BufferRange::map) maps it, and
    /// [`Mapping::as_ptr`](crate::Mapping::as_ptr) is the address.
    Memfd(BorrowedFd<'a>),
    /// The dma-buf.
    DmaBuf(&'a DmaBuf),
}

impl fmt::Display for Handle<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Handle::Memfd(_) => "memfd",
            Handle::DmaBuf(_) => "dmabuf",
        })
    }
}

/// Engines that register a pointer. They take a mapping of a dma-buf, too, and the transfer fails: the kernel cannot
/// pin its pages.
pub const BY_POINTER: [&str; 3] = ["ucx", "nixl", "libfabric"];
/// RDMA verbs, also by libfabric's provider of that name.
pub const VERBS: &str = "verbs";

impl Buffer {
    /// The handle of this buffer for `engine`: `ucx`, `nixl`, `libfabric` (its providers `tcp`, `shm`, `sockets` and
    /// `udp`), or `verbs`. For `verbs` a card or its driver may refuse the dma-buf; `peerbuf_rdma` then tries the rest.
    ///
    /// ```
    /// use peerbuf_core::engine::Handle;
    /// # fn main() -> Result<(), peerbuf_core::error::BufferError> {
    /// # let buffer = peerbuf_core::memfd::buffer("example", 4096)?;
    /// assert!(matches!(buffer.for_engine("ucx")?, Handle::Memfd(_)));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`BufferError::Engine`] for an engine that is not listed here, and for a buffer without a handle that the engine
    /// takes: `ucx`, `nixl` and `libfabric` take no memory of a device.
    pub fn for_engine(&self, engine: &str) -> Result<Handle<'_>, BufferError> {
        let memfd = self.host_memory().map(Handle::Memfd);
        let (found, why) = match engine {
            VERBS => (self.dmabuf().map(Handle::DmaBuf).or(memfd), ""),
            _ if BY_POINTER.contains(&engine) => (
                memfd,
                "the buffer has no memfd, and the engine needs pages that the kernel can pin: use a udmabuf or a memfd",
            ),
            _ => (
                None,
                "no engine of that name is known; known are ucx, nixl, libfabric and verbs",
            ),
        };
        found.ok_or_else(|| BufferError::Engine {
            object: self.name().to_owned(),
            engine: engine.to_owned(),
            why,
        })
    }
}

#[cfg(test)]
mod tests {
    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn engines_that_register_a_pointer_get_the_memfd_and_nobody_else_is_guessed_at() {
        let buffer = crate::memfd::buffer("weights", 4096).unwrap();
        for engine in ["ucx", "nixl", "libfabric", "verbs"] {
            assert_eq!(buffer.for_engine(engine).unwrap().to_string(), "memfd");
        }
        let error = buffer.for_engine("UCX").unwrap_err().to_string();
        let whole = "weights has no handle for the engine UCX: no engine of that name is known; \
                     known are ucx, nixl, libfabric and verbs";
        assert_eq!(error, whole);
    }
}
