//! A compute shader on a Vulkan device, which changes a buffer's bytes as the first process does otherwise.

use std::time::Duration;

use peerbuf::BufferRange;
use peerbuf::device::vulkan::{Affine, Device, Formula, Words};
use peerbuf::import::vulkan::VulkanImporter;
use peerbuf::plan::Path;

use super::protocol::{Account, Reason};
use crate::Failure;

/// Software takes seconds for a large buffer.
const LIMIT: Duration = Duration::from_secs(300);

/// The first device.
pub struct Gpu {
    importer: VulkanImporter,
    shader: Affine,
    /// For people.
    pub name: String,
}

impl Gpu {
    /// Opens it, and compiles the shader.
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

    /// Complements each byte of a range that begins with its buffer.
    pub fn change(&self, range: &BufferRange) -> Result<Account, Failure> {
        let attachment = self.importer.attach(range)?;
        let memory = attachment.memory();
        let offset = 0;
        let words = Words { memory, offset };
        // The last word may be one in part; a buffer has whole pages.
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
