//! Vulkan: a GPU uses a buffer as a `VkBuffer`.
//!
//! The `VkBuffer` is of the whole dma-buf: what uses it must be given the range's offset, too. The driver gets a
//! copy of the descriptor. A memory of its own (`VkMemoryDedicatedAllocateInfo`) is made where the driver wants
//! that. Images are not imported.
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

/// How long bytes are waited for that go by [`Importer`].
const LIMIT: Duration = Duration::from_secs(30);

/// The names of the devices that there are.
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

/// A device that buffers can be attached to.
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
    /// Takes a device.
    pub fn new(device: &Device) -> VulkanImporter {
        VulkanImporter {
            device: device.clone(),
            usage: USAGE,
        }
    }

    /// For other usages of the `VkBuffer`s.
    #[must_use]
    pub fn for_usage(mut self, usage: vk::BufferUsageFlags) -> VulkanImporter {
        self.usage = usage;
        self
    }

    /// For people: the driver's name, or the device's where it has none.
    pub fn name(&self) -> String {
        match self.device.driver_name() {
            "" => format!("Vulkan {}", self.device.name()),
            driver => format!("Vulkan {driver}"),
        }
    }

    /// Attaches the buffer that the range is part of.
    ///
    /// # Errors
    /// [`ImportError::Impossible`] where exporter and driver do not go together, and
    /// [`BufferError::Access`] for a buffer that may only be read: Vulkan has no import for that, and devices would
    /// write through it.
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

/// A range and a device, brought together. What uses the handle is to be done before this is dropped.
#[derive(Debug)]
pub struct Attachment {
    memory: Memory,
    range: BufferRange,
    /// For bytes that go by [`Attached`], once some have.
    staging: Option<Staging>,
}

impl Attachment {
    /// The `VkBuffer` of the whole dma-buf.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// What was attached.
    pub fn range(&self) -> &BufferRange {
        &self.range
    }

    /// How the device gets at the bytes. A device that is software has the processor load and store them.
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

    /// The bytes' place in the dma-buf, and memory of the driver's as large as the range.
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

/// Bytes go by the device's queue, from memory of the driver's and to it.
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
