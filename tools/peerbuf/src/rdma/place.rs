//! The kinds of buffers of `peerbuf rdma`, and transfers between a buffer and a file.

use std::str::FromStr;
use std::sync::Arc;

use peerbuf::error::BufferError;
use peerbuf::export::heap::Heap;
use peerbuf::export::{peerbuf as module, udmabuf};
use peerbuf::plan::topology::PciAddress;
use peerbuf::share::{Backing, Copied, Movable};
use peerbuf::{Access, BufferRange};
use sha2::{Digest, Sha256};

use crate::{Failure, size};

/// A kind of buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `udmabuf`
    Udmabuf,
    /// `heap:NAME`
    Heap(String),
    /// `bar:DDDD:BB:DD.F:N`
    Bar(PciAddress, u8),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let wrong = || format!("`{text}` is not udmabuf, heap:NAME or bar:DDDD:BB:DD.F:N");
        match text.split_once(':') {
            None if text == "udmabuf" => Ok(Place::Udmabuf),
            Some(("heap", name)) if !name.is_empty() => Ok(Place::Heap(name.into())),
            Some(("bar", rest)) => {
                let (address, bar) = rest.rsplit_once(':').ok_or_else(wrong)?;
                let address = address.parse().map_err(|_| wrong())?;
                let bar = bar.parse().ok().filter(|bar| *bar <= 5);
                Ok(Place::Bar(address, bar.ok_or_else(wrong)?))
            }
            _ => Err(wrong()),
        }
    }
}

impl Place {
    /// Makes a movable buffer of whole pages: one in a BAR moves to system memory and back, any
    /// other moves to new memory of its kind.
    pub fn make(&self, bytes: u64) -> Result<Box<dyn Backing>, Failure> {
        let page = rustix::param::page_size() as u64;
        let length = bytes
            .max(1)
            .checked_next_multiple_of(page)
            .ok_or_else(|| format!("{} is too large", size::show(bytes)))?;
        Ok(match self {
            Place::Udmabuf => Box::new(Copied::new(move |_| udmabuf::export("udmabuf", length))?),
            Place::Heap(name) => {
                let (heap, name) = (Heap::open(name)?, name.clone());
                Box::new(Copied::new(move |_| heap.export(&name, length))?)
            }
            Place::Bar(address, bar) => {
                let device = Arc::new(module::Device::open(*address)?);
                Box::new(Movable::new(device, *bar, length)?)
            }
        })
    }
}

/// SHA-256 of the CPU's view of a range; `all` gets the same bytes.
pub fn checksum(range: &BufferRange, all: &mut Sha256) -> Result<[u8; 32], BufferError> {
    let mut sum = Sha256::new();
    let mut mapping = range.map(Access::Read)?;
    let cpu = mapping.begin_cpu_access(Access::Read)?;
    let mut chunk = vec![0; range.len().min(1 << 20) as usize];
    let mut at = 0;
    while at < range.len() {
        let chunk = &mut chunk[..(range.len() - at).min(1 << 20) as usize];
        cpu.read_at(at, chunk)?;
        sum.update(&*chunk);
        all.update(&*chunk);
        at += chunk.len() as u64;
    }
    cpu.end()?;
    Ok(sum.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_people_write_it() {
        let bar = |n| Place::Bar("0000:04:00.0".parse().unwrap(), n);
        for (text, place) in [
            ("udmabuf", Place::Udmabuf),
            ("heap:system", Place::Heap("system".into())),
            ("bar:0000:04:00.0:2", bar(2)),
        ] {
            assert_eq!(text.parse(), Ok(place));
        }
        for text in [
            "",
            "memfd",
            "heap:",
            "bar:",
            "bar:0000:04:00.0",
            "bar:0000:04:00.0:6",
            "bar:x:2",
        ] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
