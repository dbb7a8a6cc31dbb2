//! Level Zero: exports through `zeMemGetAllocProperties` (`ze_api.h`).

use std::sync::Arc;

use super::found::{Copies, Descriptors, Mapping, Receipt, Runtime, refused, size_of};
use crate::error::{BufferError, ExportError};
use crate::sys::gpu::level_zero::{self, Block, Copier, Kind, Memory};
use crate::sys::gpu::{Allocated, Failed};
use crate::topology::PciAddress;

/// A whole allocation.
struct Whole {
    copier: Copier,
    memory: Allocated,
    /// The allocation, if this crate made it.
    _block: Option<Block>,
}

impl Copies for Whole {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed> {
        self.copier.upload(self.memory, offset, from)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        self.copier.download(self.memory, offset, into)
    }

    fn flush(&self) -> Result<(), Failed> {
        // The API has no such call: a command list begins with an acquire of the devices'
        // writes.
        Ok(())
    }
}

/// Number of devices.
pub(super) fn devices() -> Result<u32, String> {
    level_zero::devices()
}

/// Exports the memory at an address.
///
/// # Errors
/// The outer error: why the memory is not Level Zero's. The inner error: why its memory could
/// not be exported.
pub(super) fn find(memory: Allocated) -> Result<Result<Descriptors, ExportError>, String> {
    let found = level_zero::memory(memory.pointer)?;
    let found = found.ok_or_else(|| "no memory of its".to_owned())?;
    Ok(export(memory, found, None))
}

/// Allocates memory on a device and exports it.
pub(super) fn allocate(device: u32, length: u64) -> Result<Descriptors, ExportError> {
    let object = format!("{length} bytes on device {device}");
    let block = level_zero::allocate(device, length)
        .map_err(|failed| refused(&failed, object.clone(), String::new()))?;
    let memory = block.memory();
    let lost = |why| ExportError::Runtime {
        call: "zeMemGetAllocProperties",
        object,
        answer: why,
        hint: String::new(),
    };
    match level_zero::memory(memory.pointer) {
        Ok(Some(found)) => export(memory, found, Some(block)),
        Ok(None) => Err(lost("no memory at what was allocated".to_owned())),
        Err(why) => Err(lost(why)),
    }
}

fn export(
    range: Allocated,
    found: Memory,
    block: Option<Block>,
) -> Result<Descriptors, ExportError> {
    let object = format!("{} bytes at {:#x}", range.length, range.pointer);
    let plainly = |failed: Failed| refused(&failed, object.clone(), String::new());
    let not_this = |call, answer: &str, hint: &str| ExportError::Runtime {
        call,
        object: object.clone(),
        answer: answer.to_owned(),
        hint: hint.to_owned(),
    };
    match found.kind {
        Kind::Device => {}
        Kind::Host => {
            let hint = ": take the memfd or the udmabuf behind it, if it has one";
            return Err(not_this(
                "zeMemGetAllocProperties",
                "memory of the host",
                hint,
            ));
        }
        Kind::Shared => {
            let hint = ": it moves between GPU and host; copy it to memory of zeMemAllocDevice";
            return Err(not_this("zeMemGetAllocProperties", "shared memory", hint));
        }
    }
    const NAMED: &str = ": the type of the export is named when memory is allocated \
                         (ze_external_memory_export_desc_t with ZE_EXTERNAL_MEMORY_TYPE_FLAG_DMA_BUF)";
    if !found.exports_dmabufs().map_err(plainly)? {
        let call = "zeDeviceGetExternalMemoryProperties";
        let hint = ": this device and its driver export no memory as dma-bufs";
        return Err(not_this(call, "no dma-bufs", hint));
    }
    let out_of_range = |of: String, offset: u64, size: u64| {
        ExportError::Buffer(BufferError::OutOfRange {
            object: of,
            offset,
            length: range.length,
            size,
        })
    };
    let offset = range.pointer.saturating_sub(found.base);
    let allocation = found.length;
    let after = allocation
        .checked_sub(offset)
        .and_then(|left| left.checked_sub(range.length));
    let Some(after) = after.filter(|_| found.base <= range.pointer) else {
        let of = format!("the allocation at {:#x}", found.base);
        return Err(out_of_range(of, offset, allocation));
    };
    let exported = found
        .export()
        .map_err(|failed| refused(&failed, object.clone(), NAMED.to_owned()))?;
    let fd = exported.ok_or_else(|| {
        let call = "zeMemGetAllocProperties(EXTERNAL_MEMORY_EXPORT_FD)";
        not_this(call, "success, and no descriptor", NAMED)
    })?;
    // Memory that was not allocated for export may return a descriptor of something else. At
    // best its size reveals that.
    let size = size_of(&fd, &object)?;
    if size < allocation {
        let call = "zeMemGetAllocProperties(EXTERNAL_MEMORY_EXPORT_FD)";
        let answer = format!("a descriptor of {size} bytes, of an allocation of {allocation}");
        return Err(not_this(call, &answer, NAMED));
    }
    let receipt = Receipt {
        runtime: Runtime::LevelZero,
        device: found.address().and_then(address),
        mapping: Mapping::Driver,
        both: false,
        added_before: offset,
        added_after: after,
        // The command list for copies is synchronous.
        ordered: true,
        notes: Vec::new(),
        seen: Vec::new(),
    };
    let memory = range.widened(offset, after);
    let copier = found.copier().map_err(plainly)?;
    let copies = Whole {
        copier,
        memory,
        _block: block,
    };
    Descriptors::checked(range, fd, None, receipt, Arc::new(copies))
}

/// The address of a domain, bus, device and function.
pub(crate) fn address([domain, bus, device, function]: [u32; 4]) -> Option<PciAddress> {
    let text = format!("{domain:04x}:{bus:02x}:{device:02x}.{function}");
    text.parse().ok()
}
