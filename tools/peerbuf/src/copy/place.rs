//! Where bytes come from and where they go: files, buffers of every exporter, descriptors and streams, by one
//! word each.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;

use peerbuf::buffer::{Buffer, BufferRange, Kind, Provenance};
use peerbuf::device::drm::Card;
use peerbuf::error::TransferError;
use peerbuf::export::gpu::{self, Runtime};
use peerbuf::export::heap::Heap;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::{drm, memfd, provider, udmabuf};
use peerbuf::import::file::FileImporter;
use peerbuf::topology::PciAddress;
use peerbuf::{Access, DmaBuf};
use rustix::process::{PidfdFlags, PidfdGetfdFlags};

use crate::{Failure, size};

/// A place, as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Path(PathBuf),
    Bar {
        device: PciAddress,
        bar: Option<u8>,
        offset: Option<u64>,
    },
    Cmb(PciAddress),
    Udmabuf,
    Memfd,
    Heap(String),
    Drm(PathBuf),
    Gpu(Gpu),
    Fd(i32),
    Stream,
}

/// A GPU of a runtime, by the runtime's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gpu {
    pub runtime: Runtime,
    pub device: u32,
}

impl FromStr for Gpu {
    type Err = String;

    fn from_str(text: &str) -> Result<Gpu, String> {
        let (word, device) = text.split_once(':').unwrap_or((text, "0"));
        let runtime = match word {
            "cuda" => Runtime::Cuda,
            "ze" => Runtime::LevelZero,
            _ => {
                return Err(format!(
                    "`{word}` is no runtime: cuda (CUDA) or ze (Level Zero)"
                ));
            }
        };
        let device = device.parse();
        let device = device.map_err(|_| format!("`{text}`: a GPU has a number, as in cuda:0"))?;
        Ok(Gpu { runtime, device })
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self.runtime {
            Runtime::LevelZero => "ze",
            _ => "cuda",
        };
        write!(f, "{word}:{}", self.device)
    }
}

impl Gpu {
    /// Memory of it, from the buffer's beginning on.
    pub fn memory(self, length: u64) -> Result<Buffer, Failure> {
        let exported = gpu::allocate(self.runtime, self.device, length)?;
        Ok(exported.range.buffer().clone())
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Ok(match text {
                "-" => Place::Stream,
                path => Place::Path(path.into()),
            });
        };
        let address = |text: &str| {
            let parsed = text.parse::<PciAddress>();
            parsed.map_err(|error| error.to_string())
        };
        let whole = |place| match rest {
            "" => Ok(place),
            more => Err(format!(
                "`{scheme}:` takes nothing after it, and there is `{more}`"
            )),
        };
        Ok(match scheme {
            "bar" => {
                let (rest, offset) = match rest.split_once('@') {
                    Some((rest, offset)) => (rest, Some(size::parse(offset)?)),
                    None => (rest, None),
                };
                let (device, bar) = match rest.split_once('/') {
                    Some((device, bar)) => {
                        let index = bar.parse().ok().filter(|bar| *bar < 6);
                        let wrong = || format!("`{bar}` is no BAR: they have the numbers 0 to 5");
                        (device, Some(index.ok_or_else(wrong)?))
                    }
                    None => (rest, None),
                };
                let device = address(device)?;
                Place::Bar {
                    device,
                    bar,
                    offset,
                }
            }
            "cmb" => Place::Cmb(address(rest)?),
            "udmabuf" => whole(Place::Udmabuf)?,
            "memfd" => whole(Place::Memfd)?,
            "heap" if !rest.is_empty() => Place::Heap(rest.into()),
            "heap" => return Err("`heap:` needs a name, such as heap:system".into()),
            "drm" if !rest.is_empty() => Place::Drm(rest.into()),
            "drm" => return Err("`drm:` needs a node, such as drm:/dev/dri/card0".into()),
            "cuda" | "ze" => Place::Gpu(text.parse()?),
            "fd" => {
                let number = rest.parse().ok().filter(|number| *number >= 0);
                Place::Fd(number.ok_or_else(|| format!("`{rest}` is no descriptor's number"))?)
            }
            _ => Place::Path(text.into()),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Path(path) => write!(f, "{}", path.display()),
            Place::Bar {
                device,
                bar,
                offset,
            } => {
                write!(f, "bar:{device}")?;
                if let Some(bar) = bar {
                    write!(f, "/{bar}")?;
                }
                offset.map_or(Ok(()), |offset| write!(f, "@{offset}"))
            }
            Place::Cmb(device) => write!(f, "cmb:{device}"),
            Place::Udmabuf => f.write_str("udmabuf:"),
            Place::Memfd => f.write_str("memfd:"),
            Place::Heap(name) => write!(f, "heap:{name}"),
            Place::Drm(node) => write!(f, "drm:{}", node.display()),
            Place::Gpu(gpu) => write!(f, "{gpu}"),
            Place::Fd(number) => write!(f, "fd:{number}"),
            Place::Stream => f.write_str("-"),
        }
    }
}

/// A place that was opened.
pub enum End {
    File(Box<FileImporter>),
    Buffer(Buffer),
    Stream(Stream),
}

/// Bytes in their order, without places.
pub struct Stream(File);

impl Stream {
    /// Reads until `into` is full or there is no more.
    pub fn fill(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let mut done = 0;
        while done < into.len() {
            match self.0.read(&mut into[done..]) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    pub fn put(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }
}

impl Place {
    /// True for memory that is gone with this process.
    pub fn is_fleeting(&self) -> bool {
        matches!(
            self,
            Place::Udmabuf | Place::Memfd | Place::Heap(_) | Place::Drm(_) | Place::Gpu(_)
        )
    }

    /// Opens it to read from. Of what has no size of its own `length` says it.
    pub fn source(&self, length: Option<u64>) -> Result<End, Failure> {
        match self {
            Place::Path(path) => match FileImporter::open(path) {
                Err(TransferError::NotAFile { .. }) => Ok(stream(File::open(path)?.into())),
                opened => Ok(End::File(Box::new(opened?))),
            },
            Place::Fd(number) => descriptor(*number),
            Place::Stream => Ok(stream(std::io::stdin().as_fd().try_clone_to_owned()?)),
            memory => memory.memory(length).map(End::Buffer),
        }
    }

    /// Opens it to write to, or makes it.
    pub fn sink(&self, length: Option<u64>) -> Result<End, Failure> {
        match self {
            Place::Path(path) => {
                let options = File::options()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(path);
                drop(options.map_err(|error| format!("{}: {error}", path.display()))?);
                match FileImporter::open_for(path, Access::Write) {
                    Err(TransferError::NotAFile { .. }) => {
                        Ok(stream(File::options().write(true).open(path)?.into()))
                    }
                    opened => Ok(End::File(Box::new(opened?))),
                }
            }
            Place::Fd(number) => descriptor(*number),
            Place::Stream => Ok(stream(std::io::stdout().as_fd().try_clone_to_owned()?)),
            memory => memory.memory(length).map(End::Buffer),
        }
    }

    /// Memory of so many bytes, in whole pages.
    pub fn memory(&self, length: Option<u64>) -> Result<Buffer, Failure> {
        let length = length.ok_or_else(|| format!("how much of {self}? --size says it"))?;
        let name = self.to_string();
        let length = length
            .max(1)
            .next_multiple_of(rustix::param::page_size() as u64);
        let from_device = |device: &Device, bar: Option<u8>, offset| -> Result<Buffer, Failure> {
            let bar = match bar {
                Some(bar) => bar,
                None => {
                    device
                        .query()?
                        .exportable()
                        .ok_or_else(|| format!("{name}: no BAR of it can be exported"))?
                        .index
                }
            };
            Ok(device.export(Request {
                bar,
                offset,
                length,
                access: Access::ReadWrite,
            })?)
        };
        match self {
            Place::Bar {
                device,
                bar,
                offset,
            } => from_device(&Device::open(*device)?, *bar, *offset),
            Place::Cmb(device) => from_device(&provider::open(*device)?, None, None),
            Place::Udmabuf => Ok(udmabuf::export(&name, length)?),
            Place::Memfd => Ok(memfd::export(&name, length)?),
            Place::Heap(heap) => Ok(Heap::open(heap)?.export(&name, length)?),
            Place::Drm(node) => Ok(drm::export(&Card::open(node)?, &name, length)?),
            Place::Gpu(gpu) => gpu.memory(length),
            Place::Path(_) | Place::Fd(_) | Place::Stream => {
                Err(format!("{self} is no memory").into())
            }
        }
    }
}

fn stream(fd: OwnedFd) -> End {
    End::Stream(Stream(fd.into()))
}

/// A descriptor that this process was started with: a dma-buf, a file or a stream.
fn descriptor(number: i32) -> Result<End, Failure> {
    // By its number alone, and without taking it from whoever has it in this process.
    let failed = |error| format!("descriptor {number}: {error}");
    let this = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let get = || rustix::process::pidfd_getfd(&this, number, PidfdGetfdFlags::empty());
    let name = format!("fd:{number}");
    let provenance = Provenance {
        kind: Kind::Other,
        device: None,
        bar: None,
        name: name.clone(),
    };
    if let Ok(dmabuf) = DmaBuf::from_fd(get().map_err(failed)?) {
        return Ok(End::Buffer(Buffer::from_dmabuf(dmabuf, provenance)));
    }
    match FileImporter::from_fd(get().map_err(failed)?, name) {
        Err(TransferError::NotAFile { .. }) => Ok(stream(get().map_err(failed)?)),
        opened => Ok(End::File(Box::new(opened?))),
    }
}

impl End {
    /// Its size in bytes; `None` of a stream.
    pub fn size(&self) -> Result<Option<u64>, Failure> {
        Ok(match self {
            End::File(file) => Some(file.size()?),
            End::Buffer(buffer) => Some(buffer.size()),
            End::Stream(_) => None,
        })
    }

    /// With so many requests in flight.
    pub fn with_depth(self, depth: Option<u32>) -> End {
        match (self, depth) {
            (End::File(file), Some(depth)) => End::File(Box::new(file.with_depth(depth))),
            (other, _) => other,
        }
    }
}

/// The first bytes of a buffer.
pub fn first(buffer: &Buffer, length: u64) -> Result<BufferRange, Failure> {
    Ok(buffer.range(0, length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        let device: PciAddress = "0000:03:00.0".parse().unwrap();
        for (text, place) in [
            ("/dev/nvme0n1", Place::Path("/dev/nvme0n1".into())),
            ("./bar:x", Place::Path("./bar:x".into())),
            ("a:b", Place::Path("a:b".into())),
            ("-", Place::Stream),
            (
                "bar:0000:03:00.0",
                Place::Bar {
                    device,
                    bar: None,
                    offset: None,
                },
            ),
            (
                "bar:0000:03:00.0/2",
                Place::Bar {
                    device,
                    bar: Some(2),
                    offset: None,
                },
            ),
            (
                "bar:0000:03:00.0/2@4096",
                Place::Bar {
                    device,
                    bar: Some(2),
                    offset: Some(4096),
                },
            ),
            (
                "bar:0000:03:00.0@4096",
                Place::Bar {
                    device,
                    bar: None,
                    offset: Some(4096),
                },
            ),
            ("cmb:0000:03:00.0", Place::Cmb(device)),
            ("udmabuf:", Place::Udmabuf),
            ("memfd:", Place::Memfd),
            ("heap:system", Place::Heap("system".into())),
            ("drm:/dev/dri/card0", Place::Drm("/dev/dri/card0".into())),
            (
                "cuda:1",
                Place::Gpu(Gpu {
                    runtime: Runtime::Cuda,
                    device: 1,
                }),
            ),
            (
                "ze:0",
                Place::Gpu(Gpu {
                    runtime: Runtime::LevelZero,
                    device: 0,
                }),
            ),
            ("fd:7", Place::Fd(7)),
        ] {
            let read: Place = text.parse().unwrap();
            assert_eq!(read, place);
            assert_eq!(read.to_string(), text);
        }
        for (text, said) in [
            ("bar:nonsense", "nonsense"),
            ("bar:0000:03:00.0/6", "0 to 5"),
            ("bar:0000:03:00.0@x", "size"),
            ("cmb:", ""),
            ("heap:", "heap:system"),
            ("drm:", "/dev/dri"),
            ("udmabuf:x", "nothing after it"),
            ("cuda:", "cuda:0"),
            ("cuda:x", "`cuda:x`"),
            ("fd:-1", "-1"),
            ("fd:x", "`x`"),
        ] {
            let refused = text.parse::<Place>().unwrap_err();
            assert!(refused.contains(said), "{text}: {refused}");
        }
    }
}
