//! Memory that a GPU program has: a pointer of `cuMemAlloc`, `cudaMalloc`, a PyTorch tensor.
//!
//! The program says where its memory is, and peerbuf asks each runtime that can be opened whose it is
//! ([`Runtime::ALL`]), exports it as a dma-buf, and gives a buffer's range with the exact offset ([`buffer_of`]).
//! The rules of an export differ by runtime, driver and machine; [`Receipt`] says which mapping was got.
//!
//! - The runtimes are opened when they are needed, and never linked: a machine without one lacks that one only.
//! - CUDA's memory is exported by whole pages of the machine; the range keeps the remainder as its offset. The mapping
//!   by PCIe comes first, and a descriptor of the driver's own choice is kept beside it where there are both.
//! - ROCm and Level Zero export whole allocations; the range has its offset in that. Level Zero exports only what was
//!   allocated for it.
//! - Few of these buffers can be mapped. The runtime's own copies are the buffer's [`Stage`](crate::buffer::Stage), so
//!   that staged transfers and proofs work without a mapping.
//! - A driver may say yes and put the bytes into system memory. A transfer's plan says which path was proved;
//!   `import::probe` says which addresses an importer gets.
//!
//! No machine with a GPU has run this yet. The tests run it against *stand-ins*, libraries of the runtimes' names that
//! answer as the runtimes are documented and reported to. `docs/gpu.md` says which rule has which test.
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

pub use found::{Descriptors, Exported, Mapping, Receipt, Runtime};

type Find = fn(Allocated) -> Result<Result<Descriptors, ExportError>, String>;

/// Exports the memory that a GPU program has at an address, as a buffer.
///
/// `pointer` is an address as the runtime gives it, at any place within an allocation; `length` is in bytes.
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
/// [`ExportError::NotGpuMemory`], which names each library that was tried; [`ExportError::Runtime`] with what the
/// runtime said, what usually causes it, and what to do; [`ExportError::Unsuitable`] for a length of 0;
/// [`ExportError::Buffer`] where what the runtime gave is no dma-buf, or smaller than the range.
///
/// # Safety
/// If it is a runtime's memory, the allocation that has these bytes is freed after the buffer, and all that is made of
/// it, is dropped: copies by the runtime take addresses on trust. That the program's own work on the memory is in
/// order with the devices' is no question of safety, but of the bytes.
#[doc(alias = "cuMemGetHandleForAddressRange")]
// Nothing unsafe is done here: the caller's word is passed on.
#[allow(unsafe_code)]
pub unsafe fn buffer_of(pointer: u64, length: u64) -> Result<Exported, ExportError> {
    // SAFETY: the caller's word.
    unsafe { descriptors_of(pointer, length) }?.into_buffer()
}

/// Exports the memory that a GPU program has at an address, as bare descriptors, for a library that takes those.
///
/// # Errors
/// As [`buffer_of`], but whether they are dma-bufs is not looked at.
///
/// # Safety
/// As [`buffer_of`], for what [`Descriptors::stage`] makes. The dma-bufs themselves keep their memory.
#[allow(unsafe_code)]
pub unsafe fn descriptors_of(pointer: u64, length: u64) -> Result<Descriptors, ExportError> {
    if length == 0 || pointer.checked_add(length).is_none() {
        return Err(ExportError::Unsuitable {
            what: "the length",
            value: length,
            must: format!("at least 1, and the range from {pointer:#x} on end at an address"),
        });
    }
    // SAFETY: the caller's word.
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

/// Allocates `length` bytes on a GPU and exports them: for a program that has no GPU memory of its own. `device` is the
/// runtime's number, from 0 on. The range begins at the buffer's beginning, and the memory is freed when the last handle
/// of the buffer is dropped.
///
/// # Errors
/// As [`buffer_of`]; [`ExportError::Runtime`] for a runtime that cannot be opened, a device that is not there, and
/// memory that it does not have; [`ExportError::Unsuitable`] for ROCm, on which programs allocate from pools of their
/// choice.
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

/// Each runtime with the number of its devices, or why it cannot be used.
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
