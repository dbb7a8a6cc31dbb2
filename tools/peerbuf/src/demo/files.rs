//! The demo's files: made of random bytes, checked by ordinary reads.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use peerbuf::Access;
use peerbuf::buffer::Mapping;
use peerbuf::import::file::unnamed_file;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::fs::Advice;
use sha2::{Digest, Sha256};

use crate::Failure;

const CHUNK: u64 = 1 << 20;

type Checksum = [u8; 32];

/// A file of random bytes, which the seed can reproduce, so that the expected bytes never come
/// from the disk under test.
pub struct RandomFile {
    file: File,
    seed: [u8; 32],
    length: u64,
    /// Checksums of the bytes, and of the bytes after the change.
    checksum: Checksum,
    changed: Checksum,
}

impl RandomFile {
    /// Makes an unnamed file in `directory`.
    pub fn make(directory: &Path, length: u64) -> Result<RandomFile, Failure> {
        let mut file = unnamed_file(directory)?;
        let mut seed = [0; 32];
        rand::fill(&mut seed);
        let (mut before, mut after) = (Sha256::new(), Sha256::new());
        let mut bytes = Bytes::new(seed, length);
        while let Some(chunk) = bytes.next() {
            file.write_all(chunk)?;
            before.update(&*chunk);
            change(chunk);
            after.update(&*chunk);
        }
        file.sync_data()?;
        let (checksum, changed) = (before.finalize().into(), after.finalize().into());
        Ok(RandomFile {
            file,
            seed,
            length,
            checksum,
            changed,
        })
    }

    /// Compares the mapping with the file's bytes, and changes each byte if `and_change` is
    /// set.
    pub fn check(&self, mapping: &mut Mapping, and_change: bool) -> Result<bool, Failure> {
        let mut right = true;
        let mut bytes = Bytes::new(self.seed, self.length);
        let mut found = vec![0; CHUNK as usize];
        let mut offset = 0;
        let mut cpu = mapping.begin_cpu_access(Access::ReadWrite)?;
        while let Some(expected) = bytes.next() {
            let found = &mut found[..expected.len()];
            cpu.read_at(offset, found)?;
            right &= found == expected;
            if and_change {
                change(found);
                cpu.write_at(offset, found)?;
            }
            offset += found.len() as u64;
        }
        cpu.end()?;
        Ok(right)
    }

    /// Reads the file through the page cache: true if it has the original bytes.
    pub fn is_unchanged(&self) -> Result<bool, Failure> {
        Ok(checksum(&self.file, self.length)? == self.checksum)
    }

    /// Reads another file through the page cache: true if it has exactly the changed bytes.
    pub fn is_changed_copy(&self, other: &File) -> Result<bool, Failure> {
        let same_length = other.metadata()?.len() == self.length;
        Ok(same_length && checksum(other, self.length)? == self.changed)
    }
}

impl AsFd for RandomFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The change that the first process or a shader (`Formula::COMPLEMENT`) makes: every byte
/// changes.
fn change(bytes: &mut [u8]) {
    for byte in bytes {
        *byte = !*byte;
    }
}

/// Random bytes in chunks, reproducible from the seed.
struct Bytes {
    random: StdRng,
    chunk: Vec<u8>,
    left: u64,
}

impl Bytes {
    fn new(seed: [u8; 32], length: u64) -> Bytes {
        let chunk = vec![0; length.min(CHUNK) as usize];
        Bytes {
            random: StdRng::from_seed(seed),
            chunk,
            left: length,
        }
    }

    fn next(&mut self) -> Option<&mut [u8]> {
        let length = self.left.min(CHUNK);
        self.left -= length;
        let chunk = &mut self.chunk[..length as usize];
        self.random.fill_bytes(chunk);
        (length > 0).then_some(chunk)
    }
}

fn checksum(file: &File, length: u64) -> Result<Checksum, Failure> {
    // Drops the page cache, so that the bytes come from the disk.
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?;
    let mut sum = Sha256::new();
    let mut chunk = vec![0; CHUNK as usize];
    let mut offset = 0;
    while offset < length {
        let wanted = (length - offset).min(CHUNK) as usize;
        let read = file.read_at(&mut chunk[..wanted], offset)?;
        if read == 0 {
            break;
        }
        sum.update(&chunk[..read]);
        offset += read as u64;
    }
    Ok(sum.finalize().into())
}
