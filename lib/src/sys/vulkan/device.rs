//! A logical device: opened here, or the caller's own.

use std::ffi::{CStr, c_char};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use ash::{ext, khr, vk};
use peerbuf_core::unpoisoned;

use crate::error::{SystemError, Unavailable, VulkanError};
use crate::topology::PciAddress;

const WHAT: &str = "Vulkan";
const LOADER: &str = "libvulkan.so.1";

/// The extensions that a device must have been created with to import and export dma-bufs.
pub const NEEDED: [&CStr; 2] = [
    khr::external_memory_fd::NAME,
    ext::external_memory_dma_buf::NAME,
];

/// Optional extensions: fences as sync files, and ownership transfer to other drivers.
pub const USED: [&CStr; 2] = [
    khr::external_semaphore_fd::NAME,
    ext::queue_family_foreign::NAME,
];

/// A Vulkan device of the caller, for [`Device::from_raw`].
#[derive(Clone)]
pub struct Raw<'a> {
    /// The loader's entry point.
    pub entry: ash::Entry,
    /// The instance, created for Vulkan 1.1 or later.
    pub instance: ash::Instance,
    /// The physical device behind `device`.
    pub physical: vk::PhysicalDevice,
    /// The device.
    pub device: ash::Device,
    /// The family of a queue of the device that supports compute or transfer.
    pub queue_family: u32,
    /// The queue's index in its family.
    pub queue: u32,
    /// All extensions that the device was created with: every one of [`NEEDED`], and any of
    /// [`USED`].
    pub extensions: &'a [&'a CStr],
}

/// A Vulkan device that imports and exports dma-bufs. Clones refer to the same device.
///
/// A forked child of the process that opened the device cannot use it.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

/// How Vulkan's queues and the fences of dma-bufs wait for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fences {
    /// As sync files (`VK_KHR_external_semaphore_fd`): a queue waits for the fences of a
    /// dma-buf, and the dma-buf has a fence until the queue's work is done. The CPU waits for
    /// nothing.
    SyncFiles,
    /// By the CPU: it waits for the dma-buf's fences before the work, and then for the work
    /// itself.
    Host {
        /// The reason why sync files are not used.
        why: String,
    },
}

struct Inner {
    raw: ash::Device,
    /// True if dropping this value destroys the device.
    owned: bool,
    physical: vk::PhysicalDevice,
    memory_fd: khr::external_memory_fd::Device,
    semaphore_fd: Result<khr::external_semaphore_fd::Device, String>,
    /// The queue family that stands for all other users of a dma-buf.
    others: u32,
    family: u32,
    queue: Mutex<vk::Queue>,
    facts: Facts,
    /// Last field: the device is destroyed before its instance.
    instance: Arc<Instance>,
}

/// The properties of a physical device.
struct Facts {
    name: String,
    /// The driver's name without its version.
    driver_name: String,
    driver: String,
    lavapipe: bool,
    /// True if the CPU does the work.
    software: bool,
    pci: Option<PciAddress>,
    limits: vk::PhysicalDeviceLimits,
    memory: vk::PhysicalDeviceMemoryProperties,
}

struct Instance {
    raw: ash::Instance,
    owned: bool,
    /// Keeps the library of all functions loaded.
    entry: ash::Entry,
}

impl Drop for Instance {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: this crate created the instance, and each of its devices holds this
            // value, so all of them are destroyed.
            unsafe { self.raw.destroy_instance(None) };
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: this crate created the device, and everything made from it holds this
            // value and waited for its work.
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
    /// Opens every local device that imports or exports dma-bufs, each with one compute queue.
    ///
    /// # Errors
    /// [`Unavailable`] without the loader, without a driver, or if no device has the
    /// extensions. The error says what each device lacks.
    pub fn all() -> Result<Vec<Device>, Unavailable> {
        // SAFETY: the library is the system's Vulkan loader, whose initialisers are made for
        // any process.
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
        // SAFETY: the structs are valid; the entry point is stored beside the instance.
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

    /// Opens the first device of [`Device::all`] whose name contains `which`, or whose PCI
    /// address is `which`.
    ///
    /// # Errors
    /// As [`Device::all`], and if no device matches. The error lists the devices.
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

    /// Takes a device that the program created. The program keeps the ownership and destroys
    /// it.
    ///
    /// # Errors
    /// [`VulkanError`] if the device was created without one of [`NEEDED`], or the instance for
    /// Vulkan 1.0.
    ///
    /// # Safety
    /// - The parts belong together: the device was created from the physical device, the
    ///   physical device belongs to the instance, and the entry point made the instance. The
    ///   queue belongs to the device, and the extensions are those that the device was created
    ///   with.
    /// - The parts are live until this value, its clones, and everything made from them are
    ///   dropped.
    /// - Nobody else uses the queue while a call of this value uses it ([`Device::submit`]). A
    ///   program with several queues passes one that it does not use itself.
    pub unsafe fn from_raw(raw: Raw<'_>) -> Result<Device, VulkanError> {
        let instance = Arc::new(Instance {
            raw: raw.instance,
            owned: false,
            entry: raw.entry,
        });
        // SAFETY: the caller guarantees that the physical device belongs to the instance, the
        // device to the physical device, and the extensions and the queue to the device.
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
        // SAFETY: the caller guarantees that the queue belongs to the device.
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
        // ash panics in the functions of a missing extension.
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

    /// The driver's name, such as `radv` or `llvmpipe` (lavapipe); empty if the driver has
    /// none.
    pub fn driver_name(&self) -> &str {
        &self.inner.facts.driver_name
    }

    /// The driver's name and version, as the driver reports them.
    pub fn driver(&self) -> &str {
        &self.inner.facts.driver
    }

    /// The device's PCI address, if the driver reports one.
    pub fn pci(&self) -> Option<PciAddress> {
        self.inner.facts.pci
    }

    /// True if the CPU does the device's work.
    pub fn is_software(&self) -> bool {
        self.inner.facts.software
    }

    /// How the device's work and the fences of dma-bufs wait for each other.
    pub fn fences(&self) -> Fences {
        match &self.inner.semaphore_fd {
            Ok(_) => Fences::SyncFiles,
            Err(why) => Fences::Host { why: why.clone() },
        }
    }

    /// The device's functions and its handle. Both are valid as long as this value or a clone.
    pub fn raw(&self) -> &ash::Device {
        &self.inner.raw
    }

    /// The device's instance.
    pub fn instance(&self) -> &ash::Instance {
        &self.inner.instance.raw
    }

    /// The physical device.
    pub fn physical(&self) -> vk::PhysicalDevice {
        self.inner.physical
    }

    /// The family of the device's queue.
    pub fn queue_family(&self) -> u32 {
        self.inner.family
    }

    /// The queue family for acquiring and releasing dma-bufs: `VK_QUEUE_FAMILY_FOREIGN_EXT`, or
    /// `VK_QUEUE_FAMILY_EXTERNAL` for a device without that extension.
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

    /// The first memory type of `bits` that has all flags of `wanted`, or else the first type
    /// of `bits`.
    pub(super) fn memory_type(&self, bits: u32, wanted: vk::MemoryPropertyFlags) -> Option<u32> {
        let types = self.inner.facts.memory.memory_types_as_slice();
        let mut allowed = (0..).zip(types).filter(|(n, _)| bits >> n & 1 == 1);
        let first = allowed.clone().next();
        let best = allowed.find(|(_, kind)| kind.property_flags.contains(wanted));
        best.or(first).map(|(n, _)| n)
    }

    /// The flags of memory type `n`.
    pub(super) fn memory_flags(&self, n: u32) -> vk::MemoryPropertyFlags {
        let types = self.inner.facts.memory.memory_types_as_slice();
        types
            .get(n as usize)
            .map_or(vk::MemoryPropertyFlags::empty(), |kind| kind.property_flags)
    }
}

impl Inner {
    /// Checks that semaphores can be imported and exported as sync files.
    fn sync_files(&self, enabled: bool) -> Result<(), String> {
        if !enabled {
            return Err("the device has no VK_KHR_external_semaphore_fd".into());
        }
        let info = vk::PhysicalDeviceExternalSemaphoreInfo::default()
            .handle_type(vk::ExternalSemaphoreHandleTypeFlags::SYNC_FD);
        let mut answer = vk::ExternalSemaphoreProperties::default();
        // SAFETY: the physical device belongs to the instance, which has Vulkan 1.1.
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
    /// The physical device belongs to the instance, which has Vulkan 1.1.
    unsafe fn ask(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Facts {
        let extensions =
            // SAFETY: the caller guarantees that the physical device belongs to the instance.
            unsafe { instance.enumerate_device_extension_properties(physical) }.unwrap_or_default();
        let has = |name| {
            extensions
                .iter()
                .any(|extension| text(&extension.extension_name) == text_of(name))
        };
        // SAFETY: the caller guarantees that the physical device belongs to the instance.
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
        // SAFETY: the caller guarantees that the physical device belongs to the instance; only
        // structs of extensions that the driver lists are in the chain.
        unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
        let properties = properties.properties;
        // SAFETY: the caller guarantees that the physical device belongs to the instance.
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

/// The driver's text, up to its NUL, with invalid UTF-8 replaced.
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

/// Creates a device with a compute queue, or returns the reason why it cannot.
fn open(instance: &Arc<Instance>, physical: vk::PhysicalDevice) -> Result<Device, String> {
    // SAFETY: the physical device belongs to the instance, which was created for Vulkan 1.1.
    let facts = unsafe { Facts::ask(&instance.raw, physical) };
    let name = facts.name.clone();
    let failed = |call: &str, result: vk::Result| format!("{name}: {call}: {result:?}");
    // SAFETY: the physical device belongs to the instance.
    let properties = unsafe { instance.raw.get_physical_device_properties(physical) };
    if properties.api_version < vk::API_VERSION_1_1 {
        return Err(format!("{name}: its driver has Vulkan 1.0"));
    }
    // SAFETY: the physical device belongs to the instance.
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
        // SAFETY: the physical device belongs to the instance.
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
    // A faulty shader that accesses memory beyond a buffer reaches nothing.
    let features = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
    let info = vk::DeviceCreateInfo::default()
        .queue_create_infos(&queues)
        .enabled_extension_names(&names)
        .enabled_features(&features);
    // SAFETY: the structs are valid; the driver lists the extensions and the queue, and every
    // driver has the feature.
    let raw = unsafe { instance.raw.create_device(physical, &info, None) }
        .map_err(|result| failed("vkCreateDevice", result))?;
    let instance = Arc::clone(instance);
    // SAFETY: the device was just created from these parts.
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
