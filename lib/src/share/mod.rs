//! Handing buffers to another process.
//!
//! A [`Channel`] is a unix socket of the seqpacket kind: messages keep their borders, the kernel
//! says who is at the other end ([`Channel::peer`]), and descriptors travel with the message that
//! explains them. A buffer arrives as it was sent: descriptors, offset, length and provenance in
//! one value.
//!
//! Nothing that arrives is believed before it was checked: the message's size, magic number,
//! version and every field, the number of descriptors, what each descriptor really is, and that
//! the range is inside of it. A message that fails leaves no descriptor behind.
//!
//! ```
//! use peerbuf::{export::memfd, share::Channel};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (ours, theirs) = Channel::pair()?;
//! let buffer = memfd::export("weights", 1 << 20)?;
//! ours.send_buffer(&buffer.range(4096, 8192)?)?;
//!
//! let received = theirs.receive_buffer()?;
//! assert_eq!((received.offset(), received.len()), (4096, 8192));
//! assert_eq!(received.buffer().name(), "weights");
//! # Ok(())
//! # }
//! ```

mod channel;
mod wire;

pub use channel::{Channel, Listener, MAX_DESCRIPTORS, Peer};
