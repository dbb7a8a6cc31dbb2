//! Memory that others made, as a device of Level Zero's reaches it.

use super::super::super::given::Given;
use super::super::{Allocated, Failed, Imports, Reached};
use super::{
    Copier, DEVICE_MEM_ALLOC_DESC, DMA_BUF, DeviceMemory, ExportFd as ImportFd, Functions, Head,
    address_of, check, context, devices_of, drivers, external_of, functions, handle,
};
use crate::buffer::Mapping;

/// `ZE_STRUCTURE_TYPE_EXTERNAL_MEMORY_IMPORT_FD`; the struct is as that for an export.
const EXTERNAL_MEMORY_IMPORT_FD: u32 = 0x19;
const UNSUPPORTED_FEATURE: i32 = 0x7800_0003;
const INVALID_ARGUMENT: i32 = 0x7800_0004;
const UNSUPPORTED_ENUMERATION: i32 = 0x7800_000d;

/// A device, as an importer.
pub(crate) struct Gpu {
    functions: &'static Functions,
    driver: usize,
    device: usize,
}

impl Gpu {
    /// A device of this number among all drivers'.
    ///
    /// # Errors
    /// The answer of the loader or of a driver, or the number of devices.
    pub(crate) fn open(number: u32) -> Result<Gpu, String> {
        let functions = functions()?;
        let told = |failed: Failed| format!("{}: {failed}", failed.call);
        let mut all = Vec::new();
        for driver in drivers(functions).map_err(told)? {
            let devices = devices_of(functions, driver).map_err(told)?;
            all.extend(devices.into_iter().map(|device| (driver, device)));
        }
        let found = all.get(number as usize).map(|(driver, device)| Gpu {
            functions,
            driver: driver.expose_provenance(),
            device: device.expose_provenance(),
        });
        found.ok_or_else(|| format!("there are {} devices", all.len()))
    }

    /// Domain, bus, device and function.
    pub(crate) fn address(&self) -> Option<[u32; 4]> {
        address_of(self.functions, self.device)
    }
}

impl Imports for Gpu {
    fn dmabuf(&self, dmabuf: Given, size: u64) -> Result<Box<dyn Reached>, Failed> {
        const CALL: &str = "zeMemAllocDevice(EXTERNAL_MEMORY_IMPORT_FD)";
        if external_of(self.functions, self.device)?.memory_import & DMA_BUF == 0 {
            return Err(Failed {
                call: "zeDeviceGetExternalMemoryProperties",
                code: UNSUPPORTED_FEATURE,
                name: "the device imports no dma-bufs".to_owned(),
            });
        }
        let context = context(self.functions, handle(self.driver))?;
        let copier = Copier::new(context, self.device)?;
        let mut import = ImportFd {
            head: Head::of(EXTERNAL_MEMORY_IMPORT_FD),
            flags: DMA_BUF,
            fd: dmabuf.number(),
        };
        let description = DeviceMemory {
            head: Head::before(DEVICE_MEM_ALLOC_DESC, (&raw mut import).cast()),
            flags: 0,
            ordinal: 0,
        };
        let mut at = std::ptr::null_mut();
        // SAFETY: the chain of descriptions is valid, and the function stores a pointer.
        let answer = unsafe {
            let (context, device) = (handle(copier.context.raw), handle(self.device));
            (self.functions.allocate_device)(
                context,
                &description,
                size as usize,
                0,
                device,
                &mut at,
            )
        };
        check(CALL, answer)?;
        let pointer = at.expose_provenance() as u64;
        // SAFETY: the allocation stays until `Memory` is dropped, which holds the value.
        let memory = unsafe { Allocated::at(pointer, size) };
        Ok(Box::new(Memory { memory, copier }))
    }

    fn mapped(&self, _: Mapping, _: bool) -> Result<Box<dyn Reached>, Failed> {
        Err(Failed {
            call: "ze_api.h",
            code: UNSUPPORTED_FEATURE,
            name: "Level Zero has no call that takes memory of the host".to_owned(),
        })
    }

    fn is_final(&self, failed: &Failed) -> bool {
        [
            UNSUPPORTED_FEATURE,
            INVALID_ARGUMENT,
            UNSUPPORTED_ENUMERATION,
        ]
        .contains(&failed.code)
    }
}

/// Memory that was imported.
///
/// # Invariants
/// It is an allocation in the copier's context.
struct Memory {
    memory: Allocated,
    copier: Copier,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // The context is destroyed after this, with the copier.
        let at = handle(self.memory.pointer as usize);
        self.copier.context.free(at);
    }
}

impl Reached for Memory {
    fn memory(&self) -> Allocated {
        self.memory
    }

    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed> {
        self.copier.upload(self.memory, offset, from)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        self.copier.download(self.memory, offset, into)
    }
}
