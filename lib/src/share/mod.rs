//! Handing buffers to other processes: permanently, or as a loan that the owner can take back.
//!
//! A [`Channel`] is a unix socket of type `SOCK_SEQPACKET`. The socket keeps message
//! boundaries. The kernel reports the credentials of the peer process ([`Channel::peer`]).
//! Descriptors travel with the message that describes them (`SCM_RIGHTS`).
//! [`Channel::send_buffer`] gives a buffer away for good and needs nothing but a channel.
//!
//! A [`Publisher`] lends: it offers its buffers to any number of [`Subscriber`]s, takes them
//! back, moves their bytes, and offers them again as the next *generation*.
//!
//! ```
//! use std::time::Duration;
//! use peerbuf::Access;
//! use peerbuf::export::memfd;
//! use peerbuf::share::{Channel, Copied, Publisher, Subscriber};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // The publisher's process. (Across programs: Publisher::bind(path), Subscriber::connect(path).)
//! let (ours, theirs) = Channel::pair()?;
//! let mut publisher = Publisher::new()?;
//! publisher.add(ours)?;
//! let weights = publisher.publish("weights", Copied::new(|_| memfd::export("weights", 1 << 20))?)?;
//!
//! // The subscriber's.
//! let work = std::thread::spawn(move || -> Result<(), peerbuf::error::ShareError> {
//!     let subscriber = Subscriber::new(theirs)?;
//!     for _ in 0..100 {
//!         let weights = subscriber.buffer("weights")?; // waits while it moves
//!         let mut mapping = weights.whole().map(Access::ReadWrite)?;
//!         mapping.begin_cpu_access(Access::Write)?.write_at(0, b"hello")?;
//!     } // letting go of it is all that the publisher waits for
//!     Ok(())
//! });
//!
//! publisher.serve_for(Duration::from_millis(20))?;
//! let moved = publisher.migrate(weights, Duration::from_secs(1))?;
//! assert_eq!(moved.generation, 2);
//! # while !work.is_finished() { publisher.serve_for(Duration::from_millis(5))?; }
//! # work.join().unwrap()?;
//! # Ok(())
//! # }
//! ```
//!
//! `share::tokio` (feature `tokio`) is the async version of this module.
//!
//! # Guarantees
//!
//! 1. **Whole moves.** When [`Publisher::migrate`] returns, no live subscriber uses the old
//!    generation, and the new generation contains every byte that was written to the old one
//!    before. A subscriber returns a generation when the last [`Lease`], clone, mapping and
//!    attachment of the generation is dropped and its descriptors are closed. The library
//!    enforces this order.
//! 2. **Bounded harm.** A subscriber that is killed, is stopped, is slow or sends malformed
//!    messages delays a move by at most the time limit of that move. It delays other
//!    subscribers by at most the same time. A subscriber that never reads uses a small part of
//!    the descriptors that may be in flight. The publisher cuts such a subscriber off, and the
//!    subscriber cannot reach the new generation. Bytes that the subscriber wrote before the
//!    move are in the new generation. Bytes that it writes during the move may be in the new
//!    generation in whole, in part or not at all. Bytes that it writes after the move never
//!    are.
//! 3. **A dead publisher harms nobody.** A subscriber gets [`ShareError::PeerGone`]. Its leases
//!    stay valid memory that nobody moves any more.
//! 4. **Nothing in flight.** Work that began on a generation is complete before the generation
//!    is replaced. Importers hold the buffer while they work: direct I/O holds the buffer until
//!    the call returns, other importers until their attachment is dropped. The publisher waits
//!    for the fences on the dma-buf, which cover work that a device (such as a GPU) still does,
//!    also for a subscriber that was killed. If a device is not done within the time limit, the
//!    move fails ([`ShareError::DeviceBusy`]). The bytes then stay in place, and the buffer is
//!    offered to nobody until a later move succeeds.
//!
//! A *live* subscriber uses this library and was not cut off. A subscriber that falsely reports
//! that it returned a generation is harmless if each generation is separate memory
//! ([`Copied`]): that subscriber works on old pages that no one reads. With [`Movable`], the
//! next generation is the same dma-buf unless a subscriber was cut off, so a lying subscriber
//! would still reach the new generation. Lend a [`Movable`] only to programs that you trust.
//! The same holds for a descriptor that a program duplicated without the library.
//!
//! One connection cannot end another connection or the server. The publisher cuts off a peer
//! that sends no hello ([`CutOff::Silent`]). A publisher that has run out of descriptors stops
//! listening and listens again when descriptors are free.
//!
//! # fork, PID namespaces, containers
//!
//! - A loan belongs to the process that connected. A forked child inherits no mapping of a lent
//!   buffer (`MADV_DONTFORK`). Every call that the child makes on a subscriber, a lease or a
//!   publisher returns [`ShareError::Inherited`] at once. Dropping the inherited objects
//!   returns no buffer and ends no connection of the parent. The child has to connect by
//!   itself. The child inherits the descriptors, as it inherits all descriptors until `exec`.
//!   Parent and child can both use a [`Channel`] that belongs to no subscriber or publisher.
//! - A process in another PID namespace has no process id here ([`Peer::pid`] is `None`). The
//!   policy decides by user id, group id and buffer name.
//! - A [`Listener`] replaces a socket file that a dead process left. If several processes start
//!   together, one of them gets the path. Each listener removes only its own file.
//!
//! [`ShareError::Inherited`]: crate::error::ShareError::Inherited
//! [`ShareError::DeviceBusy`]: crate::error::ShareError::DeviceBusy
//! [`ShareError::PeerGone`]: crate::error::ShareError::PeerGone
//!
//! # Read-only
//!
//! The meaning of [`Grant::ReadOnly`] depends on the kind of buffer:
//!
//! - System memory ([`Kind::Memfd`](crate::buffer::Kind::Memfd),
//!   [`Kind::Udmabuf`](crate::buffer::Kind::Udmabuf)): the subscriber gets the memfd, opened
//!   again for reading, and does not get the dma-buf, which is always writable. The kernel
//!   refuses writable mappings, writes, holes and seals through that descriptor. Two bypasses
//!   remain:
//!   - A process that may open `/dev/udmabuf` can make a writable dma-buf of the memfd:
//!     the kernel looks at the memfd's seals and not at the descriptor's mode
//!     (`check_memfd_seals` in drivers/dma-buf/udmabuf.c, Linux 7.3).
//!   - A process of the same user, or root, can open the file for writing through `/proc`. The
//!     publisher sets the file's mode to 0600, so that other users cannot.
//!
//! Read-only is therefore enforced against a process of another user that may not open
//! `/dev/udmabuf`. Against other processes it only guards against mistakes. A copy of the
//! buffer is safe against all of them.
//! - A dma-buf that was exported for reading: the kernel refuses writable mappings. The kernel
//!   does not tell the drivers of importing devices, so those devices can still write.
//! - Any other dma-buf: all its descriptors are one open file with one mode, so the kernel
//!   would enforce nothing. The buffer is not offered ([`Event::NotOffered`]).
//!
//! # Checks on received messages
//!
//! The receiver checks a message before it uses the message. On arrival, the receiver checks
//! the size, the magic number, the version, every field and the number of descriptors. Before
//! the first use of a buffer, the receiver checks the type of each descriptor and that the
//! range is inside the buffer. A message that fails a check leaves no descriptor open and ends
//! the connection.

mod backing;
mod channel;
mod grant;
mod listener;
mod policy;
mod publisher;
mod said;
mod subscriber;
#[cfg(feature = "tokio")]
pub mod tokio;
mod wire;

#[cfg(feature = "module")]
pub use backing::Movable;
pub use backing::{Backing, Copied, Order, Placement, copy};
pub use channel::{Channel, MAX_DESCRIPTORS, Peer};
pub use grant::Grant;
pub use listener::Listener;
pub use policy::{Policy, SameUser};
#[doc(hidden)]
pub use publisher::Fault;
pub use publisher::{BufferId, CutOff, Event, Migration, Publisher, SubscriberId};
#[doc(hidden)]
pub use said::Said;
pub use subscriber::{Lease, Subscriber};
pub(crate) use wire::{decode_any, samples};
