//! The loops that carry bytes.
//!
//! Direct I/O moves whole blocks. What is left of a transfer after its last whole block goes by
//! ordinary I/O, so that exactly the bytes asked for are touched in the buffer and in the file:
//! a direct read of the last block would write past the range, and a direct write would pad the
//! file.

use std::os::fd::BorrowedFd;

use crate::buffer::{LazyMapping, Mapping};
use crate::errno::Errno;
use crate::error::{SystemError, TransferError};
use crate::path::Direction;
use crate::sys::direct::DirectIo;
use crate::sys::memory::{HostMemory, Window};

use super::file::{Blocks, Direct, Endpoint};

/// How much one system call carries between a file and the buffer itself. Large enough that the
/// call costs nothing beside the transfer, small enough that a signal is noticed.
const DIRECT_CHUNK: u64 = 4 << 20;

/// How much the CPU carries at a time.
const STAGED_CHUNK: u64 = 1 << 20;

/// How far a loop came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Carried {
    pub(crate) bytes: u64,
    /// A read that ended before its last byte, because the file did.
    pub(crate) ended: bool,
}

/// Moves whole blocks straight between the file and the mapping, `length` bytes in all.
///
/// A failed call is returned together with the bytes that were carried before it.
pub(crate) fn direct(
    io: &dyn DirectIo,
    direct: &Direct,
    mapping: &Mapping,
    buffer_offset: u64,
    file_offset: u64,
    length: u64,
    direction: Direction,
) -> (Carried, Result<(), Errno>) {
    let block = u64::from(direct.block);
    debug_assert!(length.is_multiple_of(block) && file_offset.is_multiple_of(block));
    let mut carried = Carried::default();
    while carried.bytes < length {
        let chunk = (length - carried.bytes).min(DIRECT_CHUNK.next_multiple_of(block));
        let at = (buffer_offset + carried.bytes) as usize;
        let window = mapping.map().window(at, chunk as usize);
        match call(
            io,
            direct.fd(),
            window,
            file_offset + carried.bytes,
            direction,
        ) {
            Ok(0) => {
                carried.ended = true;
                break;
            }
            Ok(moved) => {
                carried.bytes += moved as u64;
                // The file ends, or the call was cut, within a block: no further call from here
                // would be aligned.
                if carried.bytes % block != 0 {
                    break;
                }
            }
            Err(errno) => return (carried, Err(errno)),
        }
    }
    (carried, Ok(()))
}

/// Moves bytes of any number and at any offset through memory of this process.
pub(crate) fn staged(
    io: &dyn DirectIo,
    file: &Endpoint,
    buffer: &mut LazyMapping,
    buffer_offset: u64,
    file_offset: u64,
    length: u64,
    direction: Direction,
) -> Result<Carried, TransferError> {
    let mut carried = Carried::default();
    let mut memory = host_memory(length.min(STAGED_CHUNK))?;
    while carried.bytes < length {
        let chunk = (length - carried.bytes).min(STAGED_CHUNK);
        let (from, at) = (file_offset + carried.bytes, buffer_offset + carried.bytes);
        match direction {
            Direction::DiskToBuffer => {
                let moved = read_host(io, file, from, &mut memory, chunk)?;
                buffer.write_at(at, &memory.bytes()[..moved as usize])?;
                carried.bytes += moved;
                if moved < chunk {
                    carried.ended = true;
                    break;
                }
            }
            Direction::BufferToDisk => {
                buffer.read_at(at, &mut memory.bytes_mut()[..chunk as usize])?;
                write_host(io, file, from, &mut memory, chunk)?;
                carried.bytes += chunk;
            }
        }
    }
    Ok(carried)
}

/// Memory that direct I/O can use: it starts on a page, which is the largest alignment that the
/// kernel asks for.
pub(crate) fn host_memory(length: u64) -> Result<HostMemory, TransferError> {
    let failed = |errno| SystemError::new("mmap", format!("{length} bytes of memory"), errno);
    Ok(HostMemory::new(length as usize).map_err(failed)?)
}

/// Reads up to `length` bytes of the file into system memory: whole blocks around the page
/// cache where that is possible, the rest ordinarily. Fewer bytes mean that the file ended.
pub(crate) fn read_host(
    io: &dyn DirectIo,
    file: &Endpoint,
    offset: u64,
    memory: &mut HostMemory,
    length: u64,
) -> Result<u64, TransferError> {
    let failed = |errno| SystemError::new("pread", &file.name, errno);
    if let Some(direct) = direct_whole_blocks(file, offset, length) {
        let moved = io
            .read(direct.fd(), memory.window(length as usize), offset)
            .map_err(failed)?;
        if moved as u64 == length {
            return Ok(length);
        }
        // Cut short by the end of the file or otherwise: ordinary reads tell which.
    }
    let bytes = &mut memory.bytes_mut()[..length as usize];
    let Some(Blocks { block, .. }) = file.blocks() else {
        return Ok(read_all(file, offset, bytes, 1)?);
    };
    // Only whole blocks can be read: those around the bytes.
    let lead = offset % block;
    let around = (lead + length).next_multiple_of(*block);
    let mut blocks = host_memory(around)?;
    let moved = read_all(file, offset - lead, blocks.bytes_mut(), *block)?;
    let moved = moved.saturating_sub(lead).min(length);
    let from = &blocks.bytes()[lead as usize..];
    bytes[..moved as usize].copy_from_slice(&from[..moved as usize]);
    Ok(moved)
}

/// Reads until `into` is full or the file ends. A read that does not end at a multiple of `unit` was the last.
fn read_all(file: &Endpoint, offset: u64, into: &mut [u8], unit: u64) -> Result<u64, SystemError> {
    let mut done = 0;
    while done < into.len() {
        match rustix::io::pread(file.staged(), &mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(moved) => done += moved,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(SystemError::new("pread", &file.name, errno)),
        }
        if !(done as u64).is_multiple_of(unit) {
            break;
        }
    }
    Ok(done as u64)
}

/// Writes `length` bytes of system memory to the file, as [`read_host`] reads them. The caller has asked
/// [`Endpoint::may_write`].
pub(crate) fn write_host(
    io: &dyn DirectIo,
    file: &Endpoint,
    offset: u64,
    memory: &mut HostMemory,
    length: u64,
) -> Result<(), TransferError> {
    let failed = |errno| SystemError::new("pwrite", &file.name, errno);
    if let Some(direct) = direct_whole_blocks(file, offset, length) {
        let moved = io
            .write(direct.fd(), memory.window(length as usize), offset)
            .map_err(failed)?;
        if moved as u64 == length {
            return Ok(());
        }
        // Cut short, as by a disk that is full: ordinary writes carry on, or get the error.
    }
    let bytes = &memory.bytes()[..length as usize];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(file.staged(), &bytes[done..], offset + done as u64) {
            Ok(0) => {
                let (written, wanted) = (done as u64, length);
                return Err(TransferError::ShortWrite {
                    object: file.name.clone(),
                    written,
                    wanted,
                });
            }
            Ok(moved) => done += moved,
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into()).into()),
        }
    }
    Ok(())
}

fn direct_whole_blocks(file: &Endpoint, offset: u64, length: u64) -> Option<&Direct> {
    let direct = file.direct().ok()?;
    let block = u64::from(direct.block);
    (length > 0 && offset.is_multiple_of(block) && length.is_multiple_of(block)).then_some(direct)
}

fn call(
    io: &dyn DirectIo,
    file: BorrowedFd<'_>,
    window: Window<'_>,
    offset: u64,
    direction: Direction,
) -> Result<usize, Errno> {
    match direction {
        Direction::DiskToBuffer => io.read(file, window, offset),
        Direction::BufferToDisk => io.write(file, window, offset),
    }
}
