//! Handing buffers to other processes, for good or for as long as they stay where they are.
//!
//! A [`Channel`] is a unix socket of the seqpacket kind: messages keep their borders, the kernel
//! says who is at the other end ([`Channel::peer`]), and descriptors travel with the message that
//! explains them. With it alone a buffer can be given away ([`Channel::send_buffer`]).
//!
//! A [`Publisher`] lends: it offers its buffers to any number of [`Subscriber`]s, takes them back,
//! moves their bytes, and offers them again as the next *generation*.
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
//! Programs that wait with `async` have the same in `share::tokio` (feature `tokio`).
//!
//! # What is guaranteed
//!
//! 1. **Whole moves.** When [`Publisher::migrate`] returns, no live subscriber uses the old
//!    generation, and every byte written to it before is in the new one. A subscriber gives a
//!    generation back when the last [`Lease`], clone, mapping and attachment of it is gone and its
//!    descriptors are closed; the library sees to it that this is what it says.
//! 2. **Bounded harm.** A subscriber that is killed, stopped, slow or sends rubbish delays a move by
//!    no more than the time limit given to it, and the other subscribers by no more than that. One
//!    that never reads uses up a small part of the descriptors that may be under way. It is
//!    cut off, and cannot reach the new generation. What it had written before is in the new
//!    generation; what it writes while the move goes on may be there in whole, in part or not at
//!    all; what it writes afterwards never is.
//! 3. **A dead publisher harms nobody.** A subscriber gets [`ShareError::PeerGone`], and what it
//!    has on lease stays valid memory, as an orphan that nobody moves any more.
//! 4. **Nothing in flight.** What was begun on a generation is done before it is given up. Importers
//!    hold the buffer while they work: direct I/O until the call returns, others until their
//!    attachment is dropped. Work that devices still do then, as a GPU does, is waited for by the
//!    fences on the dma-buf, also that of a subscriber that was killed. A device that is not done
//!    within the time limit makes the move fail ([`ShareError::DeviceBusy`]); the bytes stay where they
//!    are, offered to nobody, until a later move succeeds.
//!
//! What the words cover: a *live* subscriber is one that uses this library and was not cut off. One
//! that lies, and says that it gave back what it keeps, is harmless where each generation is memory
//! of its own ([`Copied`]): it works on old pages that are nobody's truth any more. With [`Movable`] the
//! next generation is the same dma-buf unless somebody was cut off, so such a liar would still reach it:
//! lend those only to programs that you trust that far. The same holds for a descriptor that a program
//! has duplicated behind the library's back.
//!
//! A connection ends nobody else's and no server: whoever does not greet is cut off
//! ([`CutOff::Silent`]), and a process that has no descriptors left listens again when it has some.
//!
//! # fork, PID namespaces, containers
//!
//! - A loan belongs to the process that connected. A child that is forked from it inherits none of
//!   the mappings of lent buffers (`MADV_DONTFORK`), and what it does with a subscriber, a lease or
//!   a publisher returns [`ShareError::Inherited`] at once. It takes nothing from its parent:
//!   dropping what it inherited gives nothing back and ends no connection. A child connects by itself. The
//!   descriptors are inherited all the same, as all are until `exec`. A [`Channel`] that no
//!   subscriber or publisher has can be used by either.
//! - A process of another PID namespace has no number here ([`Peer::pid`] is `None`). The policy
//!   decides by what it has: user, group and name.
//! - A [`Listener`] takes the place of a socket file that a dead process left, one of those that start
//!   together gets the path, and each removes only its own file.
//!
//! [`ShareError::Inherited`]: crate::error::ShareError::Inherited
//! [`ShareError::DeviceBusy`]: crate::error::ShareError::DeviceBusy
//! [`ShareError::PeerGone`]: crate::error::ShareError::PeerGone
//!
//! # Read-only
//!
//! [`Grant::ReadOnly`] means, by the kind of buffer:
//!
//! - System memory ([`Kind::Memfd`](crate::buffer::Kind::Memfd),
//!   [`Kind::Udmabuf`](crate::buffer::Kind::Udmabuf)): the subscriber gets the memfd opened again
//!   for reading, without the dma-buf, which is always writable. The kernel refuses writable mappings,
//!   writes, holes and seals through that descriptor. Two ways around it are left:
//!   - Whoever may open `/dev/udmabuf` can make a dma-buf of the memfd, and that one is writable:
//!     the kernel looks at the memfd's seals and not at the descriptor's mode
//!     (`check_memfd_seals` in drivers/dma-buf/udmabuf.c, Linux 7.3).
//!   - A process of the same user, or root, can open the file for writing through `/proc`. The
//!     publisher makes the file's mode 0600, so that another user cannot.
//!
//!   So read-only holds against a process of another user that may not open `/dev/udmabuf`. Against
//!   others it is a guard against mistakes. A copy holds against everybody.
//! - A dma-buf that was exported for reading: the kernel refuses writable mappings. Devices that
//!   import it are not held back: the kernel does not tell their drivers.
//! - Any other dma-buf: all its descriptors are one open file with one mode, so nothing would be
//!   enforced. It is not offered ([`Event::NotOffered`]).
//!
//! # What arrives is checked
//!
//! Nothing that arrives is believed before it was checked: a message's size, magic number, version
//! and every field when it arrives; the number of descriptors; what each descriptor really is, and
//! that the range is inside of it, before its first use. A message that fails leaves no descriptor
//! behind, and ends the connection.

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
