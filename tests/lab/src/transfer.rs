//! Transfers between a file and a buffer in which something happens in the middle.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;

use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::import::file::FileImporter;
use peerbuf::plan::Direction;
use peerbuf::transfer::{Piece, Receipt, Watch};
use peerbuf::{Access, Buffer, error::TransferError};

use crate::node::{MIB, Node};

/// The length of a [`crossed`] transfer.
pub const LARGE: u64 = 4 * MIB;
/// The length of each of its pieces.
pub const PIECE: u64 = 16 << 10;

/// Both directions.
pub const BOTH: [Direction; 2] = [Direction::DiskToBuffer, Direction::BufferToDisk];

/// Opens a node by the crate.
///
/// # Panics
///
/// If the crate cannot.
pub fn device(node: &Node) -> Device {
    Device::open(node.bdf.parse().expect("an address")).expect("the device")
}

/// Memory of a card, for reading and writing.
///
/// # Panics
///
/// If the card has not as much.
pub fn bar(device: &Device, length: u64) -> Buffer {
    let request = Request {
        bar: 2,
        offset: None,
        length,
        access: Access::ReadWrite,
    };
    device.export(request).expect("memory of the card")
}

/// So many random bytes.
pub fn random(length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    rand::fill(&mut bytes[..]);
    bytes
}

/// Puts bytes into a file and onto its disk.
///
/// # Panics
///
/// If the file does not take them.
pub fn fill(file: &File, bytes: &[u8]) {
    file.write_all_at(bytes, 0).expect("the file");
    file.sync_all().expect("the file on its disk");
}

/// The first bytes of a file.
///
/// # Errors
///
/// The kernel's error, or the end of the file.
pub fn first(file: &File, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).map(|()| bytes)
}

/// Gives a file to the crate.
///
/// # Panics
///
/// If the crate does not take it.
pub fn importer(file: &File) -> FileImporter {
    let file = file.try_clone().expect("a descriptor");
    FileImporter::from_fd(file.into(), "the file").expect("the file")
}

/// Pieces of a file and a buffer of [`LARGE`] bytes, without the first `skip` bytes. No two of them follow each
/// other: the file's beginning is the buffer's end.
pub fn crossed(skip: u64) -> Vec<Piece> {
    let piece = |index| {
        let skip = skip.saturating_sub(index * PIECE).min(PIECE);
        Piece {
            file_offset: index * PIECE + skip,
            offset: LARGE - (index + 1) * PIECE + skip,
            length: PIECE - skip,
        }
    };
    (0..LARGE / PIECE).map(piece).collect()
}

/// The bytes of one end as the other end has them after a [`crossed`] transfer.
pub fn cross(bytes: &[u8]) -> Vec<u8> {
    bytes.rchunks(PIECE as usize).flatten().copied().collect()
}

/// Does a [`crossed`] transfer.
///
/// # Errors
///
/// Those of the transfer.
///
/// # Panics
///
/// If the file does not take the buffer.
pub fn transfer(
    importer: &FileImporter,
    buffer: &Buffer,
    direction: Direction,
    pieces: &[Piece],
    watch: &Watch,
) -> Result<Receipt, TransferError> {
    let attachment = importer.attach(&buffer.whole()).expect("an attachment");
    let mut attachment = attachment.watched_by(watch);
    match direction {
        Direction::DiskToBuffer => attachment.read_many(pieces),
        Direction::BufferToDisk => attachment.write_many(pieces),
    }
}

/// Does a [`crossed`] transfer, and something else when some of its bytes have arrived.
///
/// # Panics
///
/// As [`transfer`].
pub fn in_the_middle<T>(
    importer: &FileImporter,
    buffer: &Buffer,
    direction: Direction,
    act: impl FnOnce() -> T,
) -> (Result<Receipt, TransferError>, T) {
    let (pieces, watch) = (crossed(0), Watch::default());
    thread::scope(|scope| {
        let transfer = scope.spawn(|| transfer(importer, buffer, direction, &pieces, &watch));
        while watch.bytes() == 0 && !transfer.is_finished() {
            thread::yield_now();
        }
        let acted = act();
        (transfer.join().expect("the transfer"), acted)
    })
}
