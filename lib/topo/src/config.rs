//! Parses a function's configuration space, as far as it could be read.
//!
//! Without root, sysfs gives only the first 64 bytes; the rest is then unknown. Offsets are those of the PCI
//! Express specification, with the names of `include/uapi/linux/pci_regs.h`.

use crate::machine::{Acs, Link, Port};

/// A configuration space, or its first bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config<'a> {
    bytes: &'a [u8],
    /// Its full length, if known.
    whole: Option<usize>,
}

impl<'a> Config<'a> {
    pub(crate) fn new(bytes: &'a [u8], whole: Option<usize>) -> Config<'a> {
        Config { bytes, whole }
    }

    fn byte(&self, at: usize) -> Option<u8> {
        self.bytes.get(at).copied()
    }

    fn word(&self, at: usize) -> Option<u16> {
        let bytes = self.bytes.get(at..at.checked_add(2)?)?;
        Some(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn long(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// Vendor ID and device ID. A virtual function has none here.
    pub(crate) fn id(&self) -> Option<(u16, u16)> {
        let id = (self.word(0)?, self.word(2)?);
        (id.0 != 0xffff).then_some(id)
    }

    /// The class code.
    pub(crate) fn class(&self) -> Option<u32> {
        Some(self.long(8)? >> 8)
    }

    /// The offset of a capability in the first 256 bytes: `None` if unreadable, `Some(None)` if absent.
    fn capability(&self, wanted: u8) -> Option<Option<usize>> {
        // PCI_STATUS_CAP_LIST
        if self.word(0x06)? & 0x10 == 0 {
            return Some(None);
        }
        let mut at = usize::from(self.byte(0x34)? & 0xfc);
        // At most as many as fit, so that a cyclic list ends.
        for _ in 0..48 {
            if at < 0x40 {
                return Some(None);
            }
            if self.byte(at)? == wanted {
                return Some(Some(at));
            }
            at = usize::from(self.byte(at + 1)? & 0xfc);
        }
        Some(None)
    }

    /// The PCI Express device or port type.
    pub(crate) fn port(&self) -> Option<Port> {
        let Some(express) = self.capability(0x10)? else {
            return Some(Port::Conventional);
        };
        Some(match self.word(express + 2)? >> 4 & 0xf {
            0x4 => Port::RootPort,
            0x5 => Port::Upstream,
            0x6 => Port::Downstream,
            0x7 | 0x8 => Port::Bridge,
            0x9 | 0xa => Port::RootComplex,
            _ => Port::Endpoint,
        })
    }

    /// The link, if it has one.
    pub(crate) fn link(&self) -> Option<Link> {
        let express = self.capability(0x10)??;
        let (most, now) = (self.long(express + 0x0c)?, self.word(express + 0x12)?);
        let now = u32::from(now);
        let width = |register: u32| (register >> 4 & 0x3f) as u8;
        (width(now) != 0).then_some(Link {
            speed: speed(now & 0xf)?,
            width: width(now),
            most: speed(most & 0xf).map(|speed| (speed, width(most))),
        })
    }

    /// The offset of an extended capability: `None` if unreadable, `Some(None)` if absent.
    fn extended(&self, wanted: u16) -> Option<Option<usize>> {
        // Conventional PCI has only 256 bytes, and so has a machine that cannot access the rest.
        if self.whole == Some(256) && self.bytes.len() == 256 {
            return Some(None);
        }
        let mut at = 0x100;
        for _ in 0..480 {
            let header = self.long(at)?;
            if header == 0 || header == u32::MAX {
                return Some(None);
            }
            if header as u16 == wanted {
                return Some(Some(at));
            }
            at = (header >> 20 & 0xffc) as usize;
            if at < 0x100 {
                return Some(None);
            }
        }
        Some(None)
    }

    /// The access control services.
    pub(crate) fn acs(&self) -> Option<Acs> {
        match self.extended(0x0d)? {
            None => Some(Acs::Absent),
            Some(at) => self.word(at + 6).map(Acs::Control),
        }
    }

    /// The largest size of each resizable BAR.
    pub(crate) fn resizable(&self) -> [Option<u64>; 6] {
        let mut most = [None; 6];
        if let Some(Some(at)) = self.extended(0x15) {
            let registers = self.long(at + 8).map_or(0, |control| control >> 5 & 0x7);
            for number in 0..registers as usize {
                let sizes = self.long(at + 4 + 8 * number).map(|sizes| sizes >> 4);
                let control = self.long(at + 8 + 8 * number);
                if let (Some(sizes), Some(control)) = (sizes, control)
                    && let Some(place) = most.get_mut((control & 0x7) as usize)
                {
                    // Bit 0 is 1 MiB.
                    *place = sizes.checked_ilog2().map(|bit| 1 << (20 + bit));
                }
            }
        }
        most
    }
}

/// The speed in tenths of GT/s.
fn speed(code: u32) -> Option<u16> {
    [25, 50, 80, 160, 320, 640]
        .get(code.checked_sub(1)? as usize)
        .copied()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A PCI Express function's configuration space of 4096 bytes, with ACS control bits.
    pub(crate) fn express(kind: u16, acs: Option<u16>) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[0..4].copy_from_slice(&[0x86, 0x80, 0x30, 0x20]);
        bytes[6] = 0x10;
        bytes[0x34] = 0x40;
        bytes[0x40] = 0x10;
        bytes[0x42..0x44].copy_from_slice(&(kind << 4 | 2).to_le_bytes());
        bytes[0x4c..0x50].copy_from_slice(&0x0000_0104_u32.to_le_bytes());
        bytes[0x52..0x54].copy_from_slice(&0x0083_u16.to_le_bytes());
        if let Some(control) = acs {
            bytes[0x100..0x104].copy_from_slice(&0x1401_0001_u32.to_le_bytes());
            bytes[0x140..0x144].copy_from_slice(&0x0001_000d_u32.to_le_bytes());
            bytes[0x146..0x148].copy_from_slice(&control.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn what_lies_beyond_the_bytes_is_unknown_and_not_absent() {
        let whole = express(6, Some(0x1d));
        let config = Config::new(&whole, Some(4096));
        assert_eq!(config.acs(), Some(Acs::Control(0x1d)));
        assert_eq!(config.port(), Some(Port::Downstream));
        let link = config.link().unwrap();
        assert_eq!(link.to_string(), "x8 8 GT/s (of x16 16)");
        let start = Config::new(&whole[..64], Some(4096));
        assert_eq!(
            (start.acs(), start.port(), start.link()),
            (None, None, None)
        );
        assert_eq!(start.id(), Some((0x8086, 0x2030)));
        let copied = Config::new(&whole[..256], None);
        assert_eq!(
            (copied.acs(), copied.port()),
            (None, Some(Port::Downstream))
        );
        let conventional = Config::new(&whole[..256], Some(256));
        assert_eq!(conventional.acs(), Some(Acs::Absent));
        let none = express(6, None);
        assert_eq!(Config::new(&none, Some(4096)).acs(), Some(Acs::Absent));
    }

    #[test]
    fn any_bytes_are_read_without_a_panic_and_lists_that_go_round_end() {
        let mut round = express(4, Some(4));
        round[0x40..0x42].copy_from_slice(&[0x05, 0x40]);
        round[0x140..0x144].copy_from_slice(&0x1401_0001_u32.to_le_bytes());
        let config = Config::new(&round, Some(4096));
        assert_eq!(config.port(), Some(Port::Conventional));
        assert_eq!(config.acs(), Some(Acs::Absent));
        for end in 0..400 {
            for filling in [0x00, 0x10, 0x40, 0xfc, 0xff] {
                let bytes = vec![filling; end];
                let config = Config::new(&bytes, None);
                let _ = (config.id(), config.class(), config.port(), config.link());
                let _ = (config.acs(), config.resizable());
            }
        }
    }

    #[test]
    fn a_resizable_bar_tells_its_largest_size() {
        let mut bytes = express(0, None);
        bytes[0x100..0x104].copy_from_slice(&0x0001_0015_u32.to_le_bytes());
        // BAR 2 with 256 MiB to 16 GiB, one register.
        bytes[0x104..0x108].copy_from_slice(&(0x7f00_u32 << 4).to_le_bytes());
        bytes[0x108..0x10c].copy_from_slice(&0x22_u32.to_le_bytes());
        let most = Config::new(&bytes, Some(4096)).resizable();
        assert_eq!(most, [None, None, Some(16 << 30), None, None, None]);
    }
}
