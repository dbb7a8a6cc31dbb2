//! A compute shader on a Vulkan device, which changes a buffer's bytes instead of the first
//! process.

use std::time::Duration;

use peerbuf::BufferRange;
use peerbuf::device::vulkan::{Affine, Device, Formula, Words};
use peerbuf::import::vulkan::VulkanImporter;
use peerbuf::plan::Path;

use super::protocol::{Account, Reason};
use crate::Failure;

/// A software device takes seconds for a large buffer.
const LIMIT: Duration = Duration::from_secs(300);

/// The first Vulkan device.
pub struct Gpu {
    importer: VulkanImporter,
    shader: Affine,
    /// Display name.
    pub name: String,
}

impl Gpu {
    /// Opens the device and compiles the shader.
    pub fn open() -> Result<Gpu, Failure> {
        let devices = Device::all()?;
        let device = devices.first().ok_or("no Vulkan device")?;
        let importer = VulkanImporter::new(device);
        Ok(Gpu {
            shader: Affine::new(device)?,
            name: format!("{}, a shader", importer.name()),
            importer,
        })
    }

    /// Complements each byte of a range at the start of its buffer.
    pub fn change(&self, range: &BufferRange) -> Result<Account, Failure> {
        let attachment = self.importer.attach(range)?;
        let memory = attachment.memory();
        let offset = 0;
        let words = Words { memory, offset };
        // The last word may be partial, but a buffer has whole pages.
        let count = u32::try_from(range.len().div_ceil(4))?;
        let work = self
            .shader
            .run(words, words, count, Formula::COMPLEMENT, LIMIT)?;
        work.wait(LIMIT)?;
        let plan = attachment.plan();
        let reasons = plan.reasons.iter().map(|reason| Reason {
            path: reason.path.to_string(),
            code: reason.code.to_string(),
            evidence: reason.evidence.clone(),
        });
        Ok(Account {
            reasons: reasons.collect(),
            bytes: range.len(),
            host_bytes: match plan.path {
                Path::PeerToPeer => 0,
                _ => range.len(),
            },
            path: plan.path.to_string(),
        })
    }
}
