//! A logical device, opened here or the caller's own.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use ash::{ext, khr, vk};
use peerbuf_core::unpoisoned;

use crate::error::{SystemError, Unavailable, VulkanError};
use crate::topology::PciAddress;

const WHAT: &str = "Vulkan";
const LOADER: &str = "libvulkan.so.1";

/// Extensions that a device must be made with to take and give dma-bufs.
pub const NEEDED: [&CStr; 2] = [
    khr::external_memory_fd::NAME,
    ext::external_memory_dma_buf::NAME,
];

/// Extensions that are used where a device was made with them: fences as sync files, and memory that other
/// drivers use, too.
pub const USED: [&CStr; 2] = [
    khr::external_semaphore_fd::NAME,
    ext::queue_family_foreign::NAME,
];

/// A Vulkan device of the caller's, for [`Device::from_raw`].
#[derive(Clone)]
pub struct Raw<'a> {
    /// What loaded the functions.
    pub entry: ash::Entry,
    /// Made for Vulkan 1.1 or later.
    pub instance: ash::Instance,
    /// What the device was made of.
    pub physical: vk::PhysicalDevice,
    /// The device.
    pub device: ash::Device,
    /// The family of a queue of the device that can compute or transfer.
    pub queue_family: u32,
    /// The queue's number in its family.
    pub queue: u32,
    /// All extensions that the device was made with: [`NEEDED`], and of [`USED`] what there is.
    pub extensions: &'a [&'a CStr],
}

/// A Vulkan device that gives and takes dma-bufs. Clones are the same device.
///
/// A process that was forked from the one that opened it cannot use it.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

/// Whether devices' fences go between dma-bufs and Vulkan's queues as sync files, or are waited for by the
/// processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fences {
    /// As sync files (`VK_KHR_external_semaphore_fd`): a queue waits for the fences of a dma-buf, and the dma-buf
    /// has a fence until the queue's work is done. The processor waits for nothing.
    SyncFiles,
    /// The processor waits: before work begins for the dma-buf's fences, and then for the work itself.
    Host {
        /// Why.
        why: String,
    },
}

struct Inner {
    raw: ash::Device,
    /// Whether it is to be destroyed with this.
    owned: bool,
    physical: vk::PhysicalDevice,
    memory_fd: khr::external_memory_fd::Device,
    semaphore_fd: Result<khr::external_semaphore_fd::Device, String>,
    /// The family that stands for whoever else uses a dma-buf.
    others: u32,
    family: u32,
    queue: Mutex<vk::Queue>,
    facts: Facts,
    /// Last: the device is destroyed before its instance.
    instance: Arc<Instance>,
}

/// What the driver says of a physical device.
struct Facts {
    name: String,
    /// Its name alone.
    driver_name: String,
    driver: String,
    lavapipe: bool,
    /// The processor does the work.
    software: bool,
    pci: Option<PciAddress>,
    limits: vk::PhysicalDeviceLimits,
    memory: vk::PhysicalDeviceMemoryProperties,
}

struct Instance {
    raw: ash::Instance,
    owned: bool,
    /// Holds the library in which all functions are.
    entry: ash::Entry,
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: it was made here, and every device of it holds this value, so all are destroyed.
            unsafe { self.raw.destroy_instance(None) };
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: it was made here, and whatever was made of it holds this value and waited for its work.
            unsafe { self.raw.destroy_device(None) };
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name())
            .field("driver", &self.driver())
            .field("pci", &self.pci())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Raw<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Raw")
            .field("physical", &self.physical)
            .field("queue_family", &self.queue_family)
            .field("queue", &self.queue)
            .field("extensions", &self.extensions)
            .finish_non_exhaustive()
    }
}

fn unavailable(call: &'static str, object: impl Into<String>, remedy: String) -> Unavailable {
    let cause = SystemError::new(call, object, rustix::io::Errno::NODEV);
    Unavailable::new(WHAT, cause, remedy)
}

impl Device {
    /// Opens every device here that gives or takes dma-bufs, each with one queue for compute work.
    ///
    /// # Errors
    /// [`Unavailable`] without the loader, without a driver, or where no device has the extensions; it says what
    /// each lacks.
    pub fn all() -> Result<Vec<Device>, Unavailable> {
        // SAFETY: the system's Vulkan loader, whose initialisers a process that wants Vulkan runs.
        let entry = unsafe { ash::Entry::load() }.map_err(|error| {
            let cause = SystemError::new("dlopen", LOADER, rustix::io::Errno::NOENT);
            let remedy = format!(
                "install the loader (libvulkan1) and a driver; mesa-vulkan-drivers has one that needs no GPU \
                 ({error})"
            );
            Unavailable::new(WHAT, cause, remedy)
        })?;
        let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
        let info = vk::InstanceCreateInfo::default().application_info(&application);
        // SAFETY: the structs are valid; the entry is held beside the instance.
        let raw = unsafe { entry.create_instance(&info, None) }.map_err(|result| {
            let remedy = format!(
                "{result:?}: install a driver for Vulkan 1.1; mesa-vulkan-drivers has one that needs no GPU"
            );
            unavailable("vkCreateInstance", LOADER, remedy)
        })?;
        let instance = Arc::new(Instance {
            raw,
            owned: true,
            entry,
        });
        // SAFETY: the instance is live.
        let found = unsafe { instance.raw.enumerate_physical_devices() };
        let found = found.map_err(|result| {
            unavailable("vkEnumeratePhysicalDevices", LOADER, format!("{result:?}"))
        })?;
        let mut devices = Vec::new();
        let mut lacking = Vec::new();
        for physical in found {
            match open(&instance, physical) {
                Ok(device) => devices.push(device),
                Err(why) => lacking.push(why),
            }
        }
        if devices.is_empty() {
            let remedy = match lacking.is_empty() {
                true => "no driver has a device".into(),
                false => lacking.join("; "),
            };
            return Err(unavailable("vkEnumeratePhysicalDevices", LOADER, remedy));
        }
        Ok(devices)
    }

    /// Opens the first device of [`Device::all`] in whose name `which` is, or whose PCI address it is.
    ///
    /// # Errors
    /// As [`Device::all`], and where none is called so; it says which there are.
    pub fn open(which: &str) -> Result<Device, Unavailable> {
        let mut all = Device::all()?;
        let is_it = |device: &Device| {
            let address = device.pci().map(|address| address.to_string());
            device.name().contains(which) || address.as_deref() == Some(which)
        };
        match all.iter().position(is_it) {
            Some(place) => Ok(all.swap_remove(place)),
            None => {
                let names: Vec<_> = all.iter().map(Device::name).collect();
                let remedy = format!("there are: {}", names.join(", "));
                Err(unavailable("vkEnumeratePhysicalDevices", which, remedy))
            }
        }
    }

    /// Takes a device that the program has. It stays the program's, which destroys it.
    ///
    /// # Errors
    /// [`VulkanError`] where the device was made without one of [`NEEDED`], or the instance for Vulkan 1.0.
    ///
    /// # Safety
    /// - The parts belong together: the device was made of the physical device, of the instance, by the entry; it
    ///   has the queue; and the extensions are those that it was made with.
    /// - They are live until this value, its clones, and whatever was made of it are gone.
    /// - The queue is used by nobody else while a call of this value uses it ([`Device::submit`]). A program that
    ///   has another queue gives that.
    pub unsafe fn from_raw(raw: Raw<'_>) -> Result<Device, VulkanError> {
        let instance = Arc::new(Instance {
            raw: raw.instance,
            owned: false,
            entry: raw.entry,
        });
        // SAFETY: the caller's word: the physical device is one of the instance's, the device of that, and the
        // extensions and the queue are the device's.
        unsafe {
            let call = c"vkGetPhysicalDeviceExternalBufferProperties";
            let handle = instance.raw.handle();
            if instance
                .entry
                .get_instance_proc_addr(handle, call.as_ptr())
                .is_none()
            {
                let hint = ": make the instance for Vulkan 1.1 or later";
                return Err(VulkanError::new(
                    "vkGetInstanceProcAddr",
                    "vkGetPhysicalDeviceExternalBufferProperties",
                    vk::Result::ERROR_INCOMPATIBLE_DRIVER,
                )
                .with_hint(hint));
            }
            let facts = Facts::ask(&instance.raw, raw.physical);
            Device::of(
                instance,
                raw.physical,
                raw.device,
                false,
                (raw.queue_family, raw.queue),
                raw.extensions,
                facts,
            )
        }
    }

    /// # Safety
    /// As for [`Device::from_raw`].
    unsafe fn of(
        instance: Arc<Instance>,
        physical: vk::PhysicalDevice,
        raw: ash::Device,
        owned: bool,
        (family, number): (u32, u32),
        extensions: &[&CStr],
        facts: Facts,
    ) -> Result<Device, VulkanError> {
        let memory_fd = khr::external_memory_fd::Device::new(&instance.raw, &raw);
        let semaphore_fd = khr::external_semaphore_fd::Device::new(&instance.raw, &raw);
        let has = |name: &CStr| extensions.contains(&name);
        // SAFETY: the caller's word: the queue is the device's.
        let queue = unsafe { raw.get_device_queue(family, number) };
        let mut inner = Inner {
            raw,
            owned,
            physical,
            memory_fd,
            semaphore_fd: Ok(semaphore_fd),
            others: match has(ext::queue_family_foreign::NAME) {
                true => vk::QUEUE_FAMILY_FOREIGN_EXT,
                false => vk::QUEUE_FAMILY_EXTERNAL,
            },
            family,
            queue: Mutex::new(queue),
            facts,
            instance,
        };
        // What the extension's functions are when it is not there would panic.
        for needed in NEEDED {
            if !has(needed) {
                let name = inner.facts.name.clone();
                let hint = format!(": it was made without {}", needed.to_string_lossy());
                let missing = vk::Result::ERROR_EXTENSION_NOT_PRESENT;
                return Err(VulkanError::new("vkCreateDevice", name, missing).with_hint(hint));
            }
        }
        if let Err(why) = inner.sync_files(has(khr::external_semaphore_fd::NAME)) {
            inner.semaphore_fd = Err(why);
        }
        let inner = Arc::new(inner);
        Ok(Device { inner })
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.inner.facts.name
    }

    /// The driver's name, such as `radv` or `llvmpipe` (lavapipe's); empty where it does not say one.
    pub fn driver_name(&self) -> &str {
        &self.inner.facts.driver_name
    }

    /// The driver's name and version, as it says them.
    pub fn driver(&self) -> &str {
        &self.inner.facts.driver
    }

    /// The PCI function that it is, where the driver says so.
    pub fn pci(&self) -> Option<PciAddress> {
        self.inner.facts.pci
    }

    /// True where the processor does the device's work.
    pub fn is_software(&self) -> bool {
        self.inner.facts.software
    }

    /// How its work and the fences of dma-bufs wait for each other.
    pub fn fences(&self) -> Fences {
        match &self.inner.semaphore_fd {
            Ok(_) => Fences::SyncFiles,
            Err(why) => Fences::Host { why: why.clone() },
        }
    }

    /// The functions of the device, and its handle. Both are valid as long as this value, or a clone.
    pub fn raw(&self) -> &ash::Device {
        &self.inner.raw
    }

    /// The instance that it is of.
    pub fn instance(&self) -> &ash::Instance {
        &self.inner.instance.raw
    }

    /// The physical device.
    pub fn physical(&self) -> vk::PhysicalDevice {
        self.inner.physical
    }

    /// The family of its queue.
    pub fn queue_family(&self) -> u32 {
        self.inner.family
    }

    /// The family from which dma-bufs are acquired and to which they are released:
    /// `VK_QUEUE_FAMILY_FOREIGN_EXT`, or `VK_QUEUE_FAMILY_EXTERNAL` for a device without that extension.
    pub fn foreign_family(&self) -> u32 {
        self.inner.others
    }

    pub(super) fn memory_fd(&self) -> &khr::external_memory_fd::Device {
        &self.inner.memory_fd
    }

    pub(super) fn semaphore_fd(&self) -> Result<&khr::external_semaphore_fd::Device, &str> {
        self.inner.semaphore_fd.as_ref().map_err(String::as_str)
    }

    pub(super) fn queue(&self) -> MutexGuard<'_, vk::Queue> {
        unpoisoned(self.inner.queue.lock())
    }

    pub(super) fn limits(&self) -> &vk::PhysicalDeviceLimits {
        &self.inner.facts.limits
    }

    pub(super) fn is_lavapipe(&self) -> bool {
        self.inner.facts.lavapipe
    }

    /// The first memory type of those in `bits` that has all of `wanted`, or the first of all.
    pub(super) fn memory_type(&self, bits: u32, wanted: vk::MemoryPropertyFlags) -> Option<u32> {
        let types = self.inner.facts.memory.memory_types_as_slice();
        let mut allowed = (0..).zip(types).filter(|(n, _)| bits >> n & 1 == 1);
        let first = allowed.clone().next();
        let best = allowed.find(|(_, kind)| kind.property_flags.contains(wanted));
        best.or(first).map(|(n, _)| n)
    }

    /// Of memory type `n`.
    pub(super) fn memory_flags(&self, n: u32) -> vk::MemoryPropertyFlags {
        let types = self.inner.facts.memory.memory_types_as_slice();
        types
            .get(n as usize)
            .map_or(vk::MemoryPropertyFlags::empty(), |kind| kind.property_flags)
    }
}

impl Inner {
    /// Whether semaphores go as sync files, in both directions.
    fn sync_files(&self, enabled: bool) -> Result<(), String> {
        if !enabled {
            return Err("the device has no VK_KHR_external_semaphore_fd".into());
        }
        let info = vk::PhysicalDeviceExternalSemaphoreInfo::default()
            .handle_type(vk::ExternalSemaphoreHandleTypeFlags::SYNC_FD);
        let mut answer = vk::ExternalSemaphoreProperties::default();
        // SAFETY: the physical device is one of the instance's, which has Vulkan 1.1.
        unsafe {
            self.instance
                .raw
                .get_physical_device_external_semaphore_properties(
                    self.physical,
                    &info,
                    &mut answer,
                );
        }
        let needed = vk::ExternalSemaphoreFeatureFlags::IMPORTABLE
            | vk::ExternalSemaphoreFeatureFlags::EXPORTABLE;
        match answer.external_semaphore_features.contains(needed) {
            true => Ok(()),
            false => Err(
                "the driver's semaphores do not come from sync files and go as such \
                 (VK_EXTERNAL_SEMAPHORE_HANDLE_TYPE_SYNC_FD_BIT)"
                    .into(),
            ),
        }
    }
}

impl Facts {
    /// # Safety
    /// The physical device is one of the instance's, which has Vulkan 1.1.
    unsafe fn ask(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Facts {
        let extensions =
            // SAFETY: the caller's word.
            unsafe { instance.enumerate_device_extension_properties(physical) }.unwrap_or_default();
        let has = |name| {
            extensions
                .iter()
                .any(|extension| text(&extension.extension_name) == text_of(name))
        };
        // SAFETY: the caller's word.
        let version = unsafe { instance.get_physical_device_properties(physical) }.api_version;
        let mut driver = vk::PhysicalDeviceDriverProperties::default();
        let mut bus = vk::PhysicalDevicePCIBusInfoPropertiesEXT::default();
        let mut properties = vk::PhysicalDeviceProperties2::default();
        let has_bus = has(ext::pci_bus_info::NAME);
        if version >= vk::API_VERSION_1_2 || has(khr::driver_properties::NAME) {
            properties = properties.push_next(&mut driver);
        }
        if has_bus {
            properties = properties.push_next(&mut bus);
        }
        // SAFETY: the caller's word; only structs of extensions that the driver lists are in the chain.
        unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
        let properties = properties.properties;
        // SAFETY: the caller's word.
        let memory = unsafe { instance.get_physical_device_memory_properties(physical) };
        let address = format!(
            "{:04x}:{:02x}:{:02x}.{:x}",
            bus.pci_domain, bus.pci_bus, bus.pci_device, bus.pci_function
        );
        let said = format!(
            "{} {}",
            text(&driver.driver_name),
            text(&driver.driver_info)
        );
        Facts {
            name: text(&properties.device_name),
            driver_name: text(&driver.driver_name),
            driver: said.trim().to_owned(),
            lavapipe: driver.driver_id == vk::DriverId::MESA_LLVMPIPE,
            software: properties.device_type == vk::PhysicalDeviceType::CPU,
            pci: address.parse().ok().filter(|_| has_bus),
            limits: properties.limits,
            memory,
        }
    }
}

/// A text of the driver's, as far as it is one.
fn text(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars
        .iter()
        .map(|&char| char.cast_unsigned())
        .take_while(|&byte| byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn text_of(name: &CStr) -> String {
    name.to_string_lossy().into_owned()
}

/// Makes a device of a physical one, with a queue that computes; or says why that is not possible.
fn open(instance: &Arc<Instance>, physical: vk::PhysicalDevice) -> Result<Device, String> {
    // SAFETY: the physical device is one of the instance's, which was made for Vulkan 1.1.
    let facts = unsafe { Facts::ask(&instance.raw, physical) };
    let name = facts.name.clone();
    let failed = |call: &str, result: vk::Result| format!("{name}: {call}: {result:?}");
    // SAFETY: as above.
    let properties = unsafe { instance.raw.get_physical_device_properties(physical) };
    if properties.api_version < vk::API_VERSION_1_1 {
        return Err(format!("{name}: its driver has Vulkan 1.0"));
    }
    // SAFETY: as above.
    let listed = unsafe { instance.raw.enumerate_device_extension_properties(physical) };
    let listed: Vec<String> = listed
        .map_err(|result| failed("vkEnumerateDeviceExtensionProperties", result))?
        .iter()
        .map(|extension| text(&extension.extension_name))
        .collect();
    let has = |name: &CStr| listed.contains(&text_of(name));
    if let Some(missing) = NEEDED.into_iter().find(|needed| !has(needed)) {
        return Err(format!("{name}: its driver has no {}", text_of(missing)));
    }
    let extensions: Vec<&CStr> = NEEDED
        .into_iter()
        .chain(USED.into_iter().filter(|used| has(used)))
        .collect();
    let families =
        // SAFETY: as above.
        unsafe { instance.raw.get_physical_device_queue_family_properties(physical) };
    let computes = |family: &vk::QueueFamilyProperties| {
        family.queue_flags.contains(vk::QueueFlags::COMPUTE) && family.queue_count > 0
    };
    let family = families.iter().position(computes);
    let family = family.ok_or_else(|| format!("{name}: it has no queue that computes"))? as u32;
    let queues = [vk::DeviceQueueCreateInfo::default()
        .queue_family_index(family)
        .queue_priorities(&[1.0])];
    let names: Vec<*const c_char> = extensions.iter().map(|name| name.as_ptr()).collect();
    // Where a shader's bug lets it reach beyond a buffer, it reaches nothing.
    let features = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
    let info = vk::DeviceCreateInfo::default()
        .queue_create_infos(&queues)
        .enabled_extension_names(&names)
        .enabled_features(&features);
    // SAFETY: the structs are valid; the extensions, the queue and the feature (which every driver has) are those
    // that the driver lists.
    let raw = unsafe { instance.raw.create_device(physical, &info, None) }
        .map_err(|result| failed("vkCreateDevice", result))?;
    let instance = Arc::clone(instance);
    // SAFETY: the device was just made, of these.
    unsafe {
        Device::of(
            instance,
            physical,
            raw,
            true,
            (family, 0),
            &extensions,
            facts,
        )
    }
    .map_err(|error| error.to_string())
}
