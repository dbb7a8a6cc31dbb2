//! The rungs of the ladder, and what is said of one that did not work: who refused, and why.

use std::fmt;

use peerbuf::Errno;
use peerbuf::plan::ReasonCode;

/// The ways in which a card can be given a buffer, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Rung {
    /// The dma-buf, by `ibv_reg_dmabuf_mr`, or by libfabric with `FI_MR_DMABUF`.
    DmaBufByLibrary,
    /// The dma-buf, by the kernel's own method (`UVERBS_METHOD_REG_DMABUF_MR`).
    DmaBufByKernel,
    /// The pages of the memfd behind the buffer, as ordinary memory.
    SharedMemory,
    /// System memory of its own, which the processor copies from and to.
    #[doc(alias = "bounce buffer")]
    Staged,
}

impl Rung {
    /// All, the best first.
    pub const ALL: [Rung; 4] = [
        Rung::DmaBufByLibrary,
        Rung::DmaBufByKernel,
        Rung::SharedMemory,
        Rung::Staged,
    ];

    /// True where the card is given the dma-buf itself.
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

/// Who said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// This crate, without asking anybody: the buffer lacks what the rung needs.
    Buffer,
    /// libibverbs, or the card's part of it.
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
    /// Who opened the domain of libfabric, by how it was opened.
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

/// A rung that did not work.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// Which.
    pub rung: Rung,
    /// Who said no.
    pub layer: Layer,
    /// Which kind of reason, for programs.
    pub code: ReasonCode,
    /// What was answered; `None` where nobody was asked.
    pub errno: Option<Errno>,
    /// What was tried, on what, and what came back; for people.
    pub evidence: String,
}

impl Attempt {
    /// One that nobody was asked about: the buffer lacks what the rung needs.
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
