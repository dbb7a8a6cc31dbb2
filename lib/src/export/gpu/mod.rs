//! Memory of a GPU program: a pointer of `cuMemAlloc`, `cudaMalloc`, or a PyTorch tensor.
//!
//! The program passes an address, and [`buffer_of`] asks each runtime that can be opened
//! whether it owns the address ([`Runtime::ALL`]). The owner exports the memory as a dma-buf,
//! and [`buffer_of`] returns a range of a buffer with the exact offset. The rules of an export
//! differ by runtime, driver and machine. [`Receipt`] names the mapping.
//!
//! - The runtimes are opened on first use and never linked. A machine without one lacks only
//!   that one.
//! - CUDA exports whole pages of the machine. The range has the remainder as its offset. The
//!   PCIe mapping comes first, and the driver's choice is kept as a second descriptor if both
//!   exist.
//! - ROCm and Level Zero export whole allocations. The range has its offset in the allocation.
//!   Level Zero exports only memory that was allocated for export.
//! - Few of these buffers can be mapped. The runtime's own copies are the buffer's
//!   [`Stage`](crate::buffer::Stage), so staged transfers and proofs work without a mapping.
//! - A driver may report success and put the bytes into system memory. A transfer's plan names
//!   the proved path. [`Exported::ask`] reports the addresses that an importer gets.
//!
//! No machine with a GPU has run this module yet. The tests use *stand-ins*: libraries with the
//! names of the runtimes that behave as the runtimes are documented and reported to.
//! `docs/gpu.md` lists the test of each rule.
//!
//! ```no_run
//! use peerbuf::export::gpu;
//! use peerbuf::import::file::FileImporter;
//!
//! # fn example(tensor: u64, bytes: u64) -> Result<(), Box<dyn std::error::Error>> {
//! // SAFETY: the tensor outlives the buffer.
//! let exported = unsafe { gpu::buffer_of(tensor, bytes) }?;
//! println!("{}", exported.receipt);
//! let file = FileImporter::open("weights")?;
//! let receipt = file.attach(&exported.range)?.read(0)?;
//! println!("{}", receipt.plan);
//! # Ok(())
//! # }
//! ```

mod cuda;
mod found;
mod hsa;
mod level_zero;

use crate::error::ExportError;
use crate::sys::gpu::Allocated;

pub(crate) use hsa::address as bdf_id;
pub(crate) use level_zero::address as from_parts;

pub use found::{Descriptors, Exported, Mapping, Place, Receipt, Runtime, Seen};

type Find = fn(Allocated) -> Result<Result<Descriptors, ExportError>, String>;

/// Exports the memory at an address of a GPU program, as a buffer.
///
/// `pointer` is an address of the runtime, anywhere in an allocation. `length` is in bytes.
///
/// ```no_run
/// # fn example(tensor: u64) -> Result<(), Box<dyn std::error::Error>> {
/// // SAFETY: the tensor outlives the buffer.
/// let exported = unsafe { peerbuf::export::gpu::buffer_of(tensor + 1000, 24) }?;
/// assert_eq!(exported.range.len(), 24);
/// exported.range.write_bytes(&[1; 24])?; // cuMemcpyHtoD
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`ExportError::NotGpuMemory`], which names each library that was tried;
/// [`ExportError::Runtime`] with the runtime's answer, its usual cause and the remedy;
/// [`ExportError::Unsuitable`] for a length of 0; [`ExportError::Buffer`] if the runtime's
/// descriptor is not a dma-buf, or smaller than the range.
///
/// # Safety
/// If a runtime owns the memory, the allocation must stay until the buffer and everything made
/// from it are dropped, because the runtime's copies do not check addresses. Unordered work of
/// the program and of devices on the memory is safe, but makes the bytes undefined.
#[doc(alias = "cuMemGetHandleForAddressRange")]
// This function does nothing unsafe itself: it passes on the caller's guarantee.
#[allow(unsafe_code)]
pub unsafe fn buffer_of(pointer: u64, length: u64) -> Result<Exported, ExportError> {
    // SAFETY: the caller guarantees the lifetime of the allocation.
    unsafe { descriptors_of(pointer, length) }?.into_buffer()
}

/// Exports the memory at an address of a GPU program, as bare descriptors for another library.
///
/// # Errors
/// As [`buffer_of`], without a check that the descriptors are dma-bufs.
///
/// # Safety
/// As [`buffer_of`], for the values that [`Descriptors::stage`] returns. The dma-bufs
/// themselves keep their memory alive.
#[allow(unsafe_code)]
pub unsafe fn descriptors_of(pointer: u64, length: u64) -> Result<Descriptors, ExportError> {
    if length == 0 || pointer.checked_add(length).is_none() {
        return Err(ExportError::Unsuitable {
            what: "the length",
            value: length,
            must: format!("at least 1, and the range from {pointer:#x} on end at an address"),
        });
    }
    // SAFETY: the caller guarantees the lifetime of the allocation.
    let memory = unsafe { Allocated::at(pointer, length) };
    let mut asked = Vec::new();
    for runtime in Runtime::ALL {
        let find: Find = match runtime {
            Runtime::Cuda => cuda::find,
            Runtime::Hsa => hsa::find,
            Runtime::LevelZero => level_zero::find,
        };
        match find(memory) {
            Ok(exported) => return exported,
            Err(why) => asked.push(format!("{runtime} ({}): {why}", runtime.library())),
        }
    }
    Err(ExportError::NotGpuMemory { pointer, asked })
}

/// Allocates `length` bytes on a GPU and exports them, for programs without GPU memory.
/// `device` is the runtime's index, from 0. The range begins at the start of the buffer.
/// Dropping the last handle of the buffer frees the memory.
///
/// # Errors
/// As [`buffer_of`]; [`ExportError::Runtime`] for a runtime that cannot be opened, a device
/// that does not exist, or too little memory; [`ExportError::Unsuitable`] for ROCm, whose
/// programs choose a memory pool themselves.
pub fn allocate(runtime: Runtime, device: u32, length: u64) -> Result<Exported, ExportError> {
    let allocated = match runtime {
        Runtime::Cuda => cuda::allocate(device, length),
        Runtime::LevelZero => level_zero::allocate(device, length),
        Runtime::Hsa => Err(ExportError::Unsuitable {
            what: "the length of ROCm memory to be allocated here",
            value: length,
            must: "allocated by the program (hipMalloc), and its address be given to buffer_of"
                .into(),
        }),
    };
    allocated?.into_buffer()
}

/// Each runtime with the number of its devices, or the reason why it cannot be used.
///
/// The call initialises the runtimes that can be opened. Some take a second.
pub fn probe() -> Vec<(Runtime, Result<u32, String>)> {
    let ask = |runtime| match runtime {
        Runtime::Cuda => cuda::devices(),
        Runtime::Hsa => hsa::devices(),
        Runtime::LevelZero => level_zero::devices(),
    };
    Runtime::ALL.map(|runtime| (runtime, ask(runtime))).to_vec()
}
