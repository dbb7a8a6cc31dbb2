//! The rungs of the ladder, and the failures of rungs: the layer that refused, and the reason.

use std::fmt;

use peerbuf::Errno;
use peerbuf::plan::ReasonCode;

/// The ways to give a buffer to a card, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rung {
    /// The dma-buf, by `ibv_reg_dmabuf_mr`, or by libfabric with `FI_MR_DMABUF`.
    DmaBufByLibrary,
    /// The dma-buf, by the kernel's own method (`UVERBS_METHOD_REG_DMABUF_MR`).
    DmaBufByKernel,
    /// The pages of the memfd behind the buffer, as ordinary memory.
    SharedMemory,
    /// A bounce buffer: separate system memory, with copies by the CPU.
    #[doc(alias = "bounce buffer")]
    Staged,
}

impl Rung {
    /// All rungs, best first.
    pub const ALL: [Rung; 4] = [
        Rung::DmaBufByLibrary,
        Rung::DmaBufByKernel,
        Rung::SharedMemory,
        Rung::Staged,
    ];

    /// True if the card gets the dma-buf itself.
    pub fn is_dma_buf(self) -> bool {
        matches!(self, Rung::DmaBufByLibrary | Rung::DmaBufByKernel)
    }

    /// The name used in reports, in kebab case.
    pub fn as_str(self) -> &'static str {
        match self {
            Rung::DmaBufByLibrary => "dma-buf-by-library",
            Rung::DmaBufByKernel => "dma-buf-by-kernel",
            Rung::SharedMemory => "shared-memory",
            Rung::Staged => "staged",
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The layer that refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// This crate, without a call: the buffer lacks what the rung needs.
    Buffer,
    /// libibverbs, or its driver for the card.
    Library,
    /// The kernel's uverbs.
    Uverbs,
    /// The card's driver.
    Driver,
    /// The exporter of the dma-buf.
    Exporter,
    /// The kernel's memory management.
    Memory,
    /// libfabric's provider, or a library below it.
    Provider,
    /// The program that opened the domain of libfabric, by the modes it chose.
    Domain,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Layer::Buffer => "the buffer",
            Layer::Library => "the card's part of libibverbs",
            Layer::Uverbs => "uverbs",
            Layer::Driver => "the card's driver",
            Layer::Exporter => "the dma-buf's exporter",
            Layer::Memory => "the kernel's memory management",
            Layer::Provider => "libfabric's provider",
            Layer::Domain => "how the domain was opened",
        })
    }
}

/// A failed rung.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// The rung.
    pub rung: Rung,
    /// The layer that refused.
    pub layer: Layer,
    /// The kind of reason, for programs.
    pub code: ReasonCode,
    /// The error number; `None` if nothing was called.
    pub errno: Option<Errno>,
    /// The call, its object and its result, as text.
    pub evidence: String,
}

impl Attempt {
    /// A failure without a call: the buffer lacks what the rung needs.
    pub(crate) fn lacking(rung: Rung, code: ReasonCode, evidence: &str) -> Attempt {
        Attempt {
            rung,
            layer: Layer::Buffer,
            code,
            errno: None,
            evidence: evidence.to_owned(),
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.rung, self.evidence, self.layer)
    }
}
