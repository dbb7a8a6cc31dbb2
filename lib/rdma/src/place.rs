//! A card's location on its network (port, LID and GID), chosen or given, and the route to a peer.
//!
//! Ethernet (RoCE) routes by GIDs alone. InfiniBand routes within a subnet by LIDs, which the subnet manager
//! assigns; a route between subnets would need a router's LID, which only the subnet manager knows.
//!
//! The choice depends only on values, so tests need no card.

use crate::error::RdmaError;
use crate::sys::verbs::{GID_ROCE_V2, GidEntry, Peer, PortAttr, Route};

/// The port and the GID to use on a card. The defaults are the first active port, and its most widely
/// routable GID.
///
/// ```
/// use peerbuf_rdma::Place;
///
/// let second = Place::default().port(2).gid_index(3);
/// # let _ = second;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    port: Option<u8>,
    gid_index: Option<u8>,
}

impl Place {
    /// Selects the port; ports count from 1.
    #[must_use]
    pub fn port(mut self, number: u8) -> Place {
        self.port = Some(number);
        self
    }

    /// Selects the GID by its index in the port's table (`show_gids`,
    /// `/sys/class/infiniband/*/ports/*/gids`).
    #[doc(alias = "sgid_index")]
    #[must_use]
    pub fn gid_index(mut self, index: u8) -> Place {
        self.gid_index = Some(index);
        self
    }

    /// Chooses a port from `ports`, which come with their numbers.
    pub(crate) fn choose_port(self, ports: &[(u8, PortAttr)]) -> Option<(u8, PortAttr)> {
        let wanted = |(number, _): &&(u8, PortAttr)| self.port.is_none_or(|port| port == *number);
        let mut wanted = ports.iter().filter(wanted);
        let first = wanted.clone().next();
        wanted.find(|(_, port)| port.is_active()).or(first).copied()
    }

    /// Chooses a GID from all of the card's.
    pub(crate) fn choose_gid(self, port: u8, gids: &[GidEntry]) -> Option<&GidEntry> {
        let usable = |entry: &&GidEntry| {
            let Ok(index) = u8::try_from(entry.index()) else {
                return false;
            };
            entry.is_of(port)
                && entry.gid() != [0; 16]
                && self.gid_index.is_none_or(|wanted| wanted == index)
        };
        // Prefers RoCE v2 with an IPv4 address, which every network routes.
        let rank = |entry: &&GidEntry| {
            let gid = entry.gid();
            let ipv4 = gid[..10] == [0; 10] && gid[10..12] == [0xff, 0xff];
            (entry.kind() == GID_ROCE_V2, ipv4)
        };
        // The first of the best: `max_by_key` returns the last, so the order is reversed.
        gids.iter().rev().filter(usable).max_by_key(rank)
    }
}

/// A port and its GID.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Placed {
    pub(crate) port: u8,
    pub(crate) gid: GidEntry,
    /// 0 on Ethernet.
    pub(crate) lid: u16,
    pub(crate) is_infiniband: bool,
}

impl Placed {
    pub(crate) fn new(number: u8, port: &PortAttr, gid: GidEntry) -> Placed {
        Placed {
            port: number,
            gid,
            lid: if port.is_infiniband() { port.lid() } else { 0 },
            is_infiniband: port.is_infiniband(),
        }
    }

    /// The route to a peer.
    ///
    /// # Errors [`RdmaError::Mismatch`] if the two are not on the same network.
    pub(crate) fn route(&self, peer: &Peer) -> Result<Route, RdmaError> {
        let mismatch = |what: &str| {
            let what = what.to_owned();
            Err(RdmaError::Mismatch { what })
        };
        match (self.is_infiniband, self.lid, peer.lid) {
            (false, _, 0) => {}
            (false, _, _) => {
                return mismatch(
                    "the local port is on Ethernet (RoCE), the peer's has a LID and is on InfiniBand",
                );
            }
            (true, 0, _) => {
                return mismatch(
                    "the local InfiniBand port has no LID, so it cannot connect: start a subnet manager (opensm)",
                );
            }
            (true, _, 0) => {
                return mismatch(
                    "the local port is on InfiniBand, the peer's has no LID: it is on Ethernet (RoCE), or its subnet has no manager",
                );
            }
            (true, _, _) if self.gid.gid()[..8] != peer.gid[..8] => {
                return mismatch(
                    "the two ports are in different InfiniBand subnets: routing between subnets is not supported",
                );
            }
            (true, _, _) => {}
        }
        Ok(Route {
            port: self.port,
            // In range: checked when it was chosen.
            source: self.gid.index() as u8,
            lid: peer.lid,
            is_global: !self.is_infiniband,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROCE_V1: u32 = 1;
    const INFINIBAND: u32 = 0;

    fn gid(prefix: u8, last: u8) -> [u8; 16] {
        let mut gid = [0; 16];
        (gid[0], gid[7], gid[15]) = (0xfe, prefix, last);
        gid
    }

    fn ipv4(last: u8) -> [u8; 16] {
        let mut gid = [0; 16];
        (gid[10], gid[11], gid[12], gid[15]) = (0xff, 0xff, 10, last);
        gid
    }

    #[test]
    fn a_port_is_the_one_given_or_the_first_that_is_active() {
        let port = |active| PortAttr::made_up(active, true, 7);
        let ports = [(1, port(false)), (2, port(true)), (3, port(true))];
        let chosen = |place: Place| place.choose_port(&ports).map(|(number, _)| number);
        assert_eq!(chosen(Place::default()), Some(2));
        assert_eq!(chosen(Place::default().port(3)), Some(3));
        assert_eq!(
            chosen(Place::default().port(1)),
            Some(1),
            "given, though down"
        );
        assert_eq!(chosen(Place::default().port(4)), None);
        let down = Place::default().choose_port(&ports[..1]);
        assert_eq!(down.map(|(number, _)| number), Some(1));
    }

    #[test]
    fn a_gid_is_the_one_given_or_the_one_that_routes() {
        let gids = [
            GidEntry::made_up(gid(0, 1), 0, 1, ROCE_V1),
            GidEntry::made_up(gid(0, 1), 1, 1, GID_ROCE_V2),
            GidEntry::made_up(ipv4(1), 2, 1, ROCE_V1),
            GidEntry::made_up(ipv4(1), 3, 1, GID_ROCE_V2),
            GidEntry::made_up(ipv4(2), 4, 1, GID_ROCE_V2),
            GidEntry::made_up(ipv4(3), 0, 2, GID_ROCE_V2),
            GidEntry::made_up([0; 16], 5, 1, GID_ROCE_V2),
            GidEntry::made_up(ipv4(4), 256, 1, GID_ROCE_V2),
        ];
        let chosen = |place: Place, port| place.choose_gid(port, &gids).map(GidEntry::index);
        assert_eq!(chosen(Place::default(), 1), Some(3));
        assert_eq!(chosen(Place::default(), 2), Some(0));
        assert_eq!(chosen(Place::default(), 3), None);
        assert_eq!(chosen(Place::default().gid_index(1), 1), Some(1));
        assert_eq!(chosen(Place::default().gid_index(5), 1), None, "all zeros");
        assert_eq!(chosen(Place::default().gid_index(9), 1), None);
    }

    fn placed(infiniband: bool, lid: u16, gid: [u8; 16]) -> Placed {
        let entry = GidEntry::made_up(gid, 3, 2, INFINIBAND);
        Placed::new(2, &PortAttr::made_up(true, infiniband, lid), entry)
    }

    fn peer(lid: u16, gid: [u8; 16]) -> Peer {
        Peer {
            gid,
            lid,
            queue: 17,
            sequence: 1,
            mtu: 3,
        }
    }

    #[test]
    fn ethernet_routes_by_gid_and_infiniband_by_lid() {
        let ethernet = placed(false, 0, ipv4(1)).route(&peer(0, ipv4(2))).unwrap();
        let expected = Route {
            port: 2,
            source: 3,
            lid: 0,
            is_global: true,
        };
        assert_eq!(ethernet, expected);
        // A driver may leave an arbitrary value in the field.
        assert_eq!(placed(false, 9, ipv4(1)).lid, 0);
        let infiniband = placed(true, 7, gid(1, 1)).route(&peer(8, gid(1, 2)));
        let expected = Route {
            lid: 8,
            is_global: false,
            ..expected
        };
        assert_eq!(infiniband.unwrap(), expected);
    }

    #[test]
    fn ends_of_two_networks_are_told_apart() {
        for (here, there, said) in [
            (
                placed(false, 0, ipv4(1)),
                peer(8, gid(1, 2)),
                "the peer's has a LID",
            ),
            (
                placed(true, 7, gid(1, 1)),
                peer(0, ipv4(2)),
                "the peer's has no LID",
            ),
            (placed(true, 0, gid(1, 1)), peer(8, gid(1, 2)), "opensm"),
            (
                placed(true, 7, gid(1, 1)),
                peer(8, gid(2, 2)),
                "different InfiniBand subnets",
            ),
        ] {
            let refused = here.route(&there).unwrap_err().to_string();
            assert!(refused.contains(said), "{refused}");
        }
    }
}
