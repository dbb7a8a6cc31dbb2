//! The messages: fixed layouts, each checked field by field.
//!
//! Both ends are on one machine, so numbers have the machine's byte order. An unused field is
//! zero. The receiver refuses any other value, so that a later version can give the field a
//! meaning.
//!
//! Every message is a [`Header`] and then `count` records of one kind, back to back.
//! Descriptors are in the order of their records.

use bytemuck::{Pod, Zeroable};

use super::said::Said;
use super::{Grant, Placement};
use crate::buffer::{Buffer, BufferRange, Kind, Provenance};
use crate::error::ShareError;
use crate::topology::PciAddress;

const MAGIC: [u8; 8] = *b"peerbuf\0";
const VERSION: u32 = 2;

/// The type of a message, a number in its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Message {
    /// One range, given away for good ([`Description`]).
    HandOver,
    /// Subscriber to publisher, the first message: no records.
    Hello,
    /// Publisher to subscriber: buffers that the subscriber may use from now on ([`Entry`]).
    Offer,
    /// Like `Offer`, possibly without records; the publisher asks for an acknowledgement.
    LastOffer,
    /// Publisher to subscriber: buffers to be returned ([`Note`]; the value is the time limit
    /// in milliseconds).
    Invalidate,
    /// Publisher to subscriber: buffers to be returned that will not be offered again
    /// ([`Note`], with the value of `Invalidate`).
    Withdraw,
    /// Publisher to subscriber, the last message: the subscriber was cut off ([`Note`]; the
    /// value is a [`Farewell`]).
    Farewell,
    /// Subscriber to publisher, after a `LastOffer`: the number of offers that have arrived
    /// since the start ([`Note`]; its id is the number, the other fields are zero).
    Accepted,
    /// Subscriber to publisher: buffers that the subscriber no longer uses ([`Note`]; the value
    /// is zero, or 1 if the offer was unusable).
    Released,
}

const MESSAGES: [(u32, Message, usize); 9] = [
    (1, Message::HandOver, size_of::<Description>()),
    (2, Message::Hello, 0),
    (3, Message::Offer, size_of::<Entry>()),
    (4, Message::Invalidate, size_of::<Note>()),
    (5, Message::Withdraw, size_of::<Note>()),
    (6, Message::Farewell, size_of::<Note>()),
    (7, Message::Accepted, size_of::<Note>()),
    (8, Message::Released, size_of::<Note>()),
    (9, Message::LastOffer, size_of::<Entry>()),
];

/// Maximum number of records in one message: each offer has a descriptor, and the kernel takes
/// 253.
pub(super) const MAX_RECORDS: usize = 253;

/// The longest message.
pub(super) const MAX_MESSAGE: usize = size_of::<Header>() + MAX_RECORDS * size_of::<Entry>();

/// The record has a dma-buf descriptor, the first of the record's descriptors.
const HAS_DMABUF: u32 = 1 << 0;
/// The record has a descriptor of the memfd that holds the bytes, after the dma-buf's
/// descriptor.
const HAS_HOST_MEMORY: u32 = 1 << 1;

const NO_BAR: u32 = u32::MAX;

/// The start of every message, in this version and all later ones.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Header {
    magic: [u8; 8],
    version: u32,
    message: u32,
    /// The length of the whole message, in bytes.
    bytes: u32,
    /// Number of records.
    count: u32,
}

const HEADER_SIZE: usize = size_of::<Header>();

/// The length of a [`Message::HandOver`].
pub(super) const HAND_OVER_SIZE: usize = HEADER_SIZE + size_of::<Description>();

/// `offset` and `length` are the range's, `size` is the whole buffer's, all in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Description {
    descriptors: u32,
    kind: u32,
    bar: u32,
    placement: u32,
    offset: u64,
    length: u64,
    size: u64,
    /// `DDDD:BB:DD.F`, padded with zeros; all zeros if there is no device.
    device: [u8; 16],
    name: [u8; 96],
}

/// One buffer of an offer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(super) struct Entry {
    pub(super) id: u64,
    pub(super) generation: u64,
    /// 1 for reading only, 2 for reading and writing.
    access: u32,
    reserved: u32,
    /// The buffer's published name.
    name: [u8; MAX_NAME],
    description: Description,
}

/// The longest published name, in bytes.
pub(super) const MAX_NAME: usize = 64;

/// A statement about one generation of one buffer.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct Note {
    pub(super) id: u64,
    pub(super) generation: u64,
    pub(super) value: u32,
    pub(super) reserved: u32,
}

/// The reason why a subscriber was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Farewell {
    Late = 1,
    Rubbish = 2,
    Unreachable = 3,
    Silent = 4,
}

impl Farewell {
    /// The reason in words for the subscriber.
    pub(super) fn explain(number: u32) -> &'static str {
        match number {
            n if n == Farewell::Late as u32 => "it did not return a buffer in time",
            n if n == Farewell::Rubbish as u32 => "it broke the protocol",
            n if n == Farewell::Unreachable as u32 => "nothing could be sent to it",
            n if n == Farewell::Silent as u32 => {
                "it sent no hello in time: connect to a publisher with `Subscriber::connect`"
            }
            _ => "for a reason that this library does not know",
        }
    }
}

impl Note {
    pub(super) fn new(id: u64, generation: u64, value: u32) -> Note {
        Note {
            id,
            generation,
            value,
            reserved: 0,
        }
    }
}

/// A description with all fields checked. Its descriptors are unchecked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Checked<'d> {
    kind: Kind,
    device: Option<PciAddress>,
    bar: Option<u8>,
    name: &'d str,
    pub(super) placement: Placement,
    pub(super) has_dmabuf: bool,
    pub(super) has_host_memory: bool,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) size: u64,
}

impl Checked<'_> {
    pub(super) fn provenance(&self) -> Provenance {
        Provenance {
            kind: self.kind,
            device: self.device,
            bar: self.bar,
            name: self.name.to_owned(),
        }
    }

    pub(super) fn descriptors(&self) -> usize {
        usize::from(self.has_dmabuf) + usize::from(self.has_host_memory)
    }
}

/// One buffer of an offer, with all fields checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CheckedEntry<'e> {
    pub(super) id: u64,
    pub(super) generation: u64,
    pub(super) grant: Grant,
    pub(super) name: &'e str,
    pub(super) what: Checked<'e>,
}

impl Entry {
    /// Checks every field.
    pub(super) fn check(&self) -> Result<CheckedEntry<'_>, ShareError> {
        let grant = match self.access {
            1 => Grant::ReadOnly,
            2 => Grant::ReadWrite,
            unknown => return wrong(format!("the access {unknown} is unknown")),
        };
        if self.reserved != 0 {
            return wrong("a reserved field is not zero");
        }
        let Some(name) = text(&self.name) else {
            return wrong("the published name is not text");
        };
        Ok(CheckedEntry {
            id: self.id,
            generation: self.generation,
            grant,
            name,
            what: decode(&self.description)?,
        })
    }

    /// The same entry for a subscriber with this grant. For reading only, a buffer in system
    /// memory goes without its dma-buf, which cannot be made read-only.
    pub(super) fn granted(&self, grant: Grant) -> Entry {
        let mut entry = *self;
        match grant {
            Grant::ReadWrite => {}
            Grant::ReadOnly => {
                entry.access = 1;
                if entry.description.descriptors & HAS_HOST_MEMORY != 0 {
                    entry.description.descriptors = HAS_HOST_MEMORY;
                }
            }
            Grant::Nothing => entry.access = 0,
        }
        entry
    }

    /// The published name; empty if the field is not text.
    pub(super) fn name(&self) -> &str {
        text(&self.name).unwrap_or_default()
    }
}

/// Builds a message from the header and `records`.
pub(super) fn encode<R: Pod>(message: Message, records: &[R]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(&mut bytes, message, records);
    bytes
}

/// Like [`encode`], into an existing vector.
pub(super) fn encode_into<R: Pod>(bytes: &mut Vec<u8>, message: Message, records: &[R]) {
    let mut writing = begin(bytes);
    for record in records {
        writing.push(record);
    }
    writing.end(message);
}

/// A message under construction.
pub(super) struct Writing<'b> {
    bytes: &'b mut Vec<u8>,
    count: u32,
}

/// Begins a message in an existing vector.
pub(super) fn begin(bytes: &mut Vec<u8>) -> Writing<'_> {
    bytes.clear();
    bytes.resize(HEADER_SIZE, 0);
    Writing { bytes, count: 0 }
}

impl<'b> Writing<'b> {
    pub(super) fn push<R: Pod>(&mut self, record: &R) {
        self.bytes.extend_from_slice(bytemuck::bytes_of(record));
        self.count += 1;
    }

    /// Completes the message.
    pub(super) fn end(self, message: Message) -> &'b [u8] {
        let number = MESSAGES.iter().find(|(_, known, _)| *known == message);
        let header = Header {
            magic: MAGIC,
            version: VERSION,
            message: number.map_or(0, |(number, ..)| *number),
            bytes: self.bytes.len() as u32,
            count: self.count,
        };
        self.bytes[..HEADER_SIZE].copy_from_slice(bytemuck::bytes_of(&header));
        self.bytes
    }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, ShareError> {
    Err(ShareError::Malformed { what: what.into() })
}

/// Splits a message into its type and its records, after a check of their size and number.
pub(super) fn open(message: &[u8]) -> Result<(Message, &[u8]), ShareError> {
    // Every version has the magic number and the version at the same place.
    if message.get(..8) != Some(&MAGIC[..]) {
        return wrong("it does not begin with peerbuf's magic number");
    }
    let version = message.get(8..12).map_or(0, |bytes| {
        u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    });
    if version != VERSION {
        return wrong(format!(
            "its version is {version}, this library speaks {VERSION}"
        ));
    }
    let Some((header, records)) = message.split_at_checked(HEADER_SIZE) else {
        return wrong(format!(
            "it has {} bytes, a header has {HEADER_SIZE}",
            message.len()
        ));
    };
    let header: Header = bytemuck::pod_read_unaligned(header);
    let known = MESSAGES
        .iter()
        .find(|(number, ..)| *number == header.message);
    let Some(&(_, kind, record)) = known else {
        return wrong(format!("its type {} is unknown", header.message));
    };
    if header.bytes as usize != message.len() {
        return wrong(format!(
            "it says it has {} bytes, and has {}",
            header.bytes,
            message.len()
        ));
    }
    let count = header.count as usize;
    let right = match kind {
        Message::HandOver | Message::Farewell => count == 1,
        Message::Hello => count == 0,
        Message::LastOffer => (0..=MAX_RECORDS).contains(&count),
        _ => (1..=MAX_RECORDS).contains(&count),
    };
    if !right {
        return wrong(format!("{kind:?} cannot have {count} records"));
    }
    if records.len() != count * record {
        return wrong(format!(
            "{} bytes of records, {count} of {kind:?} have {}",
            records.len(),
            count * record
        ));
    }
    Ok((kind, records))
}

/// The notes in these records.
pub(super) fn notes(records: &[u8]) -> Result<Vec<Note>, ShareError> {
    let notes = records.chunks_exact(size_of::<Note>());
    let notes = notes.map(bytemuck::pod_read_unaligned::<Note>);
    notes
        .map(|note| match note.reserved {
            0 => Ok(note),
            _ => wrong("a reserved field is not zero"),
        })
        .collect()
}

/// Number of descriptors of an offer, read before the other fields are checked.
pub(super) fn announced(records: &[u8]) -> Result<usize, ShareError> {
    const AT: usize =
        std::mem::offset_of!(Entry, description) + std::mem::offset_of!(Description, descriptors);
    let mut all = 0;
    let mut seen = 0;
    for entry in records.chunks_exact(size_of::<Entry>()) {
        let descriptors: u32 = bytemuck::pod_read_unaligned(&entry[AT..AT + 4]);
        all += descriptors.count_ones() as usize;
        seen |= descriptors;
    }
    match seen & !(HAS_DMABUF | HAS_HOST_MEMORY) {
        0 => Ok(all),
        _ => wrong(format!("it announces unknown descriptors: {seen:#x}")),
    }
}

/// The entries of an offer with their numbers of descriptors, after a check of every field.
pub(super) fn entries(records: &[u8]) -> Result<Vec<(Entry, usize)>, ShareError> {
    let entries = records.chunks_exact(size_of::<Entry>());
    entries
        .map(|entry| {
            let entry: Entry = bytemuck::pod_read_unaligned(entry);
            let descriptors = entry.check()?.what.descriptors();
            Ok((entry, descriptors))
        })
        .collect()
}

/// The record of a [`Message::HandOver`], not yet decoded.
pub(super) fn hand_over(message: &[u8]) -> Result<Description, ShareError> {
    match open(message)? {
        (Message::HandOver, records) => Ok(bytemuck::pod_read_unaligned(records)),
        // The peer is a publisher, which lends and hands nothing over.
        (Message::Farewell, records) => {
            let why = notes(records)?.first().map_or(0, |note| note.value);
            let why = Farewell::explain(why);
            Err(ShareError::CutOff { why })
        }
        (other, _) => wrong(format!("{other:?} instead of a buffer")),
    }
}

/// Builds the entry of one generation, for a subscriber that may write.
pub(super) fn entry(
    id: u64,
    generation: u64,
    placement: Placement,
    name: &str,
    buffer: &Buffer,
) -> Entry {
    let mut field = [0; MAX_NAME];
    put_text(&mut field, name);
    Entry {
        id,
        generation,
        name: field,
        access: 2,
        reserved: 0,
        description: describe(&buffer.whole(), placement),
    }
}

pub(super) fn describe(range: &BufferRange, placement: Placement) -> Description {
    let buffer = range.buffer();
    let provenance = buffer.provenance();
    let mut description = Description {
        descriptors: 0,
        kind: provenance.kind.number(),
        bar: provenance.bar.map_or(NO_BAR, u32::from),
        placement: match placement {
            Placement::Unknown => 0,
            Placement::Device => 1,
            Placement::System => 2,
        },
        offset: range.offset(),
        length: range.len(),
        size: buffer.size(),
        device: [0; 16],
        name: [0; 96],
    };
    if buffer.dmabuf().is_some() {
        description.descriptors |= HAS_DMABUF;
    }
    if buffer.host_memory().is_some() {
        description.descriptors |= HAS_HOST_MEMORY;
    }
    if let Some(device) = provenance.device {
        put_text(&mut description.device, &device.to_string());
    }
    put_text(&mut description.name, &provenance.name);
    description
}

/// Checks every field of a description and decodes it.
pub(super) fn decode(description: &Description) -> Result<Checked<'_>, ShareError> {
    let Some(kind) = Kind::from_number(description.kind) else {
        return wrong(format!(
            "the kind of buffer {} is unknown",
            description.kind
        ));
    };
    let placement = match description.placement {
        0 => Placement::Unknown,
        1 => Placement::Device,
        2 => Placement::System,
        unknown => return wrong(format!("the placement {unknown} is unknown")),
    };
    let has_dmabuf = description.descriptors & HAS_DMABUF != 0;
    let has_host_memory = description.descriptors & HAS_HOST_MEMORY != 0;
    if !kind.allows_descriptors(has_dmabuf, has_host_memory)
        || description.descriptors & !(HAS_DMABUF | HAS_HOST_MEMORY) != 0
    {
        return wrong(format!(
            "{kind:?} cannot have the descriptors {:#x}",
            description.descriptors
        ));
    }
    match description.offset.checked_add(description.length) {
        Some(end) if end <= description.size => {}
        _ => {
            return wrong(format!(
                "{} bytes at offset {} are not within the buffer's {}",
                description.length, description.offset, description.size
            ));
        }
    }
    let bar = match description.bar {
        NO_BAR => None,
        bar @ 0..=5 if kind.is_device_memory() => Some(bar as u8),
        bar => return wrong(format!("{kind:?} cannot have BAR {bar}")),
    };
    let Some(device) = text(&description.device) else {
        return wrong("the device's address is not text");
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
            "the device's address is missing or not allowed for {kind:?}"
        ));
    }
    let Some(name) = text(&description.name) else {
        return wrong("the name is not text");
    };
    Ok(Checked {
        kind,
        device,
        bar,
        name,
        placement,
        has_dmabuf,
        has_host_memory,
        offset: description.offset,
        length: description.length,
        size: description.size,
    })
}

/// Copies as much of the text as fits, cut at a character boundary.
fn put_text(field: &mut [u8], text: &str) {
    let mut end = text.len().min(field.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    // A NUL would end the text early, and the receiver would refuse the rest as padding.
    let text = &text.as_bytes()[..end];
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(end);
    field[..end].copy_from_slice(&text[..end]);
}

/// The text in a zero-padded field. `None` if the field is not UTF-8, contains control
/// characters (a terminal would obey them), or has non-zero padding.
fn text(field: &[u8]) -> Option<&str> {
    let end = field
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(field.len());
    let (text, padding) = field.split_at(end);
    let text = std::str::from_utf8(text).ok()?;
    // Reading all of the padding takes fewer instructions than stopping early.
    let padded = padding.iter().fold(0, |all, byte| all | byte) == 0;
    (padded && !text.chars().any(char::is_control)).then_some(text)
}

/// Decodes a message as either end would. For tests.
pub(crate) fn decode_any(message: &[u8]) -> Result<Said, ShareError> {
    let (kind, records) = open(message)?;
    let mut said = Said::default();
    let describe = |said: &mut Said, what: &Checked<'_>| {
        said.ranges.push([what.offset, what.length, what.size]);
        said.bars.extend(what.bar);
        said.texts.push(what.name.to_owned());
        said.descriptors.push(what.descriptors());
    };
    match kind {
        Message::HandOver => describe(&mut said, &decode(&hand_over(message)?)?),
        Message::Hello => {}
        Message::Offer | Message::LastOffer => {
            announced(records)?;
            for (entry, _) in &entries(records)? {
                let entry = entry.check()?;
                describe(&mut said, &entry.what);
                said.texts.push(entry.name.to_owned());
            }
        }
        _ => said.notes = notes(records)?.len(),
    }
    Ok(said)
}

/// A valid message of each kind. For tests.
pub(crate) fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let mut name = [0; 96];
    put_text(&mut name, "a buffer");
    let mut device = [0; 16];
    put_text(&mut device, "0000:03:00.0");
    let bar = Description {
        descriptors: HAS_DMABUF,
        kind: Kind::Bar.number(),
        bar: 2,
        placement: 1,
        offset: 4096,
        length: 8192,
        size: 1 << 20,
        device,
        name,
    };
    let memory = Description {
        descriptors: HAS_DMABUF | HAS_HOST_MEMORY,
        kind: Kind::Udmabuf.number(),
        bar: NO_BAR,
        placement: 2,
        device: [0; 16],
        ..bar
    };
    let mut published = [0; MAX_NAME];
    put_text(&mut published, "published");
    let entry = |id, description| Entry {
        id,
        generation: 7,
        name: published,
        access: 2,
        reserved: 0,
        description,
    };
    // A publisher lends a whole buffer.
    let whole = |of: Description| Description {
        offset: 0,
        length: of.size,
        ..of
    };
    let (bar_whole, memory_whole) = (whole(bar), whole(memory));
    let wanted = [Note::new(1, 7, 1500), Note::new(2, 7, 1500)];
    let released = [Note::new(1, 7, 0), Note::new(2, 7, 1)];
    let cut_off = Note::new(0, 0, Farewell::Late as u32);
    vec![
        ("hand-over", encode(Message::HandOver, &[bar])),
        ("hand-over-memory", encode(Message::HandOver, &[memory])),
        ("hello", encode::<Note>(Message::Hello, &[])),
        (
            "offer",
            encode(
                Message::Offer,
                &[entry(1, bar_whole), entry(2, memory_whole)],
            ),
        ),
        ("invalidate", encode(Message::Invalidate, &wanted)),
        ("withdraw", encode(Message::Withdraw, &wanted[..1])),
        ("farewell", encode(Message::Farewell, &[cut_off])),
        ("last-offer", encode::<Entry>(Message::LastOffer, &[])),
        ("accepted", encode(Message::Accepted, &[Note::new(1, 0, 0)])),
        ("released", encode(Message::Released, &released)),
    ]
}

#[cfg(test)]
mod tests {
    use bytemuck::bytes_of;

    use super::*;
    use crate::export::memfd;

    fn description() -> Description {
        let mut name = [0; 96];
        put_text(&mut name, "a name");
        Description {
            descriptors: HAS_HOST_MEMORY,
            kind: Kind::Memfd.number(),
            bar: NO_BAR,
            placement: 2,
            offset: 100,
            length: 200,
            size: 8192,
            device: [0; 16],
            name,
        }
    }

    fn message() -> Vec<u8> {
        encode(Message::HandOver, &[description()])
    }

    fn offer() -> Vec<u8> {
        let mut name = [0; MAX_NAME];
        put_text(&mut name, "published");
        let entry = |id| Entry {
            id,
            generation: 7,
            access: 1,
            reserved: 0,
            name,
            description: description(),
        };
        encode(Message::Offer, &[entry(1), entry(2)])
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_buffer_is_described_as_it_is() {
        let buffer = memfd::export("a name", 8192).unwrap();
        let range = buffer.range(100, 200).unwrap();
        let described = describe(&range, Placement::System);
        assert_eq!(bytes_of(&described), bytes_of(&description()));
        let grant = Grant::ReadOnly;
        let whole = entry(1, 7, Placement::System, "published", &buffer).granted(grant);
        let expected = Description {
            offset: 0,
            length: 8192,
            ..description()
        };
        assert_eq!(bytes_of(&whole.description), bytes_of(&expected));
        let checked = whole.check().unwrap();
        assert_eq!((checked.id, checked.generation), (1, 7));
        assert_eq!((checked.grant, checked.name), (grant, "published"));
    }

    #[test]
    fn a_range_arrives_as_it_was_sent() {
        let description = hand_over(&message()).unwrap();
        let checked = decode(&description).unwrap();
        assert_eq!(
            (checked.offset, checked.length, checked.size),
            (100, 200, 8192)
        );
        assert_eq!(checked.provenance().name, "a name");
        assert_eq!(checked.provenance().kind, Kind::Memfd);
        assert_eq!(checked.placement, Placement::System);
        assert_eq!(checked.descriptors(), 1);
    }

    #[test]
    fn an_offer_and_notes_arrive_as_they_were_sent() {
        let message = offer();
        let (kind, records) = open(&message).unwrap();
        assert_eq!(kind, Message::Offer);
        let entries = entries(records).unwrap();
        assert_eq!((entries[0].1, entries[1].1), (1, 1));
        let entries = [&entries[0].0, &entries[1].0].map(|entry| entry.check().unwrap());
        assert_eq!((entries[0].id, entries[1].id), (1, 2));
        assert_eq!(
            (entries[1].generation, entries[1].grant),
            (7, Grant::ReadOnly)
        );
        assert_eq!(entries[1].name, "published");
        let sent = [Note::new(3, 4, 5), Note::new(6, 7, 8)];
        let message = encode(Message::Released, &sent);
        let (kind, records) = open(&message).unwrap();
        assert_eq!(
            (kind, notes(records).unwrap()),
            (Message::Released, sent.to_vec())
        );
    }

    #[test]
    fn the_layout_does_not_change() {
        assert_eq!((HEADER_SIZE, size_of::<Description>()), (24, 152));
        assert_eq!((size_of::<Entry>(), size_of::<Note>()), (240, 24));
        assert_eq!(std::mem::offset_of!(Header, bytes), 16);
        assert_eq!(std::mem::offset_of!(Description, offset), 16);
        assert_eq!(std::mem::offset_of!(Description, device), 40);
        assert_eq!(std::mem::offset_of!(Description, name), 56);
        assert_eq!(std::mem::offset_of!(Entry, name), 24);
        assert_eq!(std::mem::offset_of!(Entry, description), 88);
    }

    #[test]
    fn every_length_but_the_right_one_is_refused() {
        for whole in [
            message(),
            offer(),
            encode(Message::Released, &[Note::new(1, 1, 0)]),
        ] {
            for length in (0..whole.len()).step_by(if cfg!(miri) { 7 } else { 1 }) {
                assert!(decode_any(&whole[..length]).is_err(), "{length} bytes");
            }
            assert!(decode_any(&[&whole[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn each_bad_field_of_a_header_is_refused_by_name() {
        let good = message();
        let cases: &[(usize, &[u8], &str)] = &[
            (0, b"peerbuf1", "magic"),
            (8, &3u32.to_ne_bytes(), "version is 3"),
            (12, &99u32.to_ne_bytes(), "type 99"),
            (16, &12u32.to_ne_bytes(), "12 bytes"),
            (20, &2u32.to_ne_bytes(), "2 records"),
            (20, &0u32.to_ne_bytes(), "0 records"),
        ];
        for (at, bytes, words) in cases {
            let mut message = good.clone();
            message[*at..at + bytes.len()].copy_from_slice(bytes);
            let refusal = decode_any(&message).unwrap_err().to_string();
            assert!(
                refusal.contains(words),
                "{refusal:?} does not say {words:?}"
            );
        }
        let many = [Note::new(1, 1, 0); MAX_RECORDS + 1];
        assert!(decode_any(&encode(Message::Released, &many)).is_err());
        assert!(decode_any(&encode(Message::Released, &many[..MAX_RECORDS])).is_ok());
        let reserved = Note {
            reserved: 1,
            ..many[0]
        };
        assert!(decode_any(&encode(Message::Accepted, &[reserved])).is_err());
    }

    #[test]
    fn each_bad_field_of_a_description_is_refused_by_name() {
        let good = description();
        let bar = |bar, device: &[u8; 16]| Description {
            kind: 1,
            descriptors: HAS_DMABUF,
            bar,
            device: *device,
            ..good
        };
        let real = b"0000:01:00.0\0\0\0\0";
        assert!(decode(&bar(2, real)).is_ok());
        let with = |change: fn(&mut Description)| {
            let mut changed = good;
            change(&mut changed);
            changed
        };
        let cases = [
            (with(|d| d.descriptors = 0), "descriptors"),
            (with(|d| d.descriptors = HAS_DMABUF), "descriptors"),
            (with(|d| d.descriptors = HAS_HOST_MEMORY | 4), "descriptors"),
            (with(|d| d.kind = 0), "kind of buffer 0"),
            (with(|d| d.kind = 99), "kind of buffer 99"),
            (with(|d| d.placement = 3), "placement 3"),
            (with(|d| d.bar = 3), "BAR 3"),
            (with(|d| d.offset = u64::MAX), "not within"),
            (with(|d| d.offset = 8000), "not within"),
            (with(|d| d.length = u64::MAX - 99), "not within"),
            (with(|d| d.device = *b"0000:01:00.0\0\0\0\0"), "address"),
            (with(|d| d.device = [0xff; 16]), "not text"),
            (with(|d| d.name = [0xff; 96]), "name"),
            (with(|d| d.name = [0x1b; 96]), "name"),
            (bar(6, real), "BAR 6"),
            (bar(2, &[0; 16]), "address"),
            (bar(2, b"nonsense\0\0\0\0\0\0\0\0"), "nonsense"),
            (bar(2, b"0000:01:00.0\0\0\0x"), "not text"),
        ];
        for (description, words) in cases {
            let refusal = decode(&description).unwrap_err().to_string();
            assert!(
                refusal.contains(words),
                "{refusal:?} does not say {words:?}"
            );
        }
    }

    #[test]
    fn any_flip_of_a_byte_is_decoded_or_refused_without_a_panic() {
        // Miri takes half a second for each.
        let step = if cfg!(miri) { 61 } else { 1 };
        for good in [message(), offer()] {
            for at in (0..good.len()).step_by(step) {
                for value in [0, 1, 0x7f, 0x80, 0xff] {
                    let mut bytes = good.clone();
                    bytes[at] = value;
                    let _ = decode_any(&bytes);
                    if let Ok(description) = hand_over(&bytes)
                        && let Ok(checked) = decode(&description)
                    {
                        assert!(checked.offset + checked.length <= checked.size);
                    }
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "a system call that Miri does not have")]
    fn a_long_name_is_cut_between_characters() {
        let buffer = memfd::export(&"ä".repeat(80), 4096).unwrap();
        let description = describe(&buffer.whole(), Placement::Unknown);
        let checked = decode(&description).unwrap();
        assert_eq!(checked.provenance().name, "ä".repeat(48));
    }
}
