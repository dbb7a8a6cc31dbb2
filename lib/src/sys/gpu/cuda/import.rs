//! Memory that others made, as a CUDA device reaches it.
//!
//! <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__EXTRES__INTEROP.html>

use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Mutex, PoisonError};

use super::super::super::given::Given;
use super::super::{Allocated, Failed, Imports, Reached, extent};
use super::{
    Block, Context, Cuda, Description, Functions, INVALID_VALUE, NO_SUCH_FUNCTION, NOT_SUPPORTED,
    Part,
};
use crate::buffer::Mapping;

/// `CU_EXTERNAL_MEMORY_HANDLE_TYPE_DMABUF_FD`, of CUDA 13. NVIDIA documents it for Tegra (Thor and later) only.
const DMABUF_FD: c_int = 9;
/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`
const REGISTER: c_uint = 1 | 2;
/// `CU_MEMHOSTREGISTER_IOMEMORY`
const REGISTER_IO: c_uint = 4;
const NOT_PERMITTED: i32 = 800;

/// How many bytes the device copies at a time.
const ROOM: usize = 4 << 20;

/// A device, as an importer.
pub(crate) struct Gpu {
    cuda: Cuda,
    ordinal: i32,
}

impl Gpu {
    /// # Errors
    /// The answer of the loader or of the driver, or the number of devices.
    pub(crate) fn open(number: u32) -> Result<Gpu, String> {
        let cuda = Cuda::open()?;
        let count = cuda
            .devices()
            .map_err(|failed| format!("{}: {failed}", failed.call))?;
        match i32::try_from(number) {
            Ok(ordinal) if ordinal < count => Ok(Gpu { cuda, ordinal }),
            _ => Err(format!("there are {count} devices")),
        }
    }

    /// As the driver writes it.
    pub(crate) fn bus_id(&self) -> Result<String, Failed> {
        self.cuda.bus_id(self.ordinal)
    }

    fn reached(&self, memory: Allocated, what: What) -> Result<Box<dyn Reached>, Failed> {
        Ok(Box::new(Memory {
            memory,
            what,
            own: Mutex::new(None),
            gpu: Gpu {
                cuda: self.cuda,
                ordinal: self.ordinal,
            },
        }))
    }
}

impl Imports for Gpu {
    fn dmabuf(&self, dmabuf: Given, size: u64) -> Result<Box<dyn Reached>, Failed> {
        const CALL: &str = "cuImportExternalMemory(DMABUF_FD)";
        let context = self.cuda.primary(self.ordinal)?;
        let raw = context.within(|functions| {
            let import = functions.import.ok_or(Cuda::missing(CALL))?;
            let description = Description {
                kind: DMABUF_FD,
                padding: 0,
                fd: dmabuf.number(),
                rest: [0; 3],
                size,
                flags: 0,
                reserved: [0; 16],
                end: 0,
            };
            let mut raw = std::ptr::null_mut();
            // SAFETY: the description is valid, and the function stores a handle.
            let answer = unsafe { import(&mut raw, &description) };
            self.cuda.check(CALL, answer)?;
            Ok(raw.expose_provenance())
        })?;
        let external = External {
            raw,
            context,
            _given: dmabuf,
        };
        let pointer = external.map(size)?;
        let mapped = Mapped { pointer, external };
        // SAFETY: the mapping stays until `mapped` is dropped, which is held beside it.
        let memory = unsafe { Allocated::at(pointer, size) };
        self.reached(memory, What::Dmabuf(mapped))
    }

    fn mapped(&self, mapping: Mapping, is_io: bool) -> Result<Box<dyn Reached>, Failed> {
        let (at, length) = extent(&mapping)?;
        let (call, flags) = match is_io {
            true => ("cuMemHostRegister(IOMEMORY)", REGISTER | REGISTER_IO),
            false => ("cuMemHostRegister", REGISTER),
        };
        let context = self.cuda.primary(self.ordinal)?;
        context.within(|functions| {
            // SAFETY: the process has these bytes mapped for as long as they are registered (`Registered`).
            let answer = unsafe { (functions.register)(at, length, flags) };
            self.cuda.check(call, answer)
        })?;
        let registered = Registered { context, mapping };
        let pointer = registered.context.within(|functions| {
            let mut pointer = 0;
            // SAFETY: the address is registered, and the function stores a number.
            let answer = unsafe { (functions.registered)(&mut pointer, at, 0) };
            self.cuda.check("cuMemHostGetDevicePointer", answer)?;
            Ok(pointer)
        })?;
        // SAFETY: the device reaches the bytes until `Registered` is dropped, which is held beside it.
        let memory = unsafe { Allocated::at(pointer, length as u64) };
        self.reached(memory, What::Registered(registered))
    }

    fn is_final(&self, failed: &Failed) -> bool {
        [
            INVALID_VALUE,
            NOT_SUPPORTED,
            NOT_PERMITTED,
            NO_SUCH_FUNCTION,
        ]
        .contains(&failed.code)
    }
}

/// An external memory.
///
/// # Invariants
/// `raw` is a handle of the driver's, of this context.
struct External {
    raw: usize,
    context: Context,
    /// Closed last: a driver that owns the descriptor closes it with the handle.
    _given: Given,
}

impl External {
    fn map(&self, size: u64) -> Result<u64, Failed> {
        const CALL: &str = "cuExternalMemoryGetMappedBuffer";
        self.context.within(|functions| {
            let map = functions.import_map.ok_or(Cuda::missing(CALL))?;
            let part = Part {
                offset: 0,
                size,
                flags: 0,
                reserved: [0; 16],
                end: 0,
            };
            let raw = std::ptr::with_exposed_provenance_mut(self.raw);
            let mut pointer = 0;
            // SAFETY: `raw` is a handle (invariant), the description valid, and the function stores a number.
            let answer = unsafe { map(&mut pointer, raw, &part) };
            self.context.cuda.check(CALL, answer)?;
            Ok(pointer)
        })
    }
}

impl Drop for External {
    fn drop(&mut self) {
        let destroyed = self.context.within(|functions| {
            if let Some(destroy) = functions.import_destroy {
                // SAFETY: `raw` is a handle (invariant), and nothing of it is mapped any more.
                unsafe { destroy(std::ptr::with_exposed_provenance_mut(self.raw)) };
            }
            Ok(())
        });
        // The context cannot be pushed: the driver has ended, and the memory with it.
        let _ = destroyed;
    }
}

/// A whole external memory, mapped.
struct Mapped {
    pointer: u64,
    external: External,
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let freed = self.external.context.within(|functions| {
            // SAFETY: the driver mapped the address for this value, and its users are gone.
            unsafe { (functions.free)(self.pointer) };
            Ok(())
        });
        // As above.
        let _ = freed;
    }
}

/// A mapping of this process that is registered.
struct Registered {
    context: Context,
    /// Unmapped after it was unregistered.
    mapping: Mapping,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let at: *mut c_void = self.mapping.as_ptr().cast();
        let unregistered = self.context.within(|functions| {
            // SAFETY: the address was registered for this value, and its users are gone.
            unsafe { (functions.unregister)(at) };
            Ok(())
        });
        // As above.
        let _ = unregistered;
    }
}

enum What {
    Dmabuf(Mapped),
    Registered(Registered),
}

/// Memory that the device reaches.
struct Memory {
    memory: Allocated,
    what: What,
    /// The device's own memory, which bytes go through: so the device reads and writes them, and not the processor.
    own: Mutex<Option<Block>>,
    gpu: Gpu,
}

impl Memory {
    fn context(&self) -> &Context {
        match &self.what {
            What::Dmabuf(mapped) => &mapped.external.context,
            What::Registered(registered) => &registered.context,
        }
    }

    fn with_own(
        &self,
        copy: impl FnOnce(&Context, Allocated) -> Result<(), Failed>,
    ) -> Result<(), Failed> {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match own.take() {
            Some(block) => block,
            None => {
                let context = self.gpu.cuda.primary(self.gpu.ordinal)?;
                context.allocate(self.memory.length.min(ROOM as u64))?
            }
        };
        copy(self.context(), own.insert(block).memory())
    }
}

impl Reached for Memory {
    fn memory(&self) -> Allocated {
        self.memory
    }

    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed> {
        let at = self.memory.address(offset, from.len());
        self.with_own(|context, own| {
            for (piece, at) in from.chunks(ROOM).zip((at..).step_by(ROOM)) {
                context.upload(own, 0, piece)?;
                // SAFETY: both have so many bytes.
                unsafe { context.copy_within(at, own.pointer, piece.len()) }?;
            }
            Ok(())
        })
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        let at = self.memory.address(offset, into.len());
        self.with_own(|context, own| {
            for (piece, at) in into.chunks_mut(ROOM).zip((at..).step_by(ROOM)) {
                // SAFETY: both have so many bytes.
                unsafe { context.copy_within(own.pointer, at, piece.len()) }?;
                context.download(own, 0, piece)?;
            }
            Ok(())
        })
    }
}

impl Context {
    /// Has the device copy.
    ///
    /// # Safety
    /// Both are addresses of the device's, with so many bytes.
    unsafe fn copy_within(&self, to: u64, from: u64, length: usize) -> Result<(), Failed> {
        self.within(|functions: &Functions| {
            // SAFETY: the caller's word.
            let answer = unsafe { (functions.copy_within)(to, from, length) };
            self.cuda.check("cuMemcpyDtoD", answer)?;
            // Such a copy may not have ended when the call returns.
            // SAFETY: null is the default stream.
            let answer = unsafe { (functions.stream_synchronize)(std::ptr::null_mut()) };
            self.cuda.check("cuStreamSynchronize", answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_structs_are_the_headers() {
        assert_eq!(size_of::<Description>(), 104);
        assert_eq!(offset_of!(Description, fd), 8);
        assert_eq!(offset_of!(Description, size), 24);
        assert_eq!(offset_of!(Description, flags), 32);
        assert_eq!((size_of::<Part>(), offset_of!(Part, flags)), (88, 16));
    }
}
