//! Memory that others made, as a GPU of ROCm's reaches it.

use std::ffi::c_void;

use super::super::super::given::Given;
use super::super::{Allocated, Failed, Imports, Reached, extent};
use super::{Hsa, check};
use crate::buffer::Mapping;

const INVALID_ARGUMENT: i32 = 0x1001;
const INVALID_AGENT: i32 = 0x1004;

/// A GPU, as an importer.
pub(crate) struct Gpu {
    hsa: Hsa,
    agent: u64,
}

impl Gpu {
    /// # Errors
    /// The answer of the loader or of the runtime, or the number of GPUs.
    pub(crate) fn open(number: u32) -> Result<Gpu, String> {
        let hsa = Hsa::open()?;
        let gpus = hsa
            .gpus()
            .map_err(|failed| format!("{}: {failed}", failed.call))?;
        match gpus.get(number as usize) {
            Some(&agent) => Ok(Gpu { hsa, agent }),
            None => Err(format!("there are {} devices", gpus.len())),
        }
    }

    /// Its domain, and bus, device and function.
    pub(crate) fn address(&self) -> Option<(u32, u32)> {
        self.hsa.address_of(self.agent)
    }

    /// The runtime once more: what is imported keeps it initialised.
    fn runtime(&self) -> Result<Hsa, Failed> {
        Hsa::open().map_err(|name| Failed {
            call: "hsa_init",
            code: 0,
            name,
        })
    }
}

impl Imports for Gpu {
    /// The kernel takes a reference of its own: the descriptor stays the caller's.
    fn dmabuf(&self, dmabuf: Given, size: u64) -> Result<Box<dyn Reached>, Failed> {
        const CALL: &str = "hsa_amd_interop_map_buffer";
        let hsa = self.runtime()?;
        let (mut agent, mut length, mut at) = (self.agent, 0, std::ptr::null_mut());
        let (no_size, no_metadata) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: there is one agent; the function stores a length and an address, and metadata is optional.
        let answer = unsafe {
            let fd = dmabuf.number();
            let map = hsa.0.map;
            map(
                1,
                &mut agent,
                fd,
                0,
                &mut length,
                &mut at,
                no_size,
                no_metadata,
            )
        };
        check(hsa.0, CALL, answer)?;
        let pointer = at.expose_provenance() as u64;
        // SAFETY: the runtime has mapped them until `Memory` is dropped, which holds the value.
        let memory = unsafe { Allocated::at(pointer, size) };
        let what = What::Dmabuf(at.addr());
        let reached = Memory { what, memory, hsa };
        if (length as u64) < size {
            return Err(Failed {
                call: CALL,
                code: 0,
                name: format!("success, and {length} of {size} bytes"),
            });
        }
        Ok(Box::new(reached))
    }

    fn mapped(&self, mapping: Mapping, is_io: bool) -> Result<Box<dyn Reached>, Failed> {
        const CALL: &str = "hsa_amd_memory_lock";
        if is_io {
            return Err(Failed {
                call: CALL,
                code: INVALID_ARGUMENT,
                name: "memory of a BAR: the runtime locks memory of the system only".to_owned(),
            });
        }
        let (at, length) = extent(&mapping)?;
        let hsa = self.runtime()?;
        let (mut agent, mut pointer) = (self.agent, std::ptr::null_mut());
        // SAFETY: the process has these bytes mapped for as long as they are locked (`Memory`).
        let answer = unsafe { (hsa.0.lock)(at, length, &mut agent, 1, &mut pointer) };
        check(hsa.0, CALL, answer)?;
        // SAFETY: the GPU reaches them until `Memory` is dropped, which holds the value.
        let memory = unsafe { Allocated::at(pointer.expose_provenance() as u64, length as u64) };
        let what = What::Locked(mapping);
        Ok(Box::new(Memory { what, memory, hsa }))
    }

    fn is_final(&self, failed: &Failed) -> bool {
        // The plain HSA_STATUS_ERROR stands for a shortage of memory, too.
        [INVALID_ARGUMENT, INVALID_AGENT].contains(&failed.code)
    }
}

enum What {
    /// Where it is mapped.
    Dmabuf(usize),
    Locked(Mapping),
}

/// Memory that the GPU reaches.
///
/// # Invariants
/// `what` is mapped, or locked, by this value.
struct Memory {
    what: What,
    memory: Allocated,
    /// Shut down after the memory was given back.
    hsa: Hsa,
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.what {
            What::Dmabuf(at) => {
                let at = std::ptr::with_exposed_provenance_mut(*at);
                // SAFETY: it is mapped (invariant), and its users are gone.
                unsafe { (self.hsa.0.unmap)(at) };
            }
            What::Locked(mapping) => {
                let at: *mut c_void = mapping.as_ptr().cast();
                // SAFETY: it is locked (invariant), and its users are gone.
                unsafe { (self.hsa.0.unlock)(at) };
            }
        }
    }
}

impl Reached for Memory {
    fn memory(&self) -> Allocated {
        self.memory
    }

    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed> {
        self.hsa.upload(self.memory, offset, from)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        self.hsa.download(self.memory, offset, into)
    }
}
