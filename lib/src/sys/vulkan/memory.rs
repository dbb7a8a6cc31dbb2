//! Memory with a `VkBuffer` over it: exported as a dma-buf, or imported from one.

use std::any::Any;
use std::fmt;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use ash::vk;
use rustix::fs::{Mode, OFlags};

use super::super::given::Given;
use super::device::Device;
use crate::buffer::{Buffer, DmaBuf, Kind};
use crate::error::{BufferError, ExportError, ImportError, SystemError, VulkanError};

const DMA_BUF: vk::ExternalMemoryHandleTypeFlags = vk::ExternalMemoryHandleTypeFlags::DMA_BUF_EXT;

/// A `VkBuffer` whose memory is a dma-buf. Clones refer to the same buffer. Dropping the last
/// clone destroys both handles, so the work that uses them must be done before.
#[derive(Clone)]
pub struct Memory {
    inner: Arc<Inner>,
}

struct Inner {
    bound: Bound,
    buffer: Buffer,
}

/// The buffer and its memory.
struct Bound {
    handle: vk::Buffer,
    memory: vk::DeviceMemory,
    size: u64,
    device: Device,
}

impl Drop for Bound {
    fn drop(&mut self) {
        let raw = self.device.raw();
        // SAFETY: this crate made the handle on this device, or the handle is null; `Work`
        // holds everything that its commands use.
        unsafe { raw.destroy_buffer(self.handle, None) };
        // SAFETY: this crate allocated the memory on this device, or the handle is null; no
        // buffer is bound to the memory any more.
        unsafe { raw.free_memory(self.memory, None) };
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory")
            .field("handle", &self.inner.bound.handle)
            .field("device", &self.inner.bound.device)
            .field("buffer", &self.inner.buffer)
            .finish_non_exhaustive()
    }
}

/// The reason why memory was not imported.
pub(crate) enum Refused {
    /// The driver does not accept this dma-buf.
    Driver(String),
    /// Another error.
    Failed(ImportError),
}

impl<E: Into<ImportError>> From<E> for Refused {
    fn from(error: E) -> Refused {
        Refused::Failed(error.into())
    }
}

impl Memory {
    /// The `VkBuffer`, over the whole dma-buf.
    pub fn handle(&self) -> vk::Buffer {
        self.inner.bound.handle
    }

    /// The memory that is bound to the buffer, at offset 0.
    pub fn memory(&self) -> vk::DeviceMemory {
        self.inner.bound.memory
    }

    /// The size of the `VkBuffer` in bytes.
    pub fn size(&self) -> u64 {
        self.inner.bound.size
    }

    /// The dma-buf.
    pub fn buffer(&self) -> &Buffer {
        &self.inner.buffer
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.inner.bound.device
    }

    /// Allocates memory of at least `size` bytes and exports it.
    pub(crate) fn export(
        device: &Device,
        name: &str,
        size: u64,
        usage: vk::BufferUsageFlags,
    ) -> Result<Memory, ExportError> {
        let failed = |call, result| VulkanError::new(call, name, result);
        let external = external(device, usage);
        let flags = external.external_memory_features;
        if !flags.contains(vk::ExternalMemoryFeatureFlags::EXPORTABLE) {
            let hint = format!(
                ": the driver exports no buffer of this usage as a dma-buf{}",
                no_udmabuf(device)
            );
            let result = vk::Result::ERROR_FEATURE_NOT_PRESENT;
            let call = "vkGetPhysicalDeviceExternalBufferProperties";
            return Err(failed(call, result).with_hint(hint).into());
        }
        let mut bound = Bound::new(device, name, size, usage, DMA_BUF)?;
        let (requirements, dedicated) = bound.requirements();
        let kind = vk::MemoryPropertyFlags::DEVICE_LOCAL;
        let Some(kind) = device.memory_type(requirements.memory_type_bits, kind) else {
            let result = vk::Result::ERROR_FEATURE_NOT_PRESENT;
            return Err(failed("vkGetBufferMemoryRequirements2", result).into());
        };
        let mut export = vk::ExportMemoryAllocateInfo::default().handle_types(DMA_BUF);
        let mut own = vk::MemoryDedicatedAllocateInfo::default().buffer(bound.handle);
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(requirements.size)
            .memory_type_index(kind)
            .push_next(&mut export);
        if dedicated || flags.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY) {
            info = info.push_next(&mut own);
        }
        // SAFETY: the structs are valid, and the driver allows export of this handle type and this memory type.
        let memory = unsafe { device.raw().allocate_memory(&info, None) };
        bound.memory = memory
            .map_err(|result| failed("vkAllocateMemory", result).with_hint(no_udmabuf(device)))?;
        bound.bind(name)?;
        // SAFETY: the memory was allocated on this device for export as a dma-buf.
        let buffer = unsafe { dmabuf_of(device, bound.memory, name) }?;
        if buffer.size() < size {
            let what = "the size of the driver's dma-buf";
            let must = format!("at least the {size} bytes that were asked for");
            let value = buffer.size();
            return Err(ExportError::Unsuitable { what, value, must });
        }
        let inner = Arc::new(Inner { bound, buffer });
        Ok(Memory { inner })
    }

    /// Imports a dma-buf into a device.
    pub(crate) fn import(
        device: &Device,
        buffer: &Buffer,
        dmabuf: &DmaBuf,
        usage: vk::BufferUsageFlags,
    ) -> Result<Memory, Refused> {
        let failed = |call, result| VulkanError::new(call, buffer.name(), result);
        let flags = external(device, usage).external_memory_features;
        if !flags.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
            let why = "the driver imports no dma-buf for a buffer of this usage \
                       (vkGetPhysicalDeviceExternalBufferProperties)";
            return Err(Refused::Driver(why.into()));
        }
        let size = dmabuf.size();
        let mut bound = Bound::new(device, buffer.name(), size, usage, DMA_BUF)?;
        let (requirements, dedicated) = bound.requirements();
        if requirements.size > size {
            let why = format!(
                "the driver needs {} bytes for a buffer of {size}, and the dma-buf has no more than that",
                requirements.size
            );
            return Err(Refused::Driver(why));
        }
        let mut properties = vk::MemoryFdPropertiesKHR::default();
        // On failure the copy still belongs to the caller, but lavapipe 25.0 closes it then, and 26.1
        // does not.
        let copy = Given::copy_of(dmabuf.as_fd())?;
        let number = copy.number();
        // SAFETY: the descriptor is a dma-buf, and the device has the extension. The call does
        // not consume it.
        let asked = unsafe {
            device
                .memory_fd()
                .get_memory_fd_properties(DMA_BUF, number, &mut properties)
        };
        asked.map_err(|result| {
            Refused::Driver(failed("vkGetMemoryFdPropertiesKHR", result).to_string())
        })?;
        let bits = requirements.memory_type_bits & properties.memory_type_bits;
        let Some(kind) = device.memory_type(bits, vk::MemoryPropertyFlags::empty()) else {
            let why = format!(
                "none of the memory types that the driver takes this dma-buf as ({:#x}) is one of those for \
                 a buffer ({:#x})",
                properties.memory_type_bits, requirements.memory_type_bits
            );
            return Err(Refused::Driver(why));
        };
        let dedicated = dedicated || flags.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY);
        let mut import = vk::ImportMemoryFdInfoKHR::default()
            .handle_type(DMA_BUF)
            .fd(number);
        let mut own = vk::MemoryDedicatedAllocateInfo::default().buffer(bound.handle);
        let mut info = vk::MemoryAllocateInfo::default()
            .allocation_size(size)
            .memory_type_index(kind)
            .push_next(&mut import);
        if dedicated {
            info = info.push_next(&mut own);
        }
        // SAFETY: the structs are valid, and the driver takes the descriptor as this memory type.
        let memory = unsafe { device.raw().allocate_memory(&info, None) };
        if memory.is_ok() {
            copy.taken();
        }
        bound.memory = memory.map_err(|result| {
            let error = failed("vkAllocateMemory", result);
            Refused::Driver(format!("{error}: the driver does not take this dma-buf"))
        })?;
        bound.bind(buffer.name())?;
        let inner = Arc::new(Inner {
            bound,
            buffer: buffer.clone(),
        });
        Ok(Memory { inner })
    }
}

impl Device {
    /// Exports memory that the program allocated and still owns. `name` is for messages.
    ///
    /// # Errors
    /// [`ExportError::Vulkan`], or [`ExportError::Buffer`] for a descriptor that is not a
    /// dma-buf.
    ///
    /// # Safety
    /// The memory belongs to this device, is live, and was allocated for export as a dma-buf
    /// (`VkExportMemoryAllocateInfo`).
    pub unsafe fn export_memory(
        &self,
        memory: vk::DeviceMemory,
        name: &str,
    ) -> Result<Buffer, ExportError> {
        // SAFETY: the caller guarantees the conditions of `dmabuf_of`, which are the same.
        unsafe { dmabuf_of(self, memory, name) }
    }
}

/// # Safety
/// As for [`Device::export_memory`].
unsafe fn dmabuf_of(
    device: &Device,
    memory: vk::DeviceMemory,
    name: &str,
) -> Result<Buffer, ExportError> {
    let info = vk::MemoryGetFdInfoKHR::default()
        .memory(memory)
        .handle_type(DMA_BUF);
    // SAFETY: the caller guarantees that the memory can be exported, and the device has the
    // extension.
    let fd = unsafe { device.memory_fd().get_memory_fd(&info) }
        .map_err(|result| VulkanError::new("vkGetMemoryFdKHR", name, result))?;
    // SAFETY: the driver has opened this descriptor for the caller, who owns it alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let imported = Buffer::import(fd)?;
    let mut provenance = imported.provenance().clone();
    name.clone_into(&mut provenance.name);
    if provenance.kind == Kind::Other {
        provenance.device = provenance.device.or(device.pci());
    }
    let Some(dmabuf) = imported.dmabuf() else {
        return Ok(imported);
    };
    let dmabuf = dmabuf.try_clone()?;
    // The driver may have allocated the memory anywhere.
    Ok(Buffer::from_dmabuf(dmabuf, provenance).without_voucher())
}

/// The driver's support for dma-bufs behind buffers of this usage.
fn external(device: &Device, usage: vk::BufferUsageFlags) -> vk::ExternalMemoryProperties {
    let info = vk::PhysicalDeviceExternalBufferInfo::default()
        .usage(usage)
        .handle_type(DMA_BUF);
    let mut answer = vk::ExternalBufferProperties::default();
    // SAFETY: the physical device belongs to the instance, which has Vulkan 1.1.
    unsafe {
        device
            .instance()
            .get_physical_device_external_buffer_properties(device.physical(), &info, &mut answer);
    }
    answer.external_memory_properties
}

/// The reason why lavapipe cannot export although it lists the extension.
fn no_udmabuf(device: &Device) -> String {
    const NODE: &str = "/dev/udmabuf";
    if !device.is_lavapipe() {
        return String::new();
    }
    match rustix::fs::open(NODE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => String::new(),
        Err(errno) => {
            let cause = SystemError::new("open", NODE, errno);
            format!(
                ": lavapipe makes dma-bufs by /dev/udmabuf, and without it only imports them ({cause}); \
                 `modprobe udmabuf`, and give this user the node"
            )
        }
    }
}

impl Bound {
    /// Creates a buffer without memory.
    fn new(
        device: &Device,
        name: &str,
        size: u64,
        usage: vk::BufferUsageFlags,
        external: vk::ExternalMemoryHandleTypeFlags,
    ) -> Result<Bound, VulkanError> {
        let mut types = vk::ExternalMemoryBufferCreateInfo::default().handle_types(external);
        let mut info = vk::BufferCreateInfo::default()
            .size(size)
            .usage(usage)
            .sharing_mode(vk::SharingMode::EXCLUSIVE);
        if !external.is_empty() {
            info = info.push_next(&mut types);
        }
        // SAFETY: the structs are valid; the driver refuses an impossible size with an error.
        let handle = unsafe { device.raw().create_buffer(&info, None) }
            .map_err(|result| VulkanError::new("vkCreateBuffer", name, result))?;
        Ok(Bound {
            handle,
            memory: vk::DeviceMemory::null(),
            size,
            device: device.clone(),
        })
    }

    /// The buffer's memory requirements, and whether it needs a dedicated allocation.
    fn requirements(&self) -> (vk::MemoryRequirements, bool) {
        let info = vk::BufferMemoryRequirementsInfo2::default().buffer(self.handle);
        let mut dedicated = vk::MemoryDedicatedRequirements::default();
        let mut answer = vk::MemoryRequirements2::default().push_next(&mut dedicated);
        let raw = self.device.raw();
        // SAFETY: the buffer belongs to this device, which has Vulkan 1.1.
        unsafe { raw.get_buffer_memory_requirements2(&info, &mut answer) };
        let requirements = answer.memory_requirements;
        let own = dedicated.requires_dedicated_allocation == vk::TRUE
            || dedicated.prefers_dedicated_allocation == vk::TRUE;
        (requirements, own)
    }

    fn bind(&self, name: &str) -> Result<(), VulkanError> {
        let raw = self.device.raw();
        // SAFETY: buffer and memory belong to this device and are unbound, and the memory meets
        // the requirements of the buffer.
        unsafe { raw.bind_buffer_memory(self.handle, self.memory, 0) }
            .map_err(|result| VulkanError::new("vkBindBufferMemory", name, result))
    }
}

/// Host-visible memory that a queue copies from and to.
pub(crate) struct Staging {
    bound: Arc<Bound>,
    /// The address of the whole mapping, which lasts until the memory is freed.
    at: *mut u8,
}

// SAFETY: the pointer is used through `&mut self` only.
unsafe impl Send for Staging {}
// SAFETY: nothing uses the pointer through `&self`.
unsafe impl Sync for Staging {}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Staging")
    }
}

impl Staging {
    pub(crate) fn new(device: &Device, size: u64) -> Result<Staging, ImportError> {
        const NAME: &str = "staging memory";
        let failed = |call, result| VulkanError::new(call, NAME, result);
        let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::TRANSFER_DST;
        let mut bound = Bound::new(device, NAME, size, usage, Default::default())?;
        let (requirements, _) = bound.requirements();
        let wanted = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
        let kind = device
            .memory_type(requirements.memory_type_bits, wanted)
            .filter(|&kind| device.memory_flags(kind).contains(wanted));
        let Some(kind) = kind else {
            let result = vk::Result::ERROR_FEATURE_NOT_PRESENT;
            return Err(failed("vkGetBufferMemoryRequirements2", result).into());
        };
        let info = vk::MemoryAllocateInfo::default()
            .allocation_size(requirements.size)
            .memory_type_index(kind);
        // SAFETY: the struct is valid.
        let memory = unsafe { device.raw().allocate_memory(&info, None) };
        bound.memory = memory.map_err(|result| failed("vkAllocateMemory", result))?;
        bound.bind(NAME)?;
        let (whole, flags) = (vk::WHOLE_SIZE, vk::MemoryMapFlags::empty());
        // SAFETY: the memory is host-visible and not mapped yet, and the mapping lasts until
        // the memory is freed.
        let at = unsafe { device.raw().map_memory(bound.memory, 0, whole, flags) }
            .map_err(|result| failed("vkMapMemory", result))?;
        Ok(Staging {
            bound: Arc::new(bound),
            at: at.cast(),
        })
    }

    pub(crate) fn handle(&self) -> vk::Buffer {
        self.bound.handle
    }

    /// The value that work with this memory must hold.
    pub(super) fn keep(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.bound) as _
    }

    fn fits(&self, length: usize) -> Result<(), ImportError> {
        let (length, size) = (length as u64, self.bound.size);
        if length <= size {
            return Ok(());
        }
        let object = "staging memory".into();
        let offset = 0;
        Err(BufferError::OutOfRange {
            object,
            offset,
            length,
            size,
        }
        .into())
    }

    /// Copies bytes in, while no work uses the memory.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), ImportError> {
        self.fits(bytes.len())?;
        // SAFETY: the mapping has at least this many bytes, and nobody else uses them now.
        unsafe {
            self.at
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
        Ok(())
    }

    /// Copies bytes out, after the work that wrote them.
    pub(crate) fn get(&mut self, into: &mut [u8]) -> Result<(), ImportError> {
        self.fits(into.len())?;
        // SAFETY: the mapping has at least this many bytes, and nobody else uses them now.
        unsafe {
            self.at
                .copy_to_nonoverlapping(into.as_mut_ptr(), into.len())
        };
        Ok(())
    }
}
