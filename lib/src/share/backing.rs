//! The memory behind a published buffer, and the creation of its next generation.

#[cfg(feature = "module")]
use std::path::PathBuf;
#[cfg(feature = "module")]
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::Buffer;
#[cfg(feature = "module")]
use crate::buffer::{Access, DmaBuf};
use crate::error::{ExportError, ShareError, TransferError};
#[cfg(feature = "module")]
use crate::export::peerbuf as module;
#[cfg(feature = "module")]
use crate::export::peerbuf::{Device, MoveTo, RangeRequest, RangesRequest};

/// The location of a buffer's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Placement {
    /// In a device.
    Device,
    /// In system memory.
    System,
    /// Unknown.
    Unknown,
}

impl Placement {
    /// The placement that the buffer's kind implies.
    pub fn of(buffer: &Buffer) -> Placement {
        let provenance = buffer.provenance();
        if provenance.kind.is_host_memory() {
            Placement::System
        } else if provenance.device.is_some() {
            Placement::Device
        } else {
            Placement::Unknown
        }
    }
}

impl std::fmt::Display for Placement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Placement::Device => "device",
            Placement::System => "system",
            Placement::Unknown => "unknown",
        })
    }
}

/// Arguments of one call of [`Backing::migrate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Order {
    /// The number of the generation to be made.
    pub generation: u64,
    /// The requested location of the bytes; `None` leaves it to the backing.
    pub to: Option<Placement>,
    /// Time limit for waiting on others, such as importers in the kernel.
    pub limit: Duration,
    /// True if a subscriber that was cut off, or died without returning the old generation, may
    /// still reach the old generation. The new generation must then be unreachable through
    /// every descriptor and mapping of the old one.
    pub isolate: bool,
}

/// The memory behind a published buffer, and how it moves.
pub trait Backing: Send {
    /// The current generation.
    fn buffer(&self) -> &Buffer;

    /// The location of the bytes.
    fn placement(&self) -> Placement {
        Placement::of(self.buffer())
    }

    /// True if the backing holds the only handle on the current generation in this process. The
    /// generation cannot be replaced otherwise.
    fn is_idle(&self) -> bool {
        self.buffer().handles() == 1
    }

    /// Makes the next generation, with the same size and the same bytes, and drops the current
    /// one. The publisher calls this when no live subscriber uses the current generation.
    ///
    /// # Errors
    /// The reason why there is no next generation. [`Backing::buffer`] still returns the
    /// current one.
    fn migrate(&mut self, order: &Order) -> Result<(), ShareError>;
}

impl Backing for Box<dyn Backing> {
    fn buffer(&self) -> &Buffer {
        (**self).buffer()
    }

    fn placement(&self) -> Placement {
        (**self).placement()
    }

    fn is_idle(&self) -> bool {
        (**self).is_idle()
    }

    fn migrate(&mut self, order: &Order) -> Result<(), ShareError> {
        (**self).migrate(order)
    }
}

/// A backing that moves by copying. Each generation is a separate buffer, so a holder of the
/// old generation cannot reach the new one.
///
/// ```
/// use peerbuf::export::memfd;
/// use peerbuf::share::Copied;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let backing = Copied::new(|_order| memfd::export("weights", 1 << 20))?;
/// # Ok(())
/// # }
/// ```
pub struct Copied<F> {
    buffer: Buffer,
    make: F,
}

impl<F: FnMut(&Order) -> Result<Buffer, ExportError>> Copied<F> {
    /// Calls `make` once for each generation; the first generation has the number 1. The
    /// generations may be of different kinds, but must have the same size.
    ///
    /// # Errors
    /// The error of `make`.
    pub fn new(mut make: F) -> Result<Copied<F>, ExportError> {
        let buffer = make(&Order {
            generation: 1,
            to: None,
            limit: Duration::ZERO,
            isolate: false,
        })?;
        Ok(Copied { buffer, make })
    }
}

impl<F> std::fmt::Debug for Copied<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copied")
            .field("buffer", &self.buffer)
            .finish_non_exhaustive()
    }
}

impl<F: FnMut(&Order) -> Result<Buffer, ExportError> + Send> Backing for Copied<F> {
    fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    fn migrate(&mut self, order: &Order) -> Result<(), ShareError> {
        let next = (self.make)(order)?;
        copy(&self.buffer, &next)?;
        self.buffer = next;
        Ok(())
    }
}

#[cfg(feature = "module")]
/// A backing in a card's BAR. peerbuf.ko moves the backing to system memory and back, under one
/// dma-buf.
///
/// If no subscriber was cut off, the kernel moves the bytes, and the next generation is the
/// same dma-buf. After a cut-off, the next generation is a new export: the backing copies the
/// bytes, and the kernel then revokes the old export, which ends all access to the old export
/// in every process. The old export keeps its room in the BAR until its last descriptor is
/// closed. Until then the new export may have to consist of system memory alone, and
/// [`Placement::Device`] is refused.
#[derive(Debug)]
pub struct Movable {
    device: Arc<Device>,
    bar: u8,
    buffer: Buffer,
}

#[cfg(feature = "module")]
impl Movable {
    /// Exports `length` bytes of a BAR for reading and writing, at any free offset.
    ///
    /// # Errors
    /// As [`Device::export_ranges`].
    pub fn new(device: Arc<Device>, bar: u8, length: u64) -> Result<Movable, ExportError> {
        let range = RangeRequest::Bar {
            offset: None,
            length,
        };
        let buffer = export(&device, bar, range)?;
        Ok(Movable {
            device,
            bar,
            buffer,
        })
    }

    /// Like [`Movable::new`], for the device behind `node`.
    ///
    /// # Errors
    /// As [`Device::open_node`] and [`Movable::new`].
    pub fn of(node: impl Into<PathBuf>, bar: u8, length: u64) -> Result<Movable, ExportError> {
        Movable::new(Arc::new(Device::open_node(node)?), bar, length)
    }

    /// The device that exports the buffer.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn dmabuf(&self) -> Result<&DmaBuf, ShareError> {
        self.buffer.dmabuf().ok_or_else(|| ShareError::Backing {
            what: format!("{} has no dma-buf", self.buffer),
        })
    }

    /// The placement of the next generation.
    fn target(&self, order: &Order) -> MoveTo {
        match (order.to, self.placement()) {
            (Some(Placement::Device), _) => MoveTo::Device,
            (Some(Placement::System), _) => MoveTo::System,
            (_, Placement::System) => MoveTo::Device,
            _ => MoveTo::System,
        }
    }

    /// Makes a new export that no descriptor or mapping of the old one reaches.
    fn anew(&self, order: &Order) -> Result<Buffer, ShareError> {
        let length = self.buffer.size();
        let target = self.target(order);
        let in_bar = RangeRequest::Bar {
            offset: None,
            length,
        };
        let buffer = match export(&self.device, self.bar, in_bar) {
            Ok(buffer) => buffer,
            Err(error) if order.to == Some(Placement::Device) => return Err(error.into()),
            // Processes that were cut off still hold the room in the BAR.
            Err(_) => export(&self.device, self.bar, RangeRequest::System { length })?,
        };
        copy(&self.buffer, &buffer)?;
        if let (MoveTo::System, Some(dmabuf)) = (target, buffer.dmabuf()) {
            self.device.move_buffer(dmabuf, target, order.limit)?;
        }
        Ok(buffer)
    }
}

#[cfg(feature = "module")]
fn export(device: &Device, bar: u8, range: RangeRequest) -> Result<Buffer, ExportError> {
    device.export_ranges(&RangesRequest {
        bar,
        ranges: vec![range],
        may_move: true,
        devices_read: false,
        uncached: false,
        access: Access::ReadWrite,
    })
}

#[cfg(feature = "module")]
impl Backing for Movable {
    fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    fn placement(&self) -> Placement {
        let status = self.dmabuf().ok().map(|buffer| self.device.status(buffer));
        match status {
            Some(Ok(status)) => match status.placement {
                module::Placement::Device => Placement::Device,
                module::Placement::System => Placement::System,
                module::Placement::Mixed => Placement::Unknown,
            },
            _ => Placement::Unknown,
        }
    }

    fn migrate(&mut self, order: &Order) -> Result<(), ShareError> {
        if !order.isolate {
            self.device
                .move_buffer(self.dmabuf()?, self.target(order), order.limit)?;
            return Ok(());
        }
        let next = self.anew(order)?;
        // From this call on, nobody gets new access. Importers that already have access may
        // keep the old memory until they detach; the new generation is separate memory.
        self.device.revoke(self.dmabuf()?, Duration::ZERO)?;
        self.buffer = next;
        Ok(())
    }
}

/// Copies all bytes of one buffer to another of the same size.
///
/// # Errors
/// [`ShareError::Backing`] if the sizes differ; otherwise the error of the mapping or the
/// access.
pub fn copy(from: &Buffer, to: &Buffer) -> Result<(), ShareError> {
    if from.size() != to.size() {
        let what = format!(
            "{from} has {} bytes, but its replacement {to} has {}",
            from.size(),
            to.size()
        );
        return Err(ShareError::Backing { what });
    }
    match crate::transfer::copy(&from.whole(), &to.whole()) {
        Ok(_) => Ok(()),
        Err(TransferError::Buffer(error)) => Err(error.into()),
        Err(other) => Err(ShareError::Backing {
            what: other.to_string(),
        }),
    }
}
