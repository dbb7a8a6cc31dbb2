//! The policy that decides which subscriber may have which buffer.

use super::channel::Peer;
pub use super::grant::Grant;
use crate::buffer::Buffer;

/// Decides who may have which buffer. Asked once for each generation that is offered, so it may
/// change its mind from one to the next.
///
/// Any closure of this shape is a policy:
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
    /// Returns the access of `peer` to the buffer that was published as `name`.
    fn grant(&mut self, peer: &Peer, name: &str, buffer: &Buffer) -> Grant;
}

impl<F: FnMut(&Peer, &str, &Buffer) -> Grant + Send> Policy for F {
    fn grant(&mut self, peer: &Peer, name: &str, buffer: &Buffer) -> Grant {
        self(peer, name, buffer)
    }
}

/// The policy where none is given: processes of this user and of root get everything, others
/// nothing.
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
