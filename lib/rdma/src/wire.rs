//! The messages between the two ends of a connection: an end's address, and the memory that its peer may use.
//! Everything received is checked here.

use crate::error::RdmaError;
use crate::sys::verbs::Peer;
use peerbuf::error::BufferError;

/// LIDs from here on are multicast (InfiniBand architecture, volume 1, 4.1.3).
const FIRST_MULTICAST_LID: u16 = 0xc000;

/// The address of one end of a connection, for its peer. 32 bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub(crate) peer: Peer,
}

impl Address {
    /// Encodes it for the peer: the GID, the queue pair number and the first packet sequence number (32 bits
    /// each, big-endian), the code of the port's MTU, a zero, the port's LID (16 bits, 0 on Ethernet),
    /// zeroes.
    pub fn to_bytes(&self) -> [u8; 32] {
        let Peer {
            gid,
            lid,
            queue,
            sequence,
            mtu,
        } = self.peer;
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&gid);
        bytes[16..20].copy_from_slice(&queue.to_be_bytes());
        bytes[20..24].copy_from_slice(&sequence.to_be_bytes());
        bytes[24] = mtu as u8;
        bytes[26..28].copy_from_slice(&lid.to_be_bytes());
        bytes
    }

    /// Decodes and checks the peer's address, which is passed on to the card's driver.
    ///
    /// # Errors [`RdmaError::Malformed`].
    pub fn from_bytes(bytes: &[u8; 32]) -> Result<Address, RdmaError> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_be_bytes(word)
        };
        let mut gid = [0; 16];
        gid.copy_from_slice(&bytes[..16]);
        let (queue, sequence, mtu) = (word(16), word(20), bytes[24]);
        let lid = u16::from_be_bytes([bytes[26], bytes[27]]);
        let rules = [
            (gid != [0; 16], "an address of zeroes"),
            (gid[0] != 0xff, "a multicast address"),
            (queue > 1 && queue < 1 << 24, "no number of a queue pair"),
            (sequence < 1 << 24, "no number of a packet"),
            ((1..=5).contains(&mtu), "no code of an MTU"),
            (lid < FIRST_MULTICAST_LID, "a multicast LID"),
            (
                bytes[25] == 0 && bytes[28..] == [0; 4],
                "bytes that are not zero",
            ),
        ];
        for (holds, what) in rules {
            if !holds {
                let what = format!("the peer's address: {what}");
                return Err(RdmaError::Malformed { what });
            }
        }
        let mtu = mtu.into();
        let peer = Peer {
            gid,
            lid,
            queue,
            sequence,
            mtu,
        };
        Ok(Address { peer })
    }
}

/// Memory of the peer that this end may use: addresses and their key. 24 bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(alias = "rkey")]
pub struct Remote {
    pub(crate) address: u64,
    pub(crate) length: u64,
    pub(crate) key: u32,
}

impl Remote {
    pub(crate) fn new(address: u64, length: u64, key: u32) -> Remote {
        Remote {
            address,
            length,
            key,
        }
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True if it is empty.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Part of it; `offset` is relative to its start.
    ///
    /// # Errors [`BufferError::OutOfRange`] if the bytes are not all inside.
    pub fn slice(&self, offset: u64, length: u64) -> Result<Remote, BufferError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => Ok(Remote {
                // Cannot overflow: `from_bytes` or the local registration has checked the end.
                address: self.address + offset,
                length,
                key: self.key,
            }),
            _ => Err(BufferError::OutOfRange {
                object: "the peer's buffer".into(),
                offset,
                length,
                size: self.length,
            }),
        }
    }

    /// Encodes it for the peer: address and length (64 bits), key (32 bits), big-endian, and zeroes.
    pub fn to_bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.address.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.length.to_be_bytes());
        bytes[16..20].copy_from_slice(&self.key.to_be_bytes());
        bytes
    }

    /// Decodes the peer's memory.
    ///
    /// # Errors [`RdmaError::Malformed`] if the end exceeds 64 bits.
    pub fn from_bytes(bytes: &[u8; 24]) -> Result<Remote, RdmaError> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_be_bytes(word)
        };
        let (address, length, last) = (word(0), word(8), word(16));
        if address.checked_add(length).is_none() || last & 0xffff_ffff != 0 {
            let what =
                "the peer's memory range exceeds 64 bits, or its reserved bytes are not zero"
                    .into();
            return Err(RdmaError::Malformed { what });
        }
        Ok(Remote::new(address, length, (last >> 32) as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> Address {
        let peer = Peer {
            gid: [7; 16],
            lid: 0x1234,
            queue: 17,
            sequence: 0xff_ffff,
            mtu: 3,
        };
        Address { peer }
    }

    #[test]
    fn an_address_comes_back_from_the_wire() {
        let bytes = address().to_bytes();
        assert_eq!(Address::from_bytes(&bytes), Ok(address()));
    }

    #[test]
    fn a_forged_address_is_refused() {
        let good = address().to_bytes();
        for (at, byte) in [
            (16, 1),
            (20, 1),
            (24, 0),
            (24, 6),
            (25, 1),
            (26, 0xc0),
            (28, 1),
            (31, 1),
            (0, 0xff),
        ] {
            let mut bytes = good;
            bytes[at] = byte;
            assert!(Address::from_bytes(&bytes).is_err(), "byte {at} is {byte}");
        }
        assert!(Address::from_bytes(&[0; 32]).is_err());
    }

    #[test]
    fn remote_memory_comes_back_and_cannot_wrap() {
        let remote = Remote::new(4096, 1 << 33, 77);
        assert_eq!(Remote::from_bytes(&remote.to_bytes()), Ok(remote));
        let part = remote.slice(1 << 32, 5).unwrap();
        assert_eq!((part.address, part.len()), (4096 + (1 << 32), 5));
        assert!(remote.slice(1 << 33, 1).is_err());
        assert!(remote.slice(u64::MAX, 2).is_err());
        let wraps = Remote::new(u64::MAX, 2, 0).to_bytes();
        assert!(Remote::from_bytes(&wraps).is_err());
        let mut padded = remote.to_bytes();
        padded[23] = 1;
        assert!(Remote::from_bytes(&padded).is_err());
    }
}
