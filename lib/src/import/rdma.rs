//! RDMA: a network card reads and writes a buffer for another machine.
//!
//! [`Card::register`] gives the card a buffer in the best way that works, a [`Rung`] of the ladder,
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
//! between programs: a [`Publisher`](crate::share::Publisher) wants it back, whoever has it registered
//! lets go, and registers what it becomes. A [`Follower`] does that by itself, and
//! [`Follower::write`] and [`Follower::read`] carry bytes meanwhile. A buffer of this process can be
//! lent by a publisher of this process, over [`Channel::pair`](crate::share::Channel::pair).
//!
//! libibverbs is opened when it is first needed. Without it, [`probe`] says so, and the rest of the
//! crate works.
//!
//! ```no_run
//! use std::time::Duration;
//! use peerbuf::{Access, export::udmabuf, import::rdma::{Address, Card, Remote}};
//!
//! # fn example(
//! #     exchange: impl Fn([u8; 32], [u8; 24]) -> Result<(Address, Remote), peerbuf::error::RdmaError>,
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

mod connection;
mod follow;
mod registration;
mod transfer;

use std::path::Path as FilePath;
use std::sync::Arc;

pub use connection::{
    Address, Completion, Connection, Endpoint, Operation, Remote, Status, WorkError, WorkId,
};
pub use follow::Follower;
pub use registration::{Piece, Registration};
pub use transfer::{Link, Span, Transferred};

pub use super::ladder::{Attempt, Layer, Rung};

use crate::error::{RdmaError, SystemError, Unavailable};
use crate::sys::verbs::{self, Domain, GidEntry};

const WHAT: &str = "RDMA";

/// The names of the cards that there are, such as `mlx5_0` or `rxe0`.
///
/// # Errors
/// [`Unavailable`] without libibverbs, or without a card.
pub fn probe() -> Result<Vec<String>, Unavailable> {
    let names = library()?.names().map_err(|errno| Unavailable {
        what: WHAT,
        cause: SystemError::new("ibv_get_device_list", verbs::NAME, errno),
        remedy: "`modprobe ib_uverbs`".into(),
    })?;
    if names.is_empty() {
        return Err(Unavailable {
            what: WHAT,
            // ENODEV
            cause: SystemError::new("ibv_get_device_list", verbs::NAME, crate::Errno::NODEV),
            remedy: "load the card's driver; or, without one, `modprobe rdma_rxe` and \
                     `rdma link add rxe0 type rxe netdev NAME`"
                .into(),
        });
    }
    Ok(names)
}

fn library() -> Result<&'static verbs::Library, Unavailable> {
    verbs::library().map_err(|why| Unavailable {
        what: WHAT,
        // ELIBACC
        cause: SystemError::new("dlopen", verbs::NAME, crate::Errno(79)),
        remedy: format!("install rdma-core's libraries (libibverbs1, ibverbs-providers): {why}"),
    })
}

/// Where this crate takes each field of libibverbs' structures to be: name in C and offset. For the
/// lab's comparison with the header.
#[doc(hidden)]
pub fn layout() -> Vec<(&'static str, usize)> {
    verbs::layout()
}

/// An open card. Clones are the same.
#[derive(Clone)]
pub struct Card {
    inner: Arc<Inner>,
}

struct Inner {
    domain: Arc<Domain>,
    name: String,
    /// It has no device of its own: the processor does its work.
    software: bool,
    address: GidEntry,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Card").field(&self.inner.name).finish()
    }
}

impl Card {
    /// Opens a card by its name.
    ///
    /// # Errors
    /// [`RdmaError::Unavailable`] without libibverbs; `ENODEV` where there is no such card, `EACCES`
    /// without permission for `/dev/infiniband/uverbs*`; `EADDRNOTAVAIL` for one without an address,
    /// which it has once its network interface has one.
    pub fn open(name: &str) -> Result<Card, RdmaError> {
        let library = library()?;
        let domain = Domain::open(library, name)
            .map_err(|errno| SystemError::new("ibv_open_device", name, errno))?;
        let failed = |errno| SystemError::new("ibv_query_gid_table", name, errno);
        let gids = domain.gids().map_err(failed)?;
        // EADDRNOTAVAIL
        let address = *choose(&gids).ok_or_else(|| failed(crate::Errno(99)))?;
        let device = FilePath::new("/sys/class/infiniband")
            .join(name)
            .join("device");
        let inner = Inner {
            domain: Arc::new(domain),
            name: name.to_owned(),
            software: !device.exists(),
            address,
        };
        Ok(Card {
            inner: Arc::new(inner),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// True for a card that is software, such as soft-RoCE: the processor moves its bytes.
    pub fn is_software(&self) -> bool {
        self.inner.software
    }
}

/// The address that routes: of RoCE version 2 one of IPv4, which every network has, before others.
fn choose(gids: &[GidEntry]) -> Option<&GidEntry> {
    let rank = |entry: &&GidEntry| {
        let gid = entry.gid();
        let ipv4 = gid[..10] == [0; 10] && gid[10..12] == [0xff, 0xff];
        (entry.kind() == verbs::GID_ROCE_V2, ipv4)
    };
    let usable = |entry: &&GidEntry| {
        entry.is_of_our_port() && entry.gid() != [0; 16] && u8::try_from(entry.index()).is_ok()
    };
    // The first of the best.
    gids.iter().rev().filter(usable).max_by_key(rank)
}
