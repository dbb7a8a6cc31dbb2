//! CUDA: exports through the driver API (`cuMemGetHandleForAddressRange` in `cuda.h`).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::found::{Copies, Descriptors, Mapping, Receipt, Runtime, refused, to_pages};
use crate::error::ExportError;
use crate::sys::gpu::cuda::{
    Block, Context, Cuda, INVALID_VALUE, MAPPING_PCIE, Memory, NO_SUCH_FUNCTION, NOT_SUPPORTED,
};
use crate::sys::gpu::{Allocated, Failed};

/// Whole pages of memory.
struct Pages {
    context: Context,
    pages: Allocated,
    /// The pages' allocation, if this crate made it.
    _block: Option<Block>,
}

impl Copies for Pages {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed> {
        self.context.upload(self.pages, offset, from)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        self.context.download(self.pages, offset, into)
    }

    fn flush(&self) -> Result<(), Failed> {
        self.context.flush()
    }
}

/// Number of GPUs.
pub(super) fn devices() -> Result<u32, String> {
    let count = Cuda::open()?.devices();
    count
        .map(i32::unsigned_abs)
        .map_err(|failed| format!("{}: {failed}", failed.call))
}

/// Exports the memory at an address.
///
/// # Errors
/// The outer error: why the memory is not CUDA's. The inner error: why CUDA's memory could not
/// be exported.
pub(super) fn find(memory: Allocated) -> Result<Result<Descriptors, ExportError>, String> {
    let cuda = Cuda::open()?;
    match cuda.memory(memory.pointer) {
        Ok(None) => Err("no memory of its".to_owned()),
        Ok(Some(found)) => Ok(export(cuda, memory, found, None)),
        Err(failed) => Err(format!("{}: {failed}", failed.call)),
    }
}

/// Allocates memory on a GPU and exports it.
pub(super) fn allocate(device: u32, length: u64) -> Result<Descriptors, ExportError> {
    let object = format!("{length} bytes on GPU {device}");
    let failed = |failed: Failed| refused(&failed, object.clone(), String::new());
    let missing = |why| ExportError::Runtime {
        call: "cuInit",
        object: format!("GPU {device}"),
        answer: why,
        hint: String::new(),
    };
    let cuda = Cuda::open().map_err(missing)?;
    let ordinal = i32::try_from(device).unwrap_or(i32::MAX);
    let block = |length| {
        let context = cuda.primary(ordinal)?;
        context.allocate(length)
    };
    // The driver does not guarantee page alignment, though large allocations have it.
    let page = rustix::param::page_size() as u64;
    let mut made = block(length).map_err(failed)?;
    if !made.memory().pointer.is_multiple_of(page) {
        drop(made);
        made = block(length.saturating_add(page)).map_err(failed)?;
    }
    let all = made.memory();
    let memory = all.part(all.pointer.next_multiple_of(page) - all.pointer, length);
    let found = cuda.memory(memory.pointer).map_err(failed)?;
    let found = found.ok_or_else(|| missing("no memory at what it allocated".to_owned()))?;
    export(cuda, memory, found, Some(made))
}

fn export(
    cuda: Cuda,
    memory: Allocated,
    found: Memory,
    block: Option<Block>,
) -> Result<Descriptors, ExportError> {
    let object = format!("{} bytes at {:#x}", memory.length, memory.pointer);
    let plainly = |failed: Failed| refused(&failed, object.clone(), String::new());
    if !found.device {
        let (what, instead) = match found.managed {
            true => (
                "managed memory",
                "it moves between GPU and host; copy it to memory of cuMemAlloc",
            ),
            false => (
                "memory of the host",
                "take the memfd or the udmabuf behind it, if it has one (cuMemHostRegister)",
            ),
        };
        return Err(ExportError::Runtime {
            call: "cuPointerGetAttribute",
            object,
            answer: what.to_owned(),
            hint: format!(": the driver exports memory of its GPU only; {instead}"),
        });
    }
    let bus_id = cuda.bus_id(found.ordinal).map_err(plainly)?;
    // The devices of one machine may differ.
    if !cuda.exports_dmabufs(found.ordinal).map_err(plainly)? {
        return Err(ExportError::Runtime {
            call: "cuDeviceGetAttribute(DMA_BUF_SUPPORTED)",
            object: format!("GPU {} ({bus_id})", found.ordinal),
            answer: "0".to_owned(),
            hint: ": it exports no dma-bufs; that takes NVIDIA's open kernel modules, CUDA 11.7 or later, and a GPU of \
                   the Turing generation or later"
                .to_owned(),
        });
    }
    let context = cuda.context_of(found).map_err(plainly)?;
    let mut notes = Vec::new();
    let ordered = match context.order_copies(memory.pointer) {
        Ok(()) => true,
        Err(failed) => {
            notes.push(format!("{}: {failed}", failed.call));
            false
        }
    };

    let page = rustix::param::page_size() as u64;
    let (before, after) =
        to_pages(memory.pointer, memory.length, page).ok_or(ExportError::Unsuitable {
            what: "the end of the range, from address 0,",
            value: u64::MAX,
            must: "an address".into(),
        })?;
    let pages = memory.widened(before, after);
    let got = by_best_mapping(&context, pages, &mut notes);
    let (mapping, fd, other) = got.map_err(|failed| {
        let hint = why(&context, memory, &failed, &notes);
        refused(&failed, object, hint)
    })?;
    let receipt = Receipt {
        runtime: Runtime::Cuda,
        device: bus_id.parse().ok(),
        mapping,
        both: other.is_some(),
        added_before: before,
        added_after: after,
        ordered,
        notes,
        seen: Vec::new(),
    };
    let copies = Pages {
        context,
        pages,
        _block: block,
    };
    Descriptors::checked(memory, fd, other, receipt, Arc::new(copies))
}

type Got = (Mapping, OwnedFd, Option<OwnedFd>);

/// A descriptor with the PCIe mapping and one with the driver's choice, as far as both exist.
/// Drivers before 570.86.15 refuse the flag with INVALID_VALUE. A machine with only one mapping
/// returns NOT_SUPPORTED.
fn by_best_mapping(
    context: &Context,
    pages: Allocated,
    notes: &mut Vec<String>,
) -> Result<Got, Failed> {
    let mut note = |which: Mapping, failed: &Failed| {
        notes.push(format!("{}, mapping {which}: {failed}", failed.call));
    };
    match context.export(pages, MAPPING_PCIE) {
        Ok(first) => {
            let other = context.export(pages, 0);
            let other = other.map_err(|failed| note(Mapping::Driver, &failed)).ok();
            Ok((Mapping::Pcie, first, other))
        }
        Err(failed) if [INVALID_VALUE, NOT_SUPPORTED].contains(&failed.code) => {
            note(Mapping::Pcie, &failed);
            let only = context.export(pages, 0)?;
            Ok((Mapping::Driver, only, None))
        }
        Err(failed) => Err(failed),
    }
}

/// Likely causes of a refused export: the segments of the range, and the usual meaning of the code.
fn why(context: &Context, memory: Allocated, failed: &Failed, notes: &[String]) -> String {
    const OUT_OF_MEMORY: i32 = 2;
    const OPERATING_SYSTEM: i32 = 304;
    let mut hint = String::new();
    for note in notes {
        hint += &format!(" ({note})");
    }
    let (segments, missing) = segments(context, memory);
    let list: Vec<String> = segments
        .iter()
        .map(|(base, size)| format!("{base:#x} with {size} bytes"))
        .collect();
    let list = list.join(", ");
    if let Some(missing) = missing {
        hint += &format!(": nothing is mapped at {missing:#x}; the range has {list}");
    } else if segments.len() > 1 {
        hint += &format!(
            ": the range has {} segments: {list}; they must be on one GPU and made with the same properties \
             (cuMemCreate), or be exported one by one",
            segments.len()
        );
    }
    hint += match failed.code {
        NOT_SUPPORTED => {
            ": memory of cuMemCreate needs gpuDirectRDMACapable in its properties when it is made"
        }
        OUT_OF_MEMORY => {
            ": a GPU's BAR1 has room for so many exports (2 MiB each at least); the kernel's log has \
             NV_ERR_NO_MEMORY then"
        }
        NO_SUCH_FUNCTION => ": it came with CUDA 11.7, so that a newer driver is needed",
        OPERATING_SYSTEM => ": each export takes a descriptor or two; see RLIMIT_NOFILE",
        _ => "",
    };
    hint
}

/// The segments that a range crosses, and the first address in the range without a segment. The
/// memory of one cuMemAlloc is one segment.
fn segments(context: &Context, memory: Allocated) -> (Vec<(u64, u64)>, Option<u64>) {
    /// A longer list does not help a reader.
    const MOST: usize = 16;
    let mut segments = Vec::new();
    let (mut at, end) = (memory.pointer, memory.pointer + memory.length);
    while at < end && segments.len() < MOST {
        match context.segment(at) {
            Ok((base, size)) if base <= at && base.saturating_add(size) > at => {
                segments.push((base, size));
                at = base.saturating_add(size);
            }
            _ => return (segments, Some(at)),
        }
    }
    (segments, None)
}
