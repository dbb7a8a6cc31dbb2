//! Cards: listing them, opening one, and its address.

use std::sync::Arc;

use peerbuf::Errno;
use peerbuf::buffer::{Access, BufferRange};
use peerbuf::error::{SystemError, Unavailable};

use crate::error::RdmaError;
use crate::place::{Place, Placed};
use crate::registration::Registration;
use crate::rung::Rung;
use crate::sys::domain::Domain;
use crate::sys::verbs;

/// The names of the cards, such as `mlx5_0` or `rxe0`.
///
/// # Errors
/// [`Unavailable`] without libibverbs, or without a card.
#[doc(alias = "ibv_get_device_list")]
pub fn probe() -> Result<Vec<String>, Unavailable> {
    let failed = |errno| SystemError::new("ibv_get_device_list", verbs::NAME, errno);
    let names = verbs::needed()?
        .names()
        .map_err(|errno| Unavailable::new(verbs::WHAT, failed(errno), "`modprobe ib_uverbs`"))?;
    if names.is_empty() {
        let remedy = "load the card's driver; or, without one, `modprobe rdma_rxe` and \
                      `rdma link add rxe0 type rxe netdev NAME`";
        return Err(Unavailable::new(verbs::WHAT, failed(Errno::NODEV), remedy));
    }
    Ok(names)
}

/// The offsets that this crate assumes for each field of libibverbs's structures, by name in C, for the lab's
/// comparison with the header.
#[doc(hidden)]
pub fn layout() -> Vec<(&'static str, usize)> {
    verbs::layout()
}

/// An open card: a port, and a protection domain of its own. Clones refer to the same card.
#[derive(Clone)]
#[doc(alias = "ibv_context")]
#[doc(alias = "ibv_pd")]
#[doc(alias = "ProtectionDomain")]
pub struct Card {
    domain: Domain,
    place: Arc<Placed>,
}

impl std::fmt::Debug for Card {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Card").field(&self.name()).finish()
    }
}

impl Card {
    /// Opens a card by name, at its first active port, with that port's most widely routable GID.
    ///
    /// # Errors As [`Card::open_at`].
    pub fn open(name: &str) -> Result<Card, RdmaError> {
        Card::open_at(name, Place::default())
    }

    /// Opens a card by name, at this port and with this GID.
    ///
    /// # Errors [`RdmaError::Unavailable`] without libibverbs; `ENODEV` if there is no such card; `EACCES`
    /// without permission for `/dev/infiniband/uverbs*`; `EINVAL` for a port that it does not have;
    /// `EADDRNOTAVAIL` if the port lacks this GID, or has none, as before its network interface has an
    /// address.
    #[doc(alias = "ibv_open_device")]
    #[doc(alias = "ibv_alloc_pd")]
    pub fn open_at(name: &str, place: Place) -> Result<Card, RdmaError> {
        let library = verbs::needed()?;
        let domain = verbs::Domain::open(library, name)
            .map_err(|errno| SystemError::new("ibv_open_device", name, errno))?;
        // The library does not report the number of ports, but refuses the first number beyond it.
        let ports: Vec<_> = (1..=u8::MAX)
            .map_while(|number| Some((number, domain.port(number).ok()?)))
            .collect();
        let (number, port) = place
            .choose_port(&ports)
            .ok_or_else(|| SystemError::new("ibv_query_port", name, Errno::INVAL))?;
        let failed = |errno| SystemError::new("ibv_query_gid_table", name, errno);
        let gids = domain.gids().map_err(failed)?;
        let gid = place.choose_gid(number, &gids);
        let gid = *gid.ok_or_else(|| failed(Errno::ADDRNOTAVAIL))?;
        Ok(Card {
            domain: Domain::of(domain),
            place: Arc::new(Placed::new(number, &port, gid)),
        })
    }

    /// The card's name.
    pub fn name(&self) -> &str {
        self.domain.name()
    }

    /// The protection domain for buffers.
    pub fn domain(&self) -> &Domain {
        &self.domain
    }

    pub(crate) fn place(&self) -> &Placed {
        &self.place
    }

    /// The number of the port in use.
    pub fn port(&self) -> u8 {
        self.place.port
    }

    /// The port's LID in its InfiniBand subnet; `None` on Ethernet, and before a subnet manager has assigned
    /// one.
    pub fn lid(&self) -> Option<u16> {
        Some(self.place.lid).filter(|&lid| lid != 0)
    }

    /// The GID in use, in network byte order.
    pub fn gid(&self) -> [u8; 16] {
        self.place.gid.gid()
    }

    /// The index of that GID in the port's table.
    #[doc(alias = "sgid_index")]
    pub fn gid_index(&self) -> u8 {
        // In range: checked when it was chosen.
        self.place.gid.index() as u8
    }

    /// True for a software card, such as soft-RoCE: the CPU moves its bytes.
    pub fn is_software(&self) -> bool {
        self.domain.is_software()
    }

    /// Registers a range: [`Domain::register`] in the card's protection domain.
    ///
    /// # Errors
    /// As [`Domain::register`].
    pub fn register(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
    ) -> Result<Registration, RdmaError> {
        self.domain.register(range, remote)
    }

    /// As [`Card::register`], by these rungs only, in this order.
    ///
    /// # Errors
    /// As [`Domain::register`].
    pub fn register_by(
        &self,
        range: &BufferRange,
        remote: Option<Access>,
        rungs: &[Rung],
    ) -> Result<Registration, RdmaError> {
        self.domain.register_by(range, remote, rungs)
    }
}
