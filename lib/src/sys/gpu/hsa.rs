//! `libhsa-runtime64.so.1`: ROCm's runtime, as declared in `hsa.h` and `hsa_ext_amd.h`.

mod import;

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use super::{Allocated, Failed, functions};

pub(crate) use import::Gpu;

/// `hsa_amd_pointer_info_t`. Versions only append fields; the library fills in `size` bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::Zeroable)]
struct PointerInfo {
    size: u32,
    kind: u32,
    agent_base: u64,
    host_base: u64,
    length: u64,
    user_data: u64,
    owner: u64,
    global_flags: u32,
    registered: u32,
}

type EachAgent = unsafe extern "C" fn(u64, *mut c_void) -> c_int;

functions! {
    "libhsa-runtime64.so.1"
    {
        init = "hsa_init" ();
        shut_down = "hsa_shut_down" ();
        status_string = "hsa_status_string" (c_int, *mut *const c_char);
        iterate_agents = "hsa_iterate_agents" (EachAgent, *mut c_void);
        agent_info = "hsa_agent_get_info" (u64, c_int, *mut c_void);
        pointer_info = "hsa_amd_pointer_info" (*const c_void, *mut PointerInfo, *const c_void, *mut u32, *mut *mut u64);
        copy = "hsa_memory_copy" (*mut c_void, *const c_void, usize);
        lock = "hsa_amd_memory_lock" (*mut c_void, usize, *mut u64, c_int, *mut *mut c_void);
        unlock = "hsa_amd_memory_unlock" (*mut c_void);
        map = "hsa_amd_interop_map_buffer"
            (u32, *mut u64, c_int, u32, *mut usize, *mut *mut c_void, *mut usize, *mut *const c_void);
        unmap = "hsa_amd_interop_unmap_buffer" (*mut c_void);
    }
    {
        // ROCm 5.4
        export = "hsa_amd_portable_export_dmabuf" (*const c_void, usize, *mut c_int, *mut u64);
        // ROCm 7.1
        export_v2 = "hsa_amd_portable_export_dmabuf_v2" (*const c_void, usize, *mut c_int, *mut u64, u64);
    }
}

const NOT_INITIALIZED: i32 = 0x100b;
/// A number of this crate: the library lacks the function.
pub(crate) const NO_SUCH_FUNCTION: i32 = -1;

/// `HSA_AMD_DMABUF_MAPPING_TYPE_PCIE`
pub(crate) const MAPPING_PCIE: u64 = 1;

const POINTER_UNKNOWN: u32 = 0;
const POINTER_LOCKED: u32 = 2;
const AGENT_INFO_DEVICE: c_int = 17;
const AGENT_INFO_BDFID: c_int = 0xa006;
const AGENT_INFO_DOMAIN: c_int = 0xa00f;
const DEVICE_GPU: u32 = 1;

/// The allocation at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// The start and the length of the allocation, in bytes.
    pub(crate) base: u64,
    pub(crate) length: u64,
    /// True for host memory that is locked for a GPU, which the runtime did not allocate.
    pub(crate) locked: bool,
    owner: u64,
}

/// A reference to the initialised runtime, which counts its references.
pub(crate) struct Hsa(&'static Functions);

impl Drop for Hsa {
    fn drop(&mut self) {
        // SAFETY: `open` has initialised the runtime once for this value.
        unsafe { (self.0.shut_down)() };
    }
}

fn functions() -> Result<&'static Functions, String> {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    super::kept(&FUNCTIONS, Functions::load)
}

fn check(functions: &Functions, call: &'static str, code: c_int) -> Result<(), Failed> {
    if code == 0 {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the function sets the pointer to a static string, or leaves it null.
    unsafe { (functions.status_string)(code, &mut text) };
    // SAFETY: the pointer is null or a static string.
    let text = unsafe { super::text(text) };
    // The text is a name, a colon and a sentence.
    let name = text.split(':').next().unwrap_or_default().trim().to_owned();
    Err(Failed { call, code, name })
}

/// The allocation at an address; `None` without one, and in a program that has not initialised
/// HSA.
///
/// # Errors
/// The error of the loader or of the runtime.
pub(crate) fn memory(pointer: u64) -> Result<Option<Memory>, String> {
    let functions = functions()?;
    let mut info: PointerInfo = bytemuck::Zeroable::zeroed();
    info.size = size_of::<PointerInfo>() as u32;
    let at = std::ptr::without_provenance(pointer as usize);
    let (none, no_list) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the function fills in as much of the struct as `size` says; the list of agents is optional.
    let answer =
        unsafe { (functions.pointer_info)(at, &mut info, std::ptr::null(), none, no_list) };
    match check(functions, "hsa_amd_pointer_info", answer) {
        Ok(()) if info.kind == POINTER_UNKNOWN => Ok(None),
        Ok(()) => Ok(Some(Memory {
            base: info.agent_base,
            length: info.length,
            locked: info.kind == POINTER_LOCKED,
            owner: info.owner,
        })),
        Err(Failed { code, .. }) if code == NOT_INITIALIZED => Ok(None),
        Err(failed) => Err(format!("{}: {failed}", failed.call)),
    }
}

impl Hsa {
    /// Initialises the runtime, or adds a reference.
    ///
    /// # Errors
    /// The error of the loader or of the runtime.
    pub(crate) fn open() -> Result<Hsa, String> {
        let functions = functions()?;
        // SAFETY: the function has no arguments.
        let answer = unsafe { (functions.init)() };
        check(functions, "hsa_init", answer).map_err(|failed| format!("hsa_init: {failed}"))?;
        Ok(Hsa(functions))
    }

    /// Number of GPUs.
    pub(crate) fn devices(&self) -> Result<u32, Failed> {
        Ok(self.gpus()?.len() as u32)
    }

    /// The GPUs' agents.
    fn gpus(&self) -> Result<Vec<u64>, Failed> {
        unsafe extern "C" fn each(agent: u64, list: *mut c_void) -> c_int {
            // SAFETY: `list` is the vector below, borrowed by this call alone.
            unsafe { &mut *list.cast::<Vec<u64>>() }.push(agent);
            0
        }
        let mut agents: Vec<u64> = Vec::new();
        // SAFETY: `each` has the callback's type, and the list outlives the call.
        let answer = unsafe { (self.0.iterate_agents)(each, (&raw mut agents).cast()) };
        check(self.0, "hsa_iterate_agents", answer)?;
        agents.retain(|agent| self.info(*agent, AGENT_INFO_DEVICE) == Some(DEVICE_GPU));
        Ok(agents)
    }

    /// A 32-bit attribute of an agent.
    fn info(&self, agent: u64, attribute: c_int) -> Option<u32> {
        let mut value = 0u32;
        // SAFETY: each attribute named in this file has 32 bits.
        let answer = unsafe { (self.0.agent_info)(agent, attribute, (&raw mut value).cast()) };
        (answer == 0).then_some(value)
    }

    /// Domain, and bus, device and function of the memory's GPU.
    pub(crate) fn address(&self, memory: Memory) -> Option<(u32, u32)> {
        self.address_of(memory.owner)
    }

    fn address_of(&self, agent: u64) -> Option<(u32, u32)> {
        if self.info(agent, AGENT_INFO_DEVICE)? != DEVICE_GPU {
            return None;
        }
        let at = self.info(agent, AGENT_INFO_BDFID)?;
        Some((self.info(agent, AGENT_INFO_DOMAIN)?, at))
    }

    /// The dma-buf of the whole allocation around the range, and the range's offset in it.
    /// `None` uses the call of older versions.
    pub(crate) fn export(
        &self,
        range: Allocated,
        flags: Option<u64>,
    ) -> Result<(OwnedFd, u64), Failed> {
        let at = std::ptr::without_provenance(range.pointer as usize);
        let length = range.length as usize;
        let (mut fd, mut offset) = (-1, 0);
        let missing = |call| Failed {
            call,
            code: NO_SUCH_FUNCTION,
            name: "not in this library".to_owned(),
        };
        let (call, answer) = match flags {
            Some(flags) => {
                let call = "hsa_amd_portable_export_dmabuf_v2";
                let export = self.0.export_v2.ok_or(missing(call))?;
                // SAFETY: the function stores a descriptor and an offset.
                (call, unsafe {
                    export(at, length, &mut fd, &mut offset, flags)
                })
            }
            None => {
                let call = "hsa_amd_portable_export_dmabuf";
                let export = self.0.export.ok_or(missing(call))?;
                // SAFETY: the function stores a descriptor and an offset.
                (call, unsafe { export(at, length, &mut fd, &mut offset) })
            }
        };
        check(self.0, call, answer)?;
        // SAFETY: the runtime opened the descriptor for the caller. `close` does all that
        // hsa_amd_portable_close_dmabuf does.
        let fd = unsafe { super::descriptor(fd) };
        let fd = fd.ok_or(Failed {
            call,
            code: 0,
            name: "success, and no descriptor".to_owned(),
        })?;
        Ok((fd, offset))
    }

    /// Copies bytes into memory. The copy is complete on return.
    ///
    /// # Panics
    /// If the range exceeds the memory.
    pub(crate) fn upload(&self, to: Allocated, offset: u64, from: &[u8]) -> Result<(), Failed> {
        let at = to.address(offset, from.len());
        let at = std::ptr::with_exposed_provenance_mut(at as usize);
        // SAFETY: the slice is valid for the read, and the memory stays (`Allocated`).
        let answer = unsafe { (self.0.copy)(at, from.as_ptr().cast(), from.len()) };
        check(self.0, "hsa_memory_copy", answer)
    }

    /// Copies bytes out of memory.
    ///
    /// # Panics
    /// If the range exceeds the memory.
    pub(crate) fn download(
        &self,
        from: Allocated,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Failed> {
        let at = from.address(offset, into.len());
        let at: *const c_void = std::ptr::with_exposed_provenance(at as usize);
        // SAFETY: the slice is valid for the write, and the memory stays (`Allocated`).
        let answer = unsafe { (self.0.copy)(into.as_mut_ptr().cast(), at, into.len()) };
        check(self.0, "hsa_memory_copy", answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_struct_is_the_headers() {
        use std::mem::offset_of;
        assert_eq!(size_of::<PointerInfo>(), 56);
        assert_eq!(offset_of!(PointerInfo, kind), 4);
        assert_eq!(offset_of!(PointerInfo, agent_base), 8);
        assert_eq!(offset_of!(PointerInfo, length), 24);
        assert_eq!(offset_of!(PointerInfo, owner), 40);
        assert_eq!(offset_of!(PointerInfo, global_flags), 48);
    }
}
