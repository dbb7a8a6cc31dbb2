//! RDMA: a network card reads and writes a buffer for another machine.
//!
//! Cards, drivers and exporters differ in what they support, so one call (`ibv_reg_dmabuf_mr`) is not enough.
//! [`Card::register`] registers a buffer of `peerbuf` by the best way that works, a [`Rung`] of the ladder.
//! The [`Registration`] reports the rung, and why each better rung failed. [`Domain::register`] does the same
//! in a protection domain of the program.
//!
//! | rung | the card uses | needs |
//! |---|---|---|
//! | [`Rung::DmaBufByLibrary`] | the dma-buf (`ibv_reg_dmabuf_mr`) | driver, and the card's driver in libibverbs |
//! | [`Rung::DmaBufByKernel`] | the dma-buf (uverbs' own method) | driver |
//! | [`Rung::SharedMemory`] | the pages of the memfd behind the buffer, without a copy | a memfd |
//! | [`Rung::Staged`] | a bounce buffer as long as the range; the CPU copies | a mapping |
//!
//! An address in a registration is an offset in the buffer: byte 4096 of the buffer is at address 4096,
//! whichever part was registered. So no offset can get lost between two machines.
//!
//! # When the buffer moves
//!
//! A registered dma-buf is pinned: it can be revoked, but does not move. Most cards cannot fault, so requests
//! to a region whose memory has gone fail, and the kernel cannot give the region other memory under the same
//! key. To move a registered buffer, programs cooperate: a [`Publisher`](peerbuf::share::Publisher) asks for
//! it back, subscribers deregister it, and then register the next generation. A [`Follower`] does that
//! automatically, and [`Follower::write`] and [`Follower::read`] transfer bytes across moves. A publisher can
//! also lend a buffer within one process, over [`Channel::pair`](peerbuf::share::Channel::pair).
//!
//! libibverbs is opened at its first use. Without it [`probe`] returns an error, and the rest of the crate
//! works.
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
//! This crate has its own declarations of libibverbs (`sys/verbs`) and opens the library with `libloading`.
//! The `ibverbs` crate links the library, or builds rdma-core: without either, a program would not start or
//! not build. `rdma-mummy-sys`, and `sideway` on top of it, open the library at run time, but need CMake and
//! clang on every machine that builds this crate. This crate uses about twenty functions of an interface that
//! has been stable since 2007, and the lab compares each field with the header.
//!
//! # Why there are connections here
//!
//! A [`Registration`] that ends while a card works on it must stop that card first; otherwise the buffer
//! would be given back with a device still accessing it. Only the owner of the queue pairs can do that, so
//! [`Connection`] and the registrations know each other (through a trait: the ladder knows no queue pairs),
//! and [`Follower`] transfers bytes over connections while the buffer moves. The command `peerbuf rdma`, the
//! lab's tests and the fuzz targets use connections, so they are not in the command. This is not a general
//! RDMA library: it has reliable connections, over RoCE or within an InfiniBand subnet. A program with its
//! own queue pairs passes its protection domain to [`Domain::from_raw`] and uses the registrations.
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
