//! `libcuda.so.1`: the driver API, as declared in `cuda.h` of CUDA 12.9
//! (<https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEM.html>).

mod import;

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use super::{Allocated, Failed, functions};

pub(crate) use import::Gpu;

/// `CUDA_EXTERNAL_MEMORY_HANDLE_DESC`
#[repr(C)]
struct Description {
    kind: c_int,
    padding: u32,
    fd: c_int,
    /// The union's other members are two pointers.
    rest: [u32; 3],
    size: u64,
    flags: c_uint,
    reserved: [c_uint; 16],
    end: u32,
}

/// `CUDA_EXTERNAL_MEMORY_BUFFER_DESC`
#[repr(C)]
struct Part {
    offset: u64,
    size: u64,
    flags: c_uint,
    reserved: [c_uint; 16],
    end: u32,
}

functions! {
    "libcuda.so.1"
    {
        init = "cuInit" (c_uint);
        error_name = "cuGetErrorName" (c_int, *mut *const c_char);
        device_count = "cuDeviceGetCount" (*mut c_int);
        device_get = "cuDeviceGet" (*mut c_int, c_int);
        device_attribute = "cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
        device_bus_id = "cuDeviceGetPCIBusId" (*mut c_char, c_int, c_int);
        pointer_attribute = "cuPointerGetAttribute" (*mut c_void, c_int, u64);
        pointer_set = "cuPointerSetAttribute" (*const c_void, c_int, u64);
        address_range = "cuMemGetAddressRange_v2" (*mut u64, *mut usize, u64);
        primary_retain = "cuDevicePrimaryCtxRetain" (*mut *mut c_void, c_int);
        primary_release = "cuDevicePrimaryCtxRelease_v2" (c_int);
        context_push = "cuCtxPushCurrent_v2" (*mut c_void);
        context_pop = "cuCtxPopCurrent_v2" (*mut *mut c_void);
        context_flags = "cuCtxGetFlags" (*mut c_uint);
        copy_in = "cuMemcpyHtoD_v2" (u64, *const c_void, usize);
        copy_out = "cuMemcpyDtoH_v2" (*mut c_void, u64, usize);
        stream_synchronize = "cuStreamSynchronize" (*mut c_void);
        allocate = "cuMemAlloc_v2" (*mut u64, usize);
        free = "cuMemFree_v2" (u64);
        copy_within = "cuMemcpyDtoD_v2" (u64, u64, usize);
        register = "cuMemHostRegister_v2" (*mut c_void, usize, c_uint);
        unregister = "cuMemHostUnregister" (*mut c_void);
        registered = "cuMemHostGetDevicePointer_v2" (*mut u64, *mut c_void, c_uint);
    }
    {
        // 10.0
        import = "cuImportExternalMemory" (*mut *mut c_void, *const Description);
        import_map = "cuExternalMemoryGetMappedBuffer" (*mut u64, *mut c_void, *const Part);
        import_destroy = "cuDestroyExternalMemory" (*mut c_void);
        // 11.3
        flush = "cuFlushGPUDirectRDMAWrites" (c_int, c_int);
        // 11.7
        handle_for_range = "cuMemGetHandleForAddressRange" (*mut c_void, u64, usize, c_int, c_ulonglong);
        // 12.1
        context_set_flags = "cuCtxSetFlags" (c_uint);
    }
}

pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const NOT_SUPPORTED: i32 = 801;
/// A number of this crate: the driver's library lacks the function.
pub(crate) const NO_SUCH_FUNCTION: i32 = -1;

/// `CU_MEM_RANGE_FLAG_DMA_BUF_MAPPING_TYPE_PCIE`
pub(crate) const MAPPING_PCIE: u64 = 1;

const DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: c_int = 124;
const POINTER_ATTRIBUTE_CONTEXT: c_int = 1;
const POINTER_ATTRIBUTE_MEMORY_TYPE: c_int = 2;
const POINTER_ATTRIBUTE_SYNC_MEMOPS: c_int = 6;
const POINTER_ATTRIBUTE_IS_MANAGED: c_int = 8;
const POINTER_ATTRIBUTE_DEVICE_ORDINAL: c_int = 9;
const MEMORYTYPE_DEVICE: c_uint = 2;
const RANGE_HANDLE_DMA_BUF_FD: c_int = 1;
const CONTEXT_SYNC_MEMOPS: c_uint = 0x80;
const FLUSH_TARGET_CURRENT_CONTEXT: c_int = 0;
const FLUSH_TO_OWNER: c_int = 100;

/// The initialised driver.
#[derive(Clone, Copy)]
pub(crate) struct Cuda(&'static Functions);

/// The memory at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// The device's number, which `cuDeviceGet` takes.
    pub(crate) ordinal: i32,
    /// True for memory of a GPU that is neither host memory nor managed memory.
    pub(crate) device: bool,
    pub(crate) managed: bool,
    /// The context of the allocation, as a number; 0 for memory without a context.
    context: usize,
}

impl Cuda {
    /// Opens the library and initialises the driver. Further calls do nothing.
    ///
    /// # Errors
    /// The error of the loader or of the driver.
    pub(crate) fn open() -> Result<Cuda, String> {
        static FUNCTIONS: OnceLock<Functions> = OnceLock::new();
        let cuda = Cuda(super::kept(&FUNCTIONS, Functions::load)?);
        // SAFETY: the argument is a number.
        let answer = unsafe { (cuda.0.init)(0) };
        cuda.check("cuInit", answer)
            .map_err(|failed| format!("{NAME}: cuInit: {failed}"))?;
        Ok(cuda)
    }

    fn check(self, call: &'static str, code: c_int) -> Result<(), Failed> {
        if code == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the function sets the pointer to a static string, or to null.
        unsafe { (self.0.error_name)(code, &mut name) };
        // SAFETY: the pointer is null or a static string.
        let name = unsafe { super::text(name) };
        Err(Failed { call, code, name })
    }

    fn missing(call: &'static str) -> Failed {
        let name = "not in this driver's library".to_owned();
        let code = NO_SUCH_FUNCTION;
        Failed { call, code, name }
    }

    pub(crate) fn devices(self) -> Result<i32, Failed> {
        let mut count = 0;
        // SAFETY: the function stores a number.
        let answer = unsafe { (self.0.device_count)(&mut count) };
        self.check("cuDeviceGetCount", answer)?;
        Ok(count)
    }

    fn device(self, ordinal: i32) -> Result<c_int, Failed> {
        let mut device = 0;
        // SAFETY: the function stores a number.
        let answer = unsafe { (self.0.device_get)(&mut device, ordinal) };
        self.check("cuDeviceGet", answer)?;
        Ok(device)
    }

    /// `CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED`
    pub(crate) fn exports_dmabufs(self, ordinal: i32) -> Result<bool, Failed> {
        let device = self.device(ordinal)?;
        let attribute = DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED;
        let mut value = 0;
        // SAFETY: the function stores a number.
        let answer = unsafe { (self.0.device_attribute)(&mut value, attribute, device) };
        self.check("cuDeviceGetAttribute", answer)?;
        Ok(value != 0)
    }

    /// The device's PCI address, as the driver writes it.
    pub(crate) fn bus_id(self, ordinal: i32) -> Result<String, Failed> {
        let device = self.device(ordinal)?;
        let mut text = [0u8; 32];
        let room = text.len() as c_int;
        // SAFETY: the buffer is valid for `room` bytes.
        let answer = unsafe { (self.0.device_bus_id)(text.as_mut_ptr().cast(), room, device) };
        self.check("cuDeviceGetPCIBusId", answer)?;
        let written = text.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(String::from_utf8_lossy(written).into_owned())
    }

    fn attribute<T: bytemuck::Pod>(self, attribute: c_int, pointer: u64) -> Result<T, Failed> {
        let mut value = T::zeroed();
        // SAFETY: the callers in this file name the attribute's type.
        let answer =
            unsafe { (self.0.pointer_attribute)((&raw mut value).cast(), attribute, pointer) };
        self.check("cuPointerGetAttribute", answer)?;
        Ok(value)
    }

    /// The memory at an address; `None` if CUDA has none there.
    pub(crate) fn memory(self, pointer: u64) -> Result<Option<Memory>, Failed> {
        let kind = match self.attribute::<c_uint>(POINTER_ATTRIBUTE_MEMORY_TYPE, pointer) {
            Ok(kind) => kind,
            Err(Failed { code, .. }) if code == INVALID_VALUE => return Ok(None),
            Err(failed) => return Err(failed),
        };
        // Some drivers write one byte, others four.
        let managed = self.attribute::<c_uint>(POINTER_ATTRIBUTE_IS_MANAGED, pointer)? != 0;
        Ok(Some(Memory {
            ordinal: self.attribute(POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer)?,
            device: kind == MEMORYTYPE_DEVICE && !managed,
            managed,
            // Memory of the virtual memory management and memory of pools belong to no context.
            context: self
                .attribute(POINTER_ATTRIBUTE_CONTEXT, pointer)
                .unwrap_or(0),
        }))
    }

    /// The memory's context, or the device's primary context for memory without one.
    pub(crate) fn context_of(self, memory: Memory) -> Result<Context, Failed> {
        match memory.context {
            0 => self.primary(memory.ordinal),
            raw => Ok(Context {
                cuda: self,
                raw,
                primary_of: None,
            }),
        }
    }

    /// The primary context of a device.
    pub(crate) fn primary(self, ordinal: i32) -> Result<Context, Failed> {
        let device = self.device(ordinal)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the function stores a pointer.
        let answer = unsafe { (self.0.primary_retain)(&mut raw, device) };
        self.check("cuDevicePrimaryCtxRetain", answer)?;
        Ok(Context {
            cuda: self,
            raw: raw.addr(),
            primary_of: Some(device),
        })
    }
}

/// A context. Any thread may use it.
///
/// # Invariants
/// `raw` is a context of the driver: retained by this value, or the context of memory that
/// stays allocated (`Allocated`).
pub(crate) struct Context {
    cuda: Cuda,
    raw: usize,
    primary_of: Option<c_int>,
}

impl Drop for Context {
    fn drop(&mut self) {
        if let Some(device) = self.primary_of {
            // SAFETY: `primary` has retained the context once for this value.
            unsafe { (self.cuda.0.primary_release)(device) };
        }
    }
}

impl Context {
    /// Runs `what` while the context is this thread's current one.
    fn within<T>(&self, what: impl FnOnce(&Functions) -> Result<T, Failed>) -> Result<T, Failed> {
        let functions = self.cuda.0;
        let raw = std::ptr::with_exposed_provenance_mut(self.raw);
        // SAFETY: `raw` is a context (invariant).
        let answer = unsafe { (functions.context_push)(raw) };
        self.cuda.check("cuCtxPushCurrent", answer)?;
        let done = what(functions);
        let mut popped = std::ptr::null_mut();
        // SAFETY: the function stores a pointer; the context on top is the one pushed above.
        unsafe { (functions.context_pop)(&mut popped) };
        done
    }

    /// Makes synchronous copies of this memory complete before they return, for devices that
    /// read the memory by DMA (`CU_POINTER_ATTRIBUTE_SYNC_MEMOPS`). Memory without this
    /// attribute gets the setting from the context, since CUDA 12.1.
    pub(crate) fn order_copies(&self, pointer: u64) -> Result<(), Failed> {
        let one: c_uint = 1;
        let attribute = POINTER_ATTRIBUTE_SYNC_MEMOPS;
        self.within(|functions| {
            // SAFETY: the attribute is a 32-bit number, which the function reads.
            let answer =
                unsafe { (functions.pointer_set)((&raw const one).cast(), attribute, pointer) };
            let refused = match self
                .cuda
                .check("cuPointerSetAttribute(SYNC_MEMOPS)", answer)
            {
                Ok(()) => return Ok(()),
                Err(refused) => refused,
            };
            let set = functions.context_set_flags.ok_or(refused)?;
            let mut flags = 0;
            // SAFETY: the function stores a number.
            let answer = unsafe { (functions.context_flags)(&mut flags) };
            self.cuda.check("cuCtxGetFlags", answer)?;
            // Setting the flags waits for the context's lock, which a kernel launch may hold.
            if flags & CONTEXT_SYNC_MEMOPS != 0 {
                return Ok(());
            }
            // SAFETY: the argument is a number.
            let answer = unsafe { set(flags | CONTEXT_SYNC_MEMOPS) };
            self.cuda.check("cuCtxSetFlags(SYNC_MEMOPS)", answer)
        })
    }

    /// `cuMemGetHandleForAddressRange`: exports whole pages as a dma-buf.
    pub(crate) fn export(&self, pages: Allocated, flags: u64) -> Result<OwnedFd, Failed> {
        const CALL: &str = "cuMemGetHandleForAddressRange";
        self.within(|functions| {
            let export = functions.handle_for_range.ok_or(Cuda::missing(CALL))?;
            let mut fd: c_int = -1;
            let room = (&raw mut fd).cast();
            let (at, length) = (pages.pointer, pages.length as usize);
            // SAFETY: for this type of handle the function stores an int.
            let answer = unsafe { export(room, at, length, RANGE_HANDLE_DMA_BUF_FD, flags) };
            self.cuda.check(CALL, answer)?;
            // SAFETY: the driver opened the descriptor for the caller.
            let fd = unsafe { super::descriptor(fd) };
            fd.ok_or(Failed {
                call: CALL,
                code: 0,
                name: "success, and no descriptor".to_owned(),
            })
        })
    }

    /// `cuMemGetAddressRange`: the start and the length of the allocation, or mapped segment,
    /// at this address.
    pub(crate) fn segment(&self, pointer: u64) -> Result<(u64, u64), Failed> {
        self.within(|functions| {
            let (mut base, mut size) = (0, 0);
            // SAFETY: the function stores two numbers.
            let answer = unsafe { (functions.address_range)(&mut base, &mut size, pointer) };
            self.cuda.check("cuMemGetAddressRange", answer)?;
            Ok((base, size as u64))
        })
    }

    /// Copies bytes into memory. The copy is complete on return.
    ///
    /// # Panics
    /// If the range exceeds the memory.
    pub(crate) fn upload(&self, to: Allocated, offset: u64, from: &[u8]) -> Result<(), Failed> {
        let at = to.address(offset, from.len());
        self.within(|functions| {
            // SAFETY: the slice is valid for the read, and the memory stays (`Allocated`).
            let answer = unsafe { (functions.copy_in)(at, from.as_ptr().cast(), from.len()) };
            self.cuda.check("cuMemcpyHtoD", answer)?;
            // A copy from pageable memory may return before the bytes have left the driver's
            // own buffer.
            // SAFETY: null is the default stream.
            let answer = unsafe { (functions.stream_synchronize)(std::ptr::null_mut()) };
            self.cuda.check("cuStreamSynchronize", answer)
        })
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
        self.within(|functions| {
            // SAFETY: the slice is valid for the write, and the memory stays (`Allocated`).
            let answer = unsafe { (functions.copy_out)(into.as_mut_ptr().cast(), at, into.len()) };
            self.cuda.check("cuMemcpyDtoH", answer)
        })
    }

    /// Waits until the GPU itself sees the writes of other devices to its memory. A driver
    /// that lacks or does not support the call has nothing to wait for.
    pub(crate) fn flush(&self) -> Result<(), Failed> {
        self.within(|functions| {
            let Some(flush) = functions.flush else {
                return Ok(());
            };
            // SAFETY: the arguments are numbers.
            let answer = unsafe { flush(FLUSH_TARGET_CURRENT_CONTEXT, FLUSH_TO_OWNER) };
            match answer {
                NOT_SUPPORTED => Ok(()),
                answer => self.cuda.check("cuFlushGPUDirectRDMAWrites", answer),
            }
        })
    }

    /// Allocates memory.
    pub(crate) fn allocate(self, length: u64) -> Result<Block, Failed> {
        let pointer = self.within(|functions| {
            let mut pointer = 0;
            // SAFETY: the function stores a number.
            let answer = unsafe { (functions.allocate)(&mut pointer, length as usize) };
            self.cuda.check("cuMemAlloc", answer)?;
            Ok(pointer)
        })?;
        Ok(Block {
            // SAFETY: the owner of the block drops the block last.
            memory: unsafe { Allocated::at(pointer, length) },
            context: self,
        })
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
        let pointer = self.memory.pointer;
        let freed = self.context.within(|functions| {
            // SAFETY: the driver allocated the address, and no user of the block is left.
            let answer = unsafe { (functions.free)(pointer) };
            self.context.cuda.check("cuMemFree", answer)
        });
        // The call also returns errors of the program's own GPU work, which other calls report.
        let _ = freed;
    }
}
