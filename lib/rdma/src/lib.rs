//! RDMA: a network card reads and writes a buffer for another machine.
//!
//! The crate gives a card a buffer of `peerbuf`'s in the best way that works. With it come the queue
//! pairs that it is tried with, and what keeps both right while the buffer moves.
//!
//! [`Card::register`], and [`Domain::register`] in a protection domain that the program has already, gives the card a
//! buffer in the best way that works, a [`Rung`] of the ladder,
//! and the [`Registration`] says which, and what each better one failed with:
//!
//! | rung | the card uses | needs |
//! |---|---|---|
//! | [`Rung::DmaBufByLibrary`] | the dma-buf (`ibv_reg_dmabuf_mr`) | driver, and the card's part of libibverbs |
//! | [`Rung::DmaBufByKernel`] | the dma-buf (uverbs' own method) | driver |
//! | [`Rung::SharedMemory`] | the pages of the memfd behind the buffer: no copy | a memfd |
//! | [`Rung::Staged`] | memory of its own, as much as the range; the processor copies | a mapping |
//!
//! An address in a registration is an offset in the buffer: byte 4096 of the buffer is at address
//! 4096, whichever part of it was registered. So an offset cannot get lost between two machines.
//!
//! # When the buffer moves
//!
//! A registered dma-buf is pinned: it can be revoked, and does not move. Most cards cannot fault, so a
//! region whose memory has gone could only ever answer with errors, and the kernel has no way to
//! give it other memory under the same key. What moves a registered buffer is therefore an agreement
//! between programs: a [`Publisher`](peerbuf::share::Publisher) wants it back, whoever has it registered
//! lets go, and registers what it becomes. A [`Follower`] does that by itself, and
//! [`Follower::write`] and [`Follower::read`] carry bytes meanwhile. A buffer of this process can be
//! lent by a publisher of this process, over [`Channel::pair`](peerbuf::share::Channel::pair).
//!
//! libibverbs is opened when it is first needed. Without it, [`probe`] says so, and the rest of the
//! crate works.
//!
//! ```no_run
//! use std::time::Duration;
//! use peerbuf::{Access, export::udmabuf};
//! use peerbuf_rdma::{Address, Card, Remote};
//!
//! # fn example(
//! #     exchange: impl Fn([u8; 32], [u8; 24]) -> Result<(Address, Remote), peerbuf_rdma::RdmaError>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! let card = Card::open("rxe0")?;
//! let buffer = udmabuf::export("weights", 1 << 20)?;
//! let weights = card.register(&buffer.whole(), Some(Access::Write))?;
//! println!("{}", weights.rung());
//! for attempt in weights.attempts() {
//!     println!("  not {attempt}");
//! }
//!
//! // Both ends tell each other where they are, over TCP for example.
//! let end = card.endpoint(16)?;
//! let (peer, theirs) = exchange(end.address().to_bytes(), weights.remote()?.to_bytes())?;
//! let mut connection = end.connect(&peer)?;
//! connection.write(&weights.slice(0, 65536)?, &theirs.slice(0, 65536)?, None)?;
//! let done = connection.wait(Duration::from_secs(5))?;
//! done.result?; // or what the card said
//! # Ok(())
//! # }
//! ```
//!
//! # Which binding
//!
//! The declarations of libibverbs are this crate's own (`sys/verbs`), and the library is opened
//! with `libloading`. The `ibverbs` crate links the library, or builds rdma-core: a program would not
//! start, or not build, without it. `rdma-mummy-sys`, and `sideway` over it, do open it at run time,
//! but need CMake and clang to build, on every machine that builds this crate. Some twenty
//! functions are used here, of an interface that has been stable since 2007, and the lab compares
//! each field with the header.
//!
//! # Why there are connections here
//!
//! A [`Registration`] that ends while a card works on it must stop that card first, or the buffer is
//! given back with a device still at work on it. Only who owns the queue pairs can do that, so
//! [`Connection`] and the registrations know each other (by a trait: the ladder knows no queue pairs),
//! and [`Follower`] moves bytes over connections while the buffer moves. The command `peerbuf rdma`,
//! the lab's tests and the fuzz targets use them; in the command alone, the tests could not. It is no
//! general library of RDMA: reliable connections, over RoCE or within an InfiniBand subnet. A program that has
//! queue pairs of its own brings its protection domain along ([`Domain::from_raw`]) and uses the registrations.
#![deny(unsafe_code)]

mod card;
mod connection;
mod error;
mod follow;
mod ladder;
#[cfg(feature = "libfabric")]
pub mod libfabric;
mod place;
mod registration;
mod rung;
mod sys;
mod transfer;
mod wire;
mod work;

#[doc(hidden)]
pub use card::layout;
pub use card::{Card, probe};
pub use connection::{Connection, Endpoint};
pub use error::RdmaError;
pub use follow::Follower;
pub use place::Place;
pub use registration::{Piece, Registration, Sge};
pub use rung::{Attempt, Layer, Rung};
pub use sys::domain::Domain;
pub use transfer::{Link, Span, Transferred};
pub use wire::{Address, Remote};
pub use work::{Completion, Operation, Status, WorkError, WorkId};
