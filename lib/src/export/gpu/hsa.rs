//! ROCm: exports through its runtime, HSA (`hsa_ext_amd.h`).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::found::{Copies, Descriptors, Mapping, Receipt, Runtime, refused, size_of};
use crate::error::{BufferError, ExportError};
use crate::sys::gpu::hsa::{self, Hsa, MAPPING_PCIE, Memory, NO_SUCH_FUNCTION};
use crate::sys::gpu::{Allocated, Failed};
use crate::topology::PciAddress;

/// The memory of a dma-buf.
struct Whole {
    hsa: Hsa,
    memory: Allocated,
}

impl Copies for Whole {
    fn upload(&self, offset: u64, from: &[u8]) -> Result<(), Failed> {
        self.hsa.upload(self.memory, offset, from)
    }

    fn download(&self, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
        self.hsa.download(self.memory, offset, into)
    }

    fn flush(&self) -> Result<(), Failed> {
        // The runtime has no such call: its copies and kernels acquire the writes of devices.
        Ok(())
    }
}

/// Number of GPUs.
pub(super) fn devices() -> Result<u32, String> {
    let count = Hsa::open()?.devices();
    count.map_err(|failed| format!("{}: {failed}", failed.call))
}

/// Exports the memory at an address.
///
/// # Errors
/// The outer error: why the memory is not HSA's. The inner error: why HSA's memory could not be
/// exported.
pub(super) fn find(memory: Allocated) -> Result<Result<Descriptors, ExportError>, String> {
    match hsa::memory(memory.pointer)? {
        None => Err("no memory of its".to_owned()),
        Some(found) => {
            let hsa = Hsa::open()?;
            Ok(export(hsa, memory, found))
        }
    }
}

fn export(hsa: Hsa, range: Allocated, found: Memory) -> Result<Descriptors, ExportError> {
    let object = format!("{} bytes at {:#x}", range.length, range.pointer);
    if found.locked {
        return Err(ExportError::Runtime {
            call: "hsa_amd_pointer_info",
            object,
            answer: "memory of the host that is locked for a GPU".to_owned(),
            hint: ": the runtime exports its own allocations only; take the memfd or the udmabuf behind it, if it has \
                   one"
                .to_owned(),
        });
    }
    let within = range.pointer.checked_sub(found.base);
    let end = within.and_then(|within| within.checked_add(range.length));
    if end.is_none_or(|end| end > found.length) {
        return Err(ExportError::Buffer(BufferError::OutOfRange {
            object: format!("the allocation at {:#x}", found.base),
            offset: within.unwrap_or(0),
            length: range.length,
            size: found.length,
        }));
    }
    let mut notes = Vec::new();
    let got = by_best_mapping(&hsa, range, &mut notes);
    let (mapping, fd, offset) = got.map_err(|failed| {
        let mut hint = String::new();
        for note in &notes {
            hint += &format!(" ({note})");
        }
        hint += match failed.code {
            NO_SUCH_FUNCTION => ": ROCm 5.4 or later is needed",
            _ => {
                ": it takes a kernel with CONFIG_HSA_AMD_P2P and CONFIG_PCI_P2PDMA, a BAR as large as the GPU's memory, \
                 and iommu=pt"
            }
        };
        refused(&failed, object.clone(), hint)
    })?;
    let size = size_of(&fd, &object)?;
    // The descriptor covers the whole memory around the allocation, which may begin before it.
    let after = offset
        .checked_add(range.length)
        .and_then(|end| size.checked_sub(end));
    let Some(after) = after.filter(|_| offset <= range.pointer) else {
        return Err(ExportError::Buffer(BufferError::OutOfRange {
            object: format!("the dma-buf that ROCm gave for {object}"),
            offset,
            length: range.length,
            size,
        }));
    };
    let receipt = Receipt {
        runtime: Runtime::Hsa,
        device: hsa.address(found).and_then(address),
        mapping,
        both: false,
        added_before: offset,
        added_after: after,
        // hsa_memory_copy returns when the copy is complete.
        ordered: true,
        notes,
        seen: Vec::new(),
    };
    let memory = range.widened(offset, after);
    let copies = Whole { hsa, memory };
    Descriptors::checked(range, fd, None, receipt, Arc::new(copies))
}

type Got = (Mapping, OwnedFd, u64);

/// Tries the PCIe mapping, then the driver's choice, then the call of versions before ROCm 7.1.
/// The flag returns no other descriptor. The runtime refuses the flag if the GPU's memory is
/// not all in its BAR.
fn by_best_mapping(hsa: &Hsa, range: Allocated, notes: &mut Vec<String>) -> Result<Got, Failed> {
    for (mapping, flags) in [(Mapping::Pcie, MAPPING_PCIE), (Mapping::Driver, 0)] {
        match hsa.export(range, Some(flags)) {
            Ok((fd, offset)) => return Ok((mapping, fd, offset)),
            Err(failed) => {
                notes.push(format!("{}, mapping {mapping}: {failed}", failed.call));
                if failed.code == NO_SUCH_FUNCTION {
                    break;
                }
            }
        }
    }
    let (fd, offset) = hsa.export(range, None)?;
    Ok((Mapping::Driver, fd, offset))
}

/// The PCI address, from a domain, and a bus, device and function packed into 16 bits.
pub(crate) fn address((domain, at): (u32, u32)) -> Option<PciAddress> {
    let (bus, device, function) = (at >> 8 & 0xff, at >> 3 & 0x1f, at & 7);
    let text = format!("{domain:04x}:{bus:02x}:{device:02x}.{function}");
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bdf_id_is_bus_device_and_function() {
        assert_eq!(address((0, 0x4a08)), "0000:4a:01.0".parse().ok());
        assert_eq!(address((2, 0xc1ff)), "0002:c1:1f.7".parse().ok());
        assert_eq!(address((0x10000, 8)), "10000:00:01.0".parse().ok());
    }
}
