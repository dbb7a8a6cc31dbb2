//! `libze_loader.so.1`: Level Zero, as declared in `ze_api.h` of version 1.8
//! (<https://oneapi-src.github.io/level-zero-spec/level-zero/latest/core/PROG.html>).

mod import;

use std::ffi::{c_int, c_void};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, OnceLock};

use peerbuf_core::unpoisoned;

use super::{Allocated, Failed, functions};

pub(crate) use import::Gpu;

/// A handle of a driver, a device, a context or a command list.
type Handle = *mut c_void;

/// The start of each struct: its type, and a pointer to the next struct.
#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    kind: u32,
    padding: u32,
    next: *mut c_void,
}

impl Head {
    fn of(kind: u32) -> Head {
        Head::before(kind, std::ptr::null_mut())
    }

    fn before(kind: u32, next: *mut c_void) -> Head {
        let padding = 0;
        Head {
            kind,
            padding,
            next,
        }
    }
}

/// `ze_context_desc_t`, `ze_host_mem_alloc_desc_t` and `ze_external_memory_export_desc_t`.
#[repr(C)]
struct Flags {
    head: Head,
    flags: u32,
    padding: u32,
}

/// `ze_external_memory_export_fd_t` and `ze_external_memory_import_fd_t`
#[repr(C)]
struct ExportFd {
    head: Head,
    flags: u32,
    fd: c_int,
}

/// `ze_memory_allocation_properties_t`
#[repr(C)]
struct Properties {
    head: Head,
    kind: u32,
    padding: u32,
    id: u64,
    page_size: u64,
}

/// `ze_device_external_memory_properties_t`
#[repr(C)]
struct External {
    head: Head,
    memory_import: u32,
    memory_export: u32,
    image_import: u32,
    image_export: u32,
}

/// `ze_device_mem_alloc_desc_t`
#[repr(C)]
struct DeviceMemory {
    head: Head,
    flags: u32,
    ordinal: u32,
}

/// `ze_command_queue_desc_t`
#[repr(C)]
struct Queue {
    head: Head,
    ordinal: u32,
    index: u32,
    flags: u32,
    mode: u32,
    priority: u32,
    padding: u32,
}

/// `ze_pci_ext_properties_t`
#[repr(C)]
struct Pci {
    head: Head,
    domain: u32,
    bus: u32,
    device: u32,
    function: u32,
    generation: i32,
    width: i32,
    bandwidth: i64,
}

functions! {
    "libze_loader.so.1"
    {
        init = "zeInit" (u32);
        drivers = "zeDriverGet" (*mut u32, *mut Handle);
        devices = "zeDeviceGet" (Handle, *mut u32, *mut Handle);
        external = "zeDeviceGetExternalMemoryProperties" (Handle, *mut External);
        context_create = "zeContextCreate" (Handle, *const Flags, *mut Handle);
        context_destroy = "zeContextDestroy" (Handle);
        properties = "zeMemGetAllocProperties" (Handle, *const c_void, *mut Properties, *mut Handle);
        address_range = "zeMemGetAddressRange" (Handle, *const c_void, *mut *mut c_void, *mut usize);
        allocate_host = "zeMemAllocHost" (Handle, *const Flags, usize, usize, *mut *mut c_void);
        allocate_device =
            "zeMemAllocDevice" (Handle, *const DeviceMemory, usize, usize, Handle, *mut *mut c_void);
        free = "zeMemFree" (Handle, *mut c_void);
        list_create = "zeCommandListCreateImmediate" (Handle, Handle, *const Queue, *mut Handle);
        list_destroy = "zeCommandListDestroy" (Handle);
        append_copy = "zeCommandListAppendMemoryCopy"
            (Handle, *mut c_void, *const c_void, usize, Handle, u32, *mut Handle);
    }
    {
        pci = "zeDevicePciGetPropertiesExt" (Handle, *mut Pci);
    }
}

const DEVICE_EXTERNAL_MEMORY_PROPERTIES: u32 = 0xc;
const CONTEXT_DESC: u32 = 0xd;
const COMMAND_QUEUE_DESC: u32 = 0xe;
const DEVICE_MEM_ALLOC_DESC: u32 = 0x15;
const HOST_MEM_ALLOC_DESC: u32 = 0x16;
const MEMORY_ALLOCATION_PROPERTIES: u32 = 0x17;
const EXTERNAL_MEMORY_EXPORT_DESC: u32 = 0x18;
const EXTERNAL_MEMORY_EXPORT_FD: u32 = 0x1a;
const PCI_EXT_PROPERTIES: u32 = 0x10008;
/// `ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF`
const DMA_BUF: u32 = 2;
const QUEUE_SYNCHRONOUS: u32 = 1;

/// The kinds of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Device,
    Host,
    /// Migrates between device and host.
    Shared,
}

/// A context made by this crate.
///
/// # Invariants
/// `raw` is a context, and `device` a device of its driver; both stay valid.
pub(crate) struct Context {
    functions: &'static Functions,
    raw: usize,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `context` made the handle; owners of memory in a context also own the
        // context.
        unsafe { (self.functions.context_destroy)(handle(self.raw)) };
    }
}

/// An allocation and its context.
pub(crate) struct Memory {
    pub(crate) context: Context,
    pub(crate) kind: Kind,
    device: usize,
    /// The start and the length of the allocation, in bytes.
    pub(crate) base: u64,
    pub(crate) length: u64,
}

fn handle(raw: usize) -> Handle {
    std::ptr::with_exposed_provenance_mut(raw)
}

fn check(call: &'static str, code: c_int) -> Result<(), Failed> {
    let name = match code {
        0 => return Ok(()),
        0x7000_0001 => "ZE_RESULT_ERROR_DEVICE_LOST",
        0x7000_0002 => "ZE_RESULT_ERROR_OUT_OF_HOST_MEMORY",
        0x7000_0003 => "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        0x7800_0001 => "ZE_RESULT_ERROR_UNINITIALIZED",
        0x7800_0002 => "ZE_RESULT_ERROR_UNSUPPORTED_VERSION",
        0x7800_0003 => "ZE_RESULT_ERROR_UNSUPPORTED_FEATURE",
        0x7800_0004 => "ZE_RESULT_ERROR_INVALID_ARGUMENT",
        0x7800_0009 => "ZE_RESULT_ERROR_UNSUPPORTED_SIZE",
        0x7800_000d => "ZE_RESULT_ERROR_UNSUPPORTED_ENUMERATION",
        _ => "",
    };
    let name = name.to_owned();
    Err(Failed { call, code, name })
}

fn functions() -> Result<&'static Functions, String> {
    static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
    let functions = super::kept(&FUNCTIONS, Functions::load)?;
    // SAFETY: the argument is a number; a second call does nothing.
    let answer = unsafe { (functions.init)(0) };
    check("zeInit", answer).map_err(|failed| format!("zeInit: {failed}"))?;
    Ok(functions)
}

/// The handles that `get` lists. The first call counts them, the second fills in the list.
fn listed(
    call: &'static str,
    get: impl Fn(*mut u32, *mut Handle) -> c_int,
) -> Result<Vec<Handle>, Failed> {
    let mut count = 0;
    check(call, get(&mut count, std::ptr::null_mut()))?;
    let mut handles = vec![std::ptr::null_mut(); count as usize];
    check(call, get(&mut count, handles.as_mut_ptr()))?;
    handles.truncate(count as usize);
    Ok(handles)
}

fn drivers(functions: &Functions) -> Result<Vec<Handle>, Failed> {
    // SAFETY: the function stores a count, and fills in as many handles as the count allows.
    listed("zeDriverGet", |count, list| unsafe {
        (functions.drivers)(count, list)
    })
}

fn devices_of(functions: &Functions, driver: Handle) -> Result<Vec<Handle>, Failed> {
    // SAFETY: the function stores a count, and fills in as many handles as the count allows.
    listed("zeDeviceGet", |count, list| unsafe {
        (functions.devices)(driver, count, list)
    })
}

fn context(functions: &'static Functions, driver: Handle) -> Result<Context, Failed> {
    let description = Flags {
        head: Head::of(CONTEXT_DESC),
        flags: 0,
        padding: 0,
    };
    let mut raw = std::ptr::null_mut();
    // SAFETY: the description is valid, and the function stores a handle.
    let answer = unsafe { (functions.context_create)(driver, &description, &mut raw) };
    check("zeContextCreate", answer)?;
    let raw = raw.expose_provenance();
    Ok(Context { functions, raw })
}

/// Number of devices.
pub(crate) fn devices() -> Result<u32, String> {
    let functions = functions()?;
    let told = |failed: Failed| format!("{}: {failed}", failed.call);
    let mut count = 0;
    for driver in drivers(functions).map_err(told)? {
        count += devices_of(functions, driver).map_err(told)?.len() as u32;
    }
    Ok(count)
}

/// The allocation at an address; `None` if no driver knows the address.
///
/// A pointer belongs to a context, and the API cannot tell which. This function asks each
/// driver in a new context, because drivers keep the memory of all their contexts in one list.
///
/// # Errors
/// The error of the loader or of a driver.
pub(crate) fn memory(pointer: u64) -> Result<Option<Memory>, String> {
    let functions = functions()?;
    let told = |failed: Failed| format!("{}: {failed}", failed.call);
    for driver in drivers(functions).map_err(told)? {
        let context = context(functions, driver).map_err(told)?;
        if let Some(memory) = context.memory(pointer).map_err(told)? {
            return Ok(Some(memory));
        }
    }
    Ok(None)
}

/// Allocates memory that can be exported as a dma-buf. `device` counts the devices of all
/// drivers.
pub(crate) fn allocate(device: u32, length: u64) -> Result<Block, Failed> {
    let unavailable = |name| Failed {
        call: "zeInit",
        code: -1,
        name,
    };
    let functions = functions().map_err(unavailable)?;
    let mut before = 0;
    for driver in drivers(functions)? {
        let devices = devices_of(functions, driver)?;
        if let Some(handle) = devices.get(device as usize - before) {
            return context(functions, driver)?.allocate(*handle, length);
        }
        before += devices.len();
    }
    Err(Failed {
        call: "zeDeviceGet",
        code: -1,
        name: format!("there are {before} devices"),
    })
}

impl Context {
    fn memory(self, pointer: u64) -> Result<Option<Memory>, Failed> {
        let at = std::ptr::without_provenance(pointer as usize);
        let (properties, device) = self.properties(pointer, std::ptr::null_mut())?;
        let kind = match properties.kind {
            1 => Kind::Host,
            2 => Kind::Device,
            3 => Kind::Shared,
            _ => return Ok(None),
        };
        let (mut base, mut length) = (std::ptr::null_mut(), 0);
        // SAFETY: the function stores a pointer and a number.
        let answer =
            unsafe { (self.functions.address_range)(handle(self.raw), at, &mut base, &mut length) };
        check("zeMemGetAddressRange", answer)?;
        Ok(Some(Memory {
            context: self,
            kind,
            device: device.expose_provenance(),
            base: base.addr() as u64,
            length: length as u64,
        }))
    }

    fn properties(&self, pointer: u64, next: *mut c_void) -> Result<(Properties, Handle), Failed> {
        let at = std::ptr::without_provenance(pointer as usize);
        let mut properties = Properties {
            head: Head::before(MEMORY_ALLOCATION_PROPERTIES, next),
            kind: 0,
            padding: 0,
            id: 0,
            page_size: 0,
        };
        let mut device = std::ptr::null_mut();
        // SAFETY: the function fills in the struct and the one chained to it, and stores a handle.
        let answer = unsafe {
            (self.functions.properties)(handle(self.raw), at, &mut properties, &mut device)
        };
        check("zeMemGetAllocProperties", answer)?;
        Ok((properties, device))
    }

    fn allocate(self, device: Handle, length: u64) -> Result<Block, Failed> {
        let mut export = Flags {
            head: Head::of(EXTERNAL_MEMORY_EXPORT_DESC),
            flags: DMA_BUF,
            padding: 0,
        };
        let description = DeviceMemory {
            head: Head::before(DEVICE_MEM_ALLOC_DESC, (&raw mut export).cast()),
            flags: 0,
            ordinal: 0,
        };
        let mut at = std::ptr::null_mut();
        // SAFETY: the chain of descriptions is valid, and the function stores a pointer.
        let answer = unsafe {
            let (context, length) = (handle(self.raw), length as usize);
            (self.functions.allocate_device)(context, &description, length, 0, device, &mut at)
        };
        check("zeMemAllocDevice", answer)?;
        Ok(Block {
            // SAFETY: the owner of the block drops the block last.
            memory: unsafe { Allocated::at(at.addr() as u64, length) },
            context: self,
        })
    }

    fn free(&self, at: Handle) {
        // SAFETY: the context allocated the address, and no user is left.
        unsafe { (self.functions.free)(handle(self.raw), at) };
    }
}

/// Memory allocated here. Dropping it frees the memory, so everything made from it must go
/// first.
pub(crate) struct Block {
    memory: Allocated,
    context: Context,
}

impl Block {
    pub(crate) fn memory(&self) -> Allocated {
        self.memory
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.context.free(handle(self.memory.pointer as usize));
    }
}

/// What a device exports and imports.
fn external_of(functions: &Functions, device: usize) -> Result<External, Failed> {
    let mut external = External {
        head: Head::of(DEVICE_EXTERNAL_MEMORY_PROPERTIES),
        memory_import: 0,
        memory_export: 0,
        image_import: 0,
        image_export: 0,
    };
    // SAFETY: the device handle is valid, and the function fills the struct in.
    let answer = unsafe { (functions.external)(handle(device), &mut external) };
    check("zeDeviceGetExternalMemoryProperties", answer)?;
    Ok(external)
}

/// Domain, bus, device and function of a device.
fn address_of(functions: &Functions, device: usize) -> Option<[u32; 4]> {
    let ask = functions.pci?;
    let mut pci = Pci {
        head: Head::of(PCI_EXT_PROPERTIES),
        domain: 0,
        bus: 0,
        device: 0,
        function: 0,
        generation: 0,
        width: 0,
        bandwidth: 0,
    };
    // SAFETY: the device handle is valid, and the function fills the struct in.
    let answer = unsafe { ask(handle(device), &mut pci) };
    (answer == 0).then_some([pci.domain, pci.bus, pci.device, pci.function])
}

impl Memory {
    /// True if the device exports dma-bufs (`zeDeviceGetExternalMemoryProperties`).
    pub(crate) fn exports_dmabufs(&self) -> Result<bool, Failed> {
        let external = external_of(self.context.functions, self.device)?;
        Ok(external.memory_export & DMA_BUF != 0)
    }

    /// PCI domain, bus, device and function.
    pub(crate) fn address(&self) -> Option<[u32; 4]> {
        address_of(self.context.functions, self.device)
    }

    /// A dma-buf of the whole allocation. Each call returns a new descriptor; `None` if the
    /// driver returns none.
    pub(crate) fn export(&self) -> Result<Option<OwnedFd>, Failed> {
        let mut export = ExportFd {
            head: Head::of(EXTERNAL_MEMORY_EXPORT_FD),
            flags: DMA_BUF,
            fd: -1,
        };
        let next = (&raw mut export).cast();
        self.context.properties(self.base, next)?;
        // SAFETY: the driver stored a descriptor that the caller owns, or left -1.
        Ok(unsafe { super::descriptor(export.fd) })
    }

    /// Prepares copies of the memory's bytes.
    pub(crate) fn copier(self) -> Result<Copier, Failed> {
        Copier::new(self.context, self.device)
    }
}

/// Maximum number of bytes of one copy.
const ROOM: usize = 1 << 20;

/// Copies bytes with a command list through host memory that every device reaches. The
/// specification guarantees no copy of memory that the runtime did not allocate.
pub(crate) struct Copier {
    context: Context,
    list: usize,
    /// The address of the host memory. The lock admits one copy at a time to the memory and the
    /// list.
    room: Mutex<usize>,
}

impl Drop for Copier {
    fn drop(&mut self) {
        // SAFETY: `copier` made the list, and no copy runs: `drop` has the only reference.
        unsafe { (self.context.functions.list_destroy)(handle(self.list)) };
        let room = unpoisoned(self.room.get_mut());
        self.context.free(handle(*room));
    }
}

impl Copier {
    fn new(owner: Context, device: usize) -> Result<Copier, Failed> {
        let functions = owner.functions;
        let queue = Queue {
            head: Head::of(COMMAND_QUEUE_DESC),
            ordinal: 0,
            index: 0,
            flags: 0,
            mode: QUEUE_SYNCHRONOUS,
            priority: 0,
            padding: 0,
        };
        let description = Flags {
            head: Head::of(HOST_MEM_ALLOC_DESC),
            flags: 0,
            padding: 0,
        };
        let context = handle(owner.raw);
        let mut room = std::ptr::null_mut();
        // SAFETY: the description is valid, and the function stores a pointer.
        let answer =
            unsafe { (functions.allocate_host)(context, &description, ROOM, 0, &mut room) };
        check("zeMemAllocHost", answer)?;
        let mut list = std::ptr::null_mut();
        // SAFETY: the description is valid, and the function stores a handle.
        let answer = unsafe { (functions.list_create)(context, handle(device), &queue, &mut list) };
        if let Err(failed) = check("zeCommandListCreateImmediate", answer) {
            owner.free(room);
            return Err(failed);
        }
        Ok(Copier {
            context: owner,
            list: list.expose_provenance(),
            room: Mutex::new(room.expose_provenance()),
        })
    }

    /// # Safety
    /// Both addresses are valid for `length` bytes until the function returns.
    unsafe fn copy(
        &self,
        to: *mut c_void,
        from: *const c_void,
        length: usize,
    ) -> Result<(), Failed> {
        let (none, list) = (std::ptr::null_mut(), handle(self.list));
        let append = self.context.functions.append_copy;
        // SAFETY: the synchronous list finishes the copy before the call returns; the caller
        // guarantees valid addresses.
        let answer = unsafe { append(list, to, from, length, none, 0, std::ptr::null_mut()) };
        check("zeCommandListAppendMemoryCopy", answer)
    }

    /// Copies bytes into memory. The copy is complete on return.
    ///
    /// # Panics
    /// If the range exceeds the memory.
    pub(crate) fn upload(&self, to: Allocated, offset: u64, from: &[u8]) -> Result<(), Failed> {
        let at = to.address(offset, from.len());
        let room = unpoisoned(self.room.lock());
        let room = handle(*room);
        for (piece, at) in from.chunks(ROOM).zip((at..).step_by(ROOM)) {
            // SAFETY: the host memory has ROOM bytes, and the lock excludes other copies.
            unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), room.cast(), piece.len()) };
            // SAFETY: both addresses are valid for the piece: the host memory's, and the
            // address of memory that stays allocated (`Allocated`).
            unsafe { self.copy(handle(at as usize), room, piece.len()) }?;
        }
        Ok(())
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
        let room = unpoisoned(self.room.lock());
        let room = handle(*room);
        for (piece, at) in into.chunks_mut(ROOM).zip((at..).step_by(ROOM)) {
            // SAFETY: both addresses are valid for the piece: the host memory's, and the
            // address of memory that stays allocated (`Allocated`).
            unsafe { self.copy(room, handle(at as usize), piece.len()) }?;
            // SAFETY: the host memory has ROOM bytes, and the lock excludes other copies.
            unsafe { std::ptr::copy_nonoverlapping(room.cast(), piece.as_mut_ptr(), piece.len()) };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_structs_are_the_headers() {
        assert_eq!(size_of::<Head>(), 16);
        assert_eq!(size_of::<Flags>(), 24);
        assert_eq!((size_of::<ExportFd>(), offset_of!(ExportFd, fd)), (24, 20));
        assert_eq!(
            (size_of::<Properties>(), offset_of!(Properties, id)),
            (40, 24)
        );
        assert_eq!(size_of::<External>(), 32);
        assert_eq!(offset_of!(External, memory_export), 20);
        assert_eq!((size_of::<Queue>(), offset_of!(Queue, mode)), (40, 28));
        assert_eq!(
            (size_of::<DeviceMemory>(), offset_of!(DeviceMemory, ordinal)),
            (24, 20)
        );
        assert_eq!((size_of::<Pci>(), offset_of!(Pci, bandwidth)), (48, 40));
    }
}
