//! The policy that decides which subscriber may have which buffer.

use super::channel::Peer;
pub use super::grant::Grant;
use crate::buffer::Buffer;

/// Decides the access of each peer to each buffer. The publisher asks once for each generation
/// that it offers, so the answer may change between generations.
///
/// Any closure of this signature is a policy:
///
/// ```
/// use peerbuf::Buffer;
/// use peerbuf::share::{Grant, Peer, Publisher};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let publisher = Publisher::new()?.with_policy(|peer: &Peer, name: &str, _: &Buffer| {
///     match (peer.uid, name) {
///         (0, _) => Grant::ReadWrite,
///         (_, "weights") => Grant::ReadOnly,
///         _ => Grant::Nothing,
///     }
/// });
/// # Ok(())
/// # }
/// ```
pub trait Policy: Send {
    /// Returns the access of `peer` to the buffer that is published as `name`.
    fn grant(&mut self, peer: &Peer, name: &str, buffer: &Buffer) -> Grant;
}

impl<F: FnMut(&Peer, &str, &Buffer) -> Grant + Send> Policy for F {
    fn grant(&mut self, peer: &Peer, name: &str, buffer: &Buffer) -> Grant {
        self(peer, name, buffer)
    }
}

/// The default policy: processes of this user and of root get everything, others nothing.
#[derive(Debug, Clone, Copy)]
pub struct SameUser;

impl Policy for SameUser {
    fn grant(&mut self, peer: &Peer, _name: &str, _buffer: &Buffer) -> Grant {
        if peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw() {
            Grant::ReadWrite
        } else {
            Grant::Nothing
        }
    }
}
