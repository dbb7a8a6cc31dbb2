//! Cards: which there are, opening one, and the address that it has.

use std::path::Path;
use std::sync::Arc;

use peerbuf::Errno;
use peerbuf::error::{SystemError, Unavailable};

use crate::error::RdmaError;
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
            cause: SystemError::new("ibv_get_device_list", verbs::NAME, Errno::NODEV),
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
        cause: SystemError::new("dlopen", verbs::NAME, Errno::LIBACC),
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
        let address = *choose(&gids).ok_or_else(|| failed(Errno::ADDRNOTAVAIL))?;
        let device = Path::new("/sys/class/infiniband").join(name).join("device");
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

    pub(crate) fn domain(&self) -> &Arc<Domain> {
        &self.inner.domain
    }

    pub(crate) fn address(&self) -> &GidEntry {
        &self.inner.address
    }

    /// Whether these are clones of each other.
    pub(crate) fn is(&self, other: &Card) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
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
