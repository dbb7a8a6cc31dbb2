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
    /// What a buffer's kind says about it.
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

/// The task of one call of [`Backing::migrate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Order {
    /// The number of the generation to be made.
    pub generation: u64,
    /// The requested location of the bytes; `None` leaves it to the backing.
    pub to: Option<Placement>,
    /// How long it may wait for others, such as importers in the kernel.
    pub limit: Duration,
    /// Somebody who was cut off, or died without giving the old generation back, may still reach
    /// it. The new one must not be reachable through any descriptor or mapping of the old.
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

    /// False while something in this process besides the backing has a handle on the current
    /// generation, so that it cannot be given up.
    fn is_idle(&self) -> bool {
        self.buffer().handles() == 1
    }

    /// Makes the next generation, of the same size and with the same bytes, and lets go of the
    /// current one. Called when no live subscriber uses that any more.
    ///
    /// # Errors
    /// Why there is no next generation. [`Backing::buffer`] is then still the current one.
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

/// A backing that moves by copying: each generation is a buffer of its own, so nothing that
/// reaches the old one reaches the new one.
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
    /// Has `make` make each generation, the first of which has the number 1. They may be of
    /// different kinds, but must be of one size.
    ///
    /// # Errors
    /// What `make` returned.
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
/// A backing in a card's BAR that peerbuf.ko moves to system memory and back, under one dma-buf.
///
/// When nobody was cut off the kernel moves the bytes, and the next generation is the same dma-buf.
/// After a cut-off the next generation is an export of its own: the bytes are copied, and then the
/// kernel revokes the old one, which ends all access to it in every process. The BAR's room that it
/// had is free when its last descriptor is closed; until then the new export may have to be made of
/// system memory alone, and [`Placement::Device`] is refused.
#[derive(Debug)]
pub struct Movable {
    device: Arc<Device>,
    bar: u8,
    buffer: Buffer,
}

#[cfg(feature = "module")]
impl Movable {
    /// Exports `length` bytes of a BAR, for reading and writing, anywhere in it.
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

    /// As [`Movable::new`], of the device whose node this is.
    ///
    /// # Errors
    /// As [`Device::open_node`] and [`Movable::new`].
    pub fn of(node: impl Into<PathBuf>, bar: u8, length: u64) -> Result<Movable, ExportError> {
        Movable::new(Arc::new(Device::open_node(node)?), bar, length)
    }

    /// The device that it is exported by.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn dmabuf(&self) -> Result<&DmaBuf, ShareError> {
        self.buffer.dmabuf().ok_or_else(|| ShareError::Backing {
            what: format!("{} has no dma-buf", self.buffer),
        })
    }

    /// Where the next generation is to be.
    fn target(&self, order: &Order) -> MoveTo {
        match (order.to, self.placement()) {
            (Some(Placement::Device), _) => MoveTo::Device,
            (Some(Placement::System), _) => MoveTo::System,
            (_, Placement::System) => MoveTo::Device,
            _ => MoveTo::System,
        }
    }

    /// An export that nothing which reaches the old one reaches.
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
            // The BAR's room is still taken by those who were cut off.
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
        // From the call on nobody gets access. Importers that had it may keep the old memory for as
        // long as they do not let go; it is not the new one.
        self.device.revoke(self.dmabuf()?, Duration::ZERO)?;
        self.buffer = next;
        Ok(())
    }
}

/// Copies all bytes of one buffer to another of the same size.
///
/// # Errors
/// [`ShareError::Backing`] when the sizes differ; otherwise what mapping or access failed with.
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
