//! The message that hands over a buffer: one fixed layout, checked field by field.
//!
//! Both ends are on one machine, so numbers are in its byte order. A field that is not used is
//! zero, and refused otherwise, so that a later version can give it a meaning.

use bytemuck::{Pod, Zeroable};

use crate::buffer::{BufferRange, Kind, Provenance};
use crate::error::ShareError;
use crate::plan::topology::PciAddress;

const MAGIC: [u8; 8] = *b"peerbuf\0";
const VERSION: u32 = 1;
/// The only type of message so far.
const OFFER: u32 = 1;

/// A dma-buf's descriptor comes with the message; it is the first.
const HAS_DMABUF: u32 = 1 << 0;
/// The descriptor of the memfd that holds the bytes comes with the message, after the dma-buf's.
const HAS_HOST_MEMORY: u32 = 1 << 1;

const NO_BAR: u32 = u32::MAX;

/// `offset` and `length` are the range's, `size` is the whole buffer's, all in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Offer {
    magic: [u8; 8],
    version: u32,
    message: u32,
    bytes: u32,
    descriptors: u32,
    kind: u32,
    bar: u32,
    offset: u64,
    length: u64,
    size: u64,
    /// `DDDD:BB:DD.F`, padded with zeros; all zeros where there is none.
    device: [u8; 16],
    name: [u8; 96],
}

pub(super) const OFFER_SIZE: usize = size_of::<Offer>();

/// An offer whose every field makes sense. Its descriptors are still to be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checked {
    pub(super) provenance: Provenance,
    pub(super) has_dmabuf: bool,
    pub(super) has_host_memory: bool,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) size: u64,
}

impl Checked {
    pub(super) fn descriptors(&self) -> usize {
        usize::from(self.has_dmabuf) + usize::from(self.has_host_memory)
    }
}

pub(super) fn encode(range: &BufferRange) -> Offer {
    let buffer = range.buffer();
    let provenance = buffer.provenance();
    let mut offer = Offer {
        magic: MAGIC,
        version: VERSION,
        message: OFFER,
        bytes: OFFER_SIZE as u32,
        descriptors: 0,
        kind: provenance.kind.number(),
        bar: provenance.bar.map_or(NO_BAR, u32::from),
        offset: range.offset(),
        length: range.len(),
        size: buffer.size(),
        device: [0; 16],
        name: [0; 96],
    };
    if buffer.dmabuf().is_some() {
        offer.descriptors |= HAS_DMABUF;
    }
    if buffer.host_memory().is_some() {
        offer.descriptors |= HAS_HOST_MEMORY;
    }
    if let Some(device) = provenance.device {
        put_text(&mut offer.device, &device.to_string());
    }
    put_text(&mut offer.name, &provenance.name);
    offer
}

pub(super) fn decode(message: &[u8]) -> Result<Checked, ShareError> {
    let wrong = |what: String| Err(ShareError::Malformed { what });
    // The magic number and version come first: they are where every version has them.
    if message.get(..8) != Some(&MAGIC[..]) {
        return wrong("it does not begin with peerbuf's magic number".into());
    }
    let version = message.get(8..12).map_or(0, |bytes| {
        u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    });
    if version != VERSION {
        return wrong(format!(
            "its version is {version}, this library speaks {VERSION}"
        ));
    }
    let Ok(offer) = bytemuck::try_pod_read_unaligned::<Offer>(message) else {
        return wrong(format!(
            "it has {} bytes, an offer has {OFFER_SIZE}",
            message.len()
        ));
    };
    if offer.message != OFFER {
        return wrong(format!("its type {} is unknown", offer.message));
    }
    if offer.bytes as usize != OFFER_SIZE {
        return wrong(format!(
            "it says it has {} bytes, and has {OFFER_SIZE}",
            offer.bytes
        ));
    }
    let Some(kind) = Kind::from_number(offer.kind) else {
        return wrong(format!("the kind of buffer {} is unknown", offer.kind));
    };
    let has_dmabuf = offer.descriptors & HAS_DMABUF != 0;
    let has_host_memory = offer.descriptors & HAS_HOST_MEMORY != 0;
    if kind.descriptors() != (has_dmabuf, has_host_memory)
        || offer.descriptors & !(HAS_DMABUF | HAS_HOST_MEMORY) != 0
    {
        return wrong(format!(
            "descriptors {:#x} do not go with {kind:?}",
            offer.descriptors
        ));
    }
    match offer.offset.checked_add(offer.length) {
        Some(end) if end <= offer.size => {}
        _ => {
            return wrong(format!(
                "{} bytes at offset {} are not within the buffer's {}",
                offer.length, offer.offset, offer.size
            ));
        }
    }
    let bar = match offer.bar {
        NO_BAR => None,
        bar @ 0..=5 if kind.is_device_memory() => Some(bar as u8),
        bar => return wrong(format!("BAR {bar} does not go with {kind:?}")),
    };
    let Some(device) = text(&offer.device) else {
        return wrong("the device's address is not text".into());
    };
    let device = match device {
        "" => None,
        address => match address.parse::<PciAddress>() {
            Ok(address) => Some(address),
            Err(error) => return wrong(error.to_string()),
        },
    };
    if !kind.allows_device(device.is_some()) {
        return wrong(format!(
            "{kind:?} and a device's address do not go together"
        ));
    }
    let Some(name) = text(&offer.name) else {
        return wrong("the name is not text".into());
    };
    Ok(Checked {
        provenance: Provenance {
            kind,
            device,
            bar,
            name: name.to_owned(),
        },
        has_dmabuf,
        has_host_memory,
        offset: offer.offset,
        length: offer.length,
        size: offer.size,
    })
}

/// Puts as much of the text as fits, ending between characters.
fn put_text(field: &mut [u8], text: &str) {
    let mut end = text.len().min(field.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // A NUL would end the text early, and what follows would be refused as padding.
    let text = &text.as_bytes()[..end];
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(end);
    field[..end].copy_from_slice(&text[..end]);
}

/// The text in a zero-padded field. `None` when it is not UTF-8, holds control characters, which
/// a terminal would obey, or is followed by something.
fn text(field: &[u8]) -> Option<&str> {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    let (text, padding) = field.split_at(end);
    let text = std::str::from_utf8(text).ok()?;
    (padding.iter().all(|&byte| byte == 0) && !text.chars().any(char::is_control)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::memfd;

    fn offer() -> Offer {
        encode(
            &memfd::export("a name", 8192)
                .unwrap()
                .range(100, 200)
                .unwrap(),
        )
    }

    fn refusal(offer: &Offer) -> String {
        decode(bytemuck::bytes_of(offer)).unwrap_err().to_string()
    }

    #[test]
    fn an_offer_arrives_as_it_was_sent() {
        let checked = decode(bytemuck::bytes_of(&offer())).unwrap();
        assert_eq!(
            (checked.offset, checked.length, checked.size),
            (100, 200, 8192)
        );
        assert_eq!(checked.provenance.name, "a name");
        assert_eq!(checked.provenance.kind, Kind::Memfd);
        assert_eq!(checked.descriptors(), 1);
    }

    #[test]
    fn the_layout_does_not_change() {
        assert_eq!(OFFER_SIZE, 168);
        assert_eq!(std::mem::offset_of!(Offer, bytes), 16);
        assert_eq!(std::mem::offset_of!(Offer, offset), 32);
        assert_eq!(std::mem::offset_of!(Offer, device), 56);
        assert_eq!(std::mem::offset_of!(Offer, name), 72);
    }

    #[test]
    fn every_length_but_the_right_one_is_refused() {
        let whole = offer();
        let bytes = bytemuck::bytes_of(&whole);
        for length in 0..OFFER_SIZE {
            assert!(decode(&bytes[..length]).is_err(), "{length} bytes");
        }
        assert!(decode(&[bytes, &[0]].concat()).is_err());
    }

    #[test]
    fn each_bad_field_is_refused_by_name() {
        let good = offer();
        let bar = |bar, device: &[u8; 16]| Offer {
            kind: 1,
            descriptors: HAS_DMABUF,
            bar,
            device: *device,
            ..good
        };
        let real = b"0000:01:00.0\0\0\0\0";
        assert!(decode(bytemuck::bytes_of(&bar(2, real))).is_ok());
        let cases: &[(Offer, &str)] = &[
            (
                Offer {
                    magic: *b"peerbuf1",
                    ..good
                },
                "magic",
            ),
            (Offer { version: 2, ..good }, "version is 2"),
            (Offer { message: 7, ..good }, "type 7"),
            (Offer { bytes: 12, ..good }, "12 bytes"),
            (
                Offer {
                    descriptors: 0,
                    ..good
                },
                "descriptors",
            ),
            (
                Offer {
                    descriptors: HAS_DMABUF,
                    ..good
                },
                "descriptors",
            ),
            (
                Offer {
                    descriptors: HAS_HOST_MEMORY | 4,
                    ..good
                },
                "descriptors",
            ),
            (Offer { kind: 0, ..good }, "kind of buffer 0"),
            (Offer { kind: 10, ..good }, "kind of buffer 10"),
            (Offer { bar: 3, ..good }, "BAR 3"),
            (
                Offer {
                    offset: u64::MAX,
                    ..good
                },
                "not within",
            ),
            (
                Offer {
                    offset: 8000,
                    ..good
                },
                "not within",
            ),
            (
                Offer {
                    length: u64::MAX - 99,
                    ..good
                },
                "not within",
            ),
            (
                Offer {
                    device: *real,
                    ..good
                },
                "address",
            ),
            (
                Offer {
                    device: [0xff; 16],
                    ..good
                },
                "not text",
            ),
            (
                Offer {
                    name: [0xff; 96],
                    ..good
                },
                "name",
            ),
            (
                Offer {
                    name: [0x1b; 96],
                    ..good
                },
                "name",
            ),
            (bar(6, real), "BAR 6"),
            (bar(2, &[0; 16]), "address"),
            (bar(2, b"nonsense\0\0\0\0\0\0\0\0"), "nonsense"),
            (bar(2, b"0000:01:00.0\0\0\0x"), "not text"),
        ];
        for (offer, words) in cases {
            let refusal = refusal(offer);
            assert!(
                refusal.contains(words),
                "{refusal:?} does not say {words:?}"
            );
        }
    }

    #[test]
    fn any_flip_of_a_byte_is_decoded_or_refused_without_a_panic() {
        let good = offer();
        for at in 0..OFFER_SIZE {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = bytemuck::bytes_of(&good).to_vec();
                bytes[at] = value;
                if let Ok(checked) = decode(&bytes) {
                    assert!(checked.offset + checked.length <= checked.size);
                }
            }
        }
    }

    #[test]
    fn a_long_name_is_cut_between_characters() {
        let buffer = memfd::export(&"ä".repeat(80), 4096).unwrap();
        let checked = decode(bytemuck::bytes_of(&encode(&buffer.whole()))).unwrap();
        assert_eq!(checked.provenance.name, "ä".repeat(48));
    }
}
