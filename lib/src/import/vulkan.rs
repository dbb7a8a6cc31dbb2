//! Vulkan: a GPU uses a buffer as a `VkBuffer`.
//!
//! The `VkBuffer` covers the whole dma-buf, so users of it also need the range's offset. The
//! driver gets a copy of the descriptor. The import makes a dedicated allocation
//! (`VkMemoryDedicatedAllocateInfo`) if the driver requires one. Images are not supported.
//!
//! ```no_run
//! use std::time::Duration;
//! use peerbuf::device::vulkan::{Device, Use};
//! use peerbuf::{Access, export::udmabuf, import::vulkan::VulkanImporter};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = &Device::all()?[0];
//! let buffer = udmabuf::export("frame", 1 << 20)?;
//! let frame = VulkanImporter::new(device).attach(&buffer.whole())?;
//! let uses = [Use { memory: frame.memory(), access: Access::Write }];
//! let limit = Duration::from_secs(1);
//! let work = device.submit(&uses, limit, |raw, commands| {
//!     let (handle, offset) = (frame.memory().handle(), frame.range().offset());
//!     // SAFETY: the buffer may be transferred to, and has these bytes; both numbers are multiples of 4.
//!     unsafe { raw.cmd_fill_buffer(commands, handle, offset, frame.range().len(), 7) };
//! })?;
//! work.wait(limit)?;
//! # Ok(())
//! # }
//! ```

use std::fmt;
use std::time::Duration;

use ash::vk;

use super::{Attached, Importer, dmabuf_of, impossible};
use crate::buffer::{Access, BufferRange};
use crate::device::vulkan::{Device, Memory, USAGE};
use crate::error::{BufferError, ImportError, Unavailable};
use crate::plan::{Path, Plan, Reason, ReasonCode};
use crate::sys::vulkan::memory::{Refused, Staging};

/// Time limit for transfers through [`Importer`].
const LIMIT: Duration = Duration::from_secs(30);

/// The names of the Vulkan devices of this machine.
///
/// # Errors
/// As [`Device::all`].
pub fn probe() -> Result<Vec<String>, Unavailable> {
    let devices = Device::all()?;
    Ok(devices
        .iter()
        .map(|device| device.name().to_owned())
        .collect())
}

/// A device as an importer.
#[derive(Clone)]
pub struct VulkanImporter {
    device: Device,
    usage: vk::BufferUsageFlags,
}

impl fmt::Debug for VulkanImporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VulkanImporter")
            .field("device", &self.device)
            .field("usage", &self.usage.as_raw())
            .finish()
    }
}

impl VulkanImporter {
    /// Makes an importer from a device.
    pub fn new(device: &Device) -> VulkanImporter {
        VulkanImporter {
            device: device.clone(),
            usage: USAGE,
        }
    }

    /// Sets the usage of the `VkBuffer`s.
    #[must_use]
    pub fn for_usage(mut self, usage: vk::BufferUsageFlags) -> VulkanImporter {
        self.usage = usage;
        self
    }

    /// Display name: the driver's name, or else the device's name.
    pub fn name(&self) -> String {
        match self.device.driver_name() {
            "" => format!("Vulkan {}", self.device.name()),
            driver => format!("Vulkan {driver}"),
        }
    }

    /// Attaches the buffer that contains the range.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] if the driver cannot use the exporter's buffer;
    /// [`BufferError::Access`] for a read-only buffer: Vulkan has no read-only import, and
    /// devices would write through it.
    #[doc(alias = "VkImportMemoryFdInfoKHR")]
    pub fn attach(&self, range: &BufferRange) -> Result<Attachment, ImportError> {
        let buffer = range.buffer();
        let dmabuf = dmabuf_of(buffer, &self.name())?;
        if !buffer.is_writable() {
            let object = buffer.name().to_owned();
            let wanted = "write";
            return Err(BufferError::Access { object, wanted }.into());
        }
        let memory = Memory::import(&self.device, buffer, dmabuf, self.usage);
        let memory = memory.map_err(|refused| match refused {
            Refused::Driver(why) => {
                impossible(&self.name(), buffer, ReasonCode::AttachRefused, why)
            }
            Refused::Failed(error) => error,
        })?;
        Ok(Attachment {
            memory,
            range: range.clone(),
            staging: None,
        })
    }
}

/// A range attached to a device. Work that uses the handle must be done before the drop.
#[derive(Debug)]
pub struct Attachment {
    memory: Memory,
    range: BufferRange,
    /// The bounce buffer of [`Attached`], made on first use.
    staging: Option<Staging>,
}

impl Attachment {
    /// The `VkBuffer` of the whole dma-buf.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The attached range.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// The path of the device's accesses. For a software device the CPU loads and stores the
    /// bytes.
    pub fn plan(&self) -> Plan {
        let plan = Plan::in_place(self.range.buffer());
        if plan.path != Path::PeerToPeer || !self.memory.device().is_software() {
            return plan;
        }
        let peer = "the device is software: the processor loads and stores over the bus";
        let host = "the bytes are in device memory";
        let reasons = vec![
            Reason::new(Path::PeerToPeer, ReasonCode::NotADevice, peer),
            Reason::new(Path::SharedHostMemory, ReasonCode::NotHostMemory, host),
        ];
        Plan::new(Path::StagedCopy, reasons)
    }

    /// The offset and the length of the bytes in the dma-buf, and a bounce buffer for the
    /// range.
    fn prepare(&mut self, length: usize) -> Result<((u64, u64), &mut Staging), ImportError> {
        let part = self.range.slice(0, length as u64)?;
        let staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::new(self.memory.device(), self.range.len())?,
        };
        Ok(((part.offset(), part.len()), self.staging.insert(staging)))
    }
}

impl Importer for VulkanImporter {
    fn name(&self) -> String {
        VulkanImporter::name(self)
    }

    fn attach(&self, range: &BufferRange) -> Result<Box<dyn Attached>, ImportError> {
        Ok(Box::new(VulkanImporter::attach(self, range)?))
    }
}

/// Copies bytes through the device's queue and a bounce buffer of the driver.
impl Attached for Attachment {
    fn plan(&self) -> Plan {
        Attachment::plan(self)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<Option<Plan>, ImportError> {
        let memory = self.memory.clone();
        let (place, staging) = self.prepare(bytes.len())?;
        if !bytes.is_empty() {
            staging.put(bytes)?;
            let device = memory.device();
            device.copy(&memory, Access::Write, staging, place, LIMIT)?;
        }
        Ok(Some(Attachment::plan(self)))
    }

    fn read(&mut self, into: &mut [u8]) -> Result<Option<Plan>, ImportError> {
        let memory = self.memory.clone();
        let (place, staging) = self.prepare(into.len())?;
        if !into.is_empty() {
            let device = memory.device();
            device.copy(&memory, Access::Read, staging, place, LIMIT)?;
            staging.get(into)?;
        }
        Ok(Some(Attachment::plan(self)))
    }
}
