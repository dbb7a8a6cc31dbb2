//! Errors, one type per operation.
//!
//! Each error names the failed call and the object of the call, and keeps the error number,
//! which `errno()` returns. All errors may get further variants. `?` converts each into a
//! [`std::io::Error`], like the errors of [`peerbuf_core::error`].

use std::io::ErrorKind;
use std::time::Duration;

use crate::errno::Errno;
use crate::path::{Plan, ReasonCode};
use peerbuf_core::into_io_error;

pub use peerbuf_core::error::{BufferError, SystemError};

/// The error of moving, revoking, restoring, watching or querying an exported buffer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{cause}{hint}")]
#[non_exhaustive]
pub struct ControlError {
    /// The call that failed.
    pub cause: SystemError,
    /// A hint about the cause, such as the buffer's users. Empty, or starts with a colon.
    pub hint: String,
    /// What was in the way of a move that failed with `EBUSY`, when it gave up.
    pub in_the_way: Option<InTheWay>,
}

/// What was in the way of a move when it gave up. All numbers are zero if that was another move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InTheWay {
    /// The kernel mapping, and for a move to the BAR the importers that require system memory and the
    /// old mappings of the BAR.
    pub holders: u64,
    /// Number of fences that had not signalled.
    pub fences: u64,
    /// Number of pages in use by processes' mappings or direct I/O.
    pub pages: u64,
    /// Number of pins of all importers.
    pub pins: u64,
}

impl ControlError {
    /// The kernel's error.
    pub fn errno(&self) -> Option<Errno> {
        self.cause.errno()
    }
}

into_io_error!(ControlError, |_| ErrorKind::Other);

/// A requirement that this machine lacks: the failed call, its error, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {cause}; {remedy}")]
#[non_exhaustive]
pub struct Unavailable {
    /// The exporter or importer that is unavailable, such as `udmabuf`.
    pub what: &'static str,
    /// The call that failed, its object, and the error.
    pub cause: SystemError,
    /// The remedy.
    pub remedy: String,
}

impl Unavailable {
    /// Makes an error: `what` is unavailable because of `cause`, and `remedy` would change
    /// that.
    pub fn new(what: &'static str, cause: SystemError, remedy: impl Into<String>) -> Unavailable {
        Unavailable {
            what,
            cause,
            remedy: remedy.into(),
        }
    }

    /// The kernel's error.
    pub fn errno(&self) -> Option<Errno> {
        self.cause.errno()
    }
}

into_io_error!(Unavailable, |_| ErrorKind::Other);

/// A failed Vulkan call, with its object and its result.
#[cfg(feature = "vulkan")]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} on {object}: {result:?}{hint}")]
#[non_exhaustive]
pub struct VulkanError {
    /// The call, such as `vkAllocateMemory`.
    pub call: &'static str,
    /// The object of the call: a buffer's or a device's name.
    pub object: String,
    /// The driver's result.
    pub result: ash::vk::Result,
    /// A hint about the cause. Empty, or starts with a colon.
    pub hint: String,
}

#[cfg(feature = "vulkan")]
impl VulkanError {
    pub(crate) fn new(
        call: &'static str,
        object: impl Into<String>,
        result: ash::vk::Result,
    ) -> VulkanError {
        VulkanError {
            call,
            object: object.into(),
            result,
            hint: String::new(),
        }
    }

    pub(crate) fn with_hint(mut self, hint: impl Into<String>) -> VulkanError {
        self.hint = hint.into();
        self
    }

    /// Always `None`: Vulkan's results are not error numbers.
    pub fn errno(&self) -> Option<Errno> {
        None
    }
}

#[cfg(feature = "vulkan")]
into_io_error!(VulkanError, |_| ErrorKind::Other);

/// The error of exporting a buffer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The machine lacks a requirement of this exporter.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// A call failed. `hint` names the usual cause and may be empty.
    #[error("{cause}{hint}")]
    System {
        /// The call that failed.
        cause: SystemError,
        /// Empty, or starts with `: `.
        hint: String,
    },
    /// A length or an offset that the exporter does not support.
    #[error("{what} is {value}, but must be {must}")]
    Unsuitable {
        /// The name of the value.
        what: &'static str,
        /// The value.
        value: u64,
        /// The rule it breaks.
        must: String,
    },
    /// The module lacks features that the library needs.
    #[error(
        "{object}: peerbuf.ko has the features {found:#x}, this library also needs {:#x}: use those of one release",
        needed & !found
    )]
    Version {
        /// The device node.
        object: String,
        /// The module's features, `PEERBUF_FEATURE_*`.
        found: u64,
        /// The features that the library needs.
        needed: u64,
    },
    /// A GPU's runtime refused, with its own error code.
    #[error("{call} on {object}: {answer}{hint}")]
    Runtime {
        /// The runtime's function.
        call: &'static str,
        /// The object of the call: an address and a length, or a device.
        object: String,
        /// The code's name and number.
        answer: String,
        /// The usual cause and the remedy. Empty, or starts with `: `.
        hint: String,
    },
    /// An address that belongs to no memory of the available GPU runtimes.
    #[error(
        "{pointer:#x} is in no memory of a GPU's runtime that is here; asked: {}",
        asked.join("; ")
    )]
    NotGpuMemory {
        /// The address.
        pointer: u64,
        /// Each runtime with its library and its answer.
        asked: Vec<String>,
    },
    /// The exported buffer could not be used.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// A Vulkan call failed.
    #[cfg(feature = "vulkan")]
    #[error(transparent)]
    Vulkan(#[from] VulkanError),
}

impl ExportError {
    /// The kernel's error, if a call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            ExportError::Unavailable(error) => error.errno(),
            ExportError::System { cause, .. } => cause.errno(),
            ExportError::Buffer(error) => error.errno(),
            ExportError::Unsuitable { .. }
            | ExportError::Version { .. }
            | ExportError::Runtime { .. }
            | ExportError::NotGpuMemory { .. } => None,
            #[cfg(feature = "vulkan")]
            ExportError::Vulkan(error) => error.errno(),
        }
    }
}

into_io_error!(ExportError, |error| match error {
    ExportError::Unsuitable { .. } | ExportError::NotGpuMemory { .. } => ErrorKind::InvalidInput,
    ExportError::Version { .. } => ErrorKind::Unsupported,
    _ => ErrorKind::Other,
});

/// The error of asking the kernel for an importer's mapping.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The importer is unavailable.
    #[error("peerbuf_probe.ko: {cause}; {remedy}")]
    Unavailable {
        /// The call that failed.
        cause: SystemError,
        /// The remedy.
        remedy: &'static str,
    },
    /// A call failed. `hint` explains the error number here and may be empty.
    #[error("{cause}{hint}")]
    System {
        /// The call that failed.
        cause: SystemError,
        /// Empty, or starts with `: `.
        hint: &'static str,
    },
}

impl ProbeError {
    /// The kernel's error.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            ProbeError::Unavailable { cause, .. } | ProbeError::System { cause, .. } => {
                cause.errno()
            }
        }
    }
}

into_io_error!(ProbeError, |_| ErrorKind::Other);

/// The error of sharing a buffer with another process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShareError {
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The peer closed the socket or died.
    #[error("the peer has gone")]
    PeerGone,
    /// The kernel truncated the message: the message or its descriptors did not fit.
    #[error("a message was truncated: {what}")]
    Truncated {
        /// The truncated part.
        what: &'static str,
    },
    /// A message that breaks the protocol. Its descriptors have been closed.
    #[error("a malformed message: {what}")]
    Malformed {
        /// The rule that the message breaks.
        what: String,
    },
    /// The socket is of the wrong kind.
    #[error("not a unix seqpacket socket")]
    WrongSocket,
    /// The object was inherited through `fork`. Only the process that made the object can use it.
    #[error(
        "{what} belongs to the parent process and is not usable after fork: create one in this process"
    )]
    Inherited {
        /// The object, such as `a subscriber`.
        what: &'static str,
    },
    /// The publisher closed the connection and sent a reason.
    #[error("the publisher cut this subscriber off: {why}")]
    CutOff {
        /// The reason, such as `it did not return a buffer in time`.
        why: &'static str,
    },
    /// A wait timed out.
    #[error("timed out after {limit:?} waiting for {what}")]
    TimedOut {
        /// The awaited event.
        what: String,
        /// The time limit.
        limit: Duration,
    },
    /// There is no such buffer, or no longer.
    #[error("no buffer is published as {name}")]
    Unknown {
        /// The requested name.
        name: String,
    },
    /// The name is not valid for publishing.
    #[error("{name:?} cannot be published: {why}")]
    Name {
        /// The name.
        name: String,
        /// The rule that it breaks.
        why: &'static str,
    },
    /// The buffer is lent to this process, which therefore may not pass it on.
    #[error(
        "{name} is lent to this process and cannot be passed on, because its publisher could not revoke it: \
         subscribe in the other process, too, or copy the bytes"
    )]
    Lent {
        /// The buffer.
        name: String,
    },
    /// The publisher itself still uses the generation that is to be replaced.
    #[error("{name} cannot move: this process still holds clones or mappings of it")]
    StillInUse {
        /// The buffer's published name.
        name: String,
    },
    /// No process uses the generation any more, but a device did not finish in time.
    #[error("{name} cannot move: a device was still accessing it after {limit:?}")]
    DeviceBusy {
        /// The buffer's published name.
        name: String,
        /// The time limit.
        limit: Duration,
    },
    /// A backing could not make the next generation.
    #[error("{what}")]
    Backing {
        /// The operation and its error.
        what: String,
    },
    /// The next generation could not be exported.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The kernel could not move or revoke a buffer.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The buffer of the message is unusable, or the buffer to be sent is.
    #[error(transparent)]
    Buffer(#[from] BufferError),
}

impl ShareError {
    /// The kernel's error, if a call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            ShareError::System(error) => error.errno(),
            ShareError::Export(error) => error.errno(),
            ShareError::Control(error) => error.errno(),
            ShareError::Buffer(error) => error.errno(),
            _ => None,
        }
    }

    /// True if the process, its user or the machine ran out of descriptors or memory. The same
    /// call may succeed later.
    pub fn is_shortage(&self) -> bool {
        use rustix::io::Errno as Number;
        let short = [
            Number::MFILE,
            Number::NFILE,
            Number::NOMEM,
            Number::NOBUFS,
            Number::NOSPC,
            Number::TOOMANYREFS,
        ];
        match self {
            ShareError::System(SystemError { errno, .. }) => short
                .into_iter()
                .any(|number| Errno::from(number) == *errno),
            _ => false,
        }
    }

    /// True if a call on a non-blocking socket would have had to wait.
    #[cfg(feature = "share")]
    pub(crate) fn would_wait(&self) -> bool {
        matches!(self, ShareError::System(SystemError { errno, .. }) if *errno == Errno::AGAIN)
    }
}

into_io_error!(ShareError, |error| match error {
    ShareError::PeerGone | ShareError::CutOff { .. } => ErrorKind::ConnectionAborted,
    ShareError::Truncated { .. } | ShareError::Malformed { .. } => ErrorKind::InvalidData,
    ShareError::WrongSocket | ShareError::Name { .. } => ErrorKind::InvalidInput,
    ShareError::TimedOut { .. } | ShareError::DeviceBusy { .. } => ErrorKind::TimedOut,
    ShareError::StillInUse { .. } => ErrorKind::ResourceBusy,
    ShareError::Unknown { .. } => ErrorKind::NotFound,
    _ => ErrorKind::Other,
});

/// The error of attaching a buffer to an importer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The machine lacks a requirement of this importer.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The buffer could not be mapped or accessed.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// A transfer between a file and the buffer failed.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The kernel could not be asked, or refused.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// A GPU's runtime failed, which has error codes of its own.
    #[error("{call} on {object}: {answer}{hint}")]
    Runtime {
        /// The runtime's function.
        call: &'static str,
        /// What it was called on: a buffer, or a device.
        object: String,
        /// The code's name and number.
        answer: String,
        /// What usually causes it, and what to do. Starts with `: ` where it says something.
        hint: String,
    },
    /// A Vulkan call failed.
    #[cfg(feature = "vulkan")]
    #[error(transparent)]
    Vulkan(#[from] VulkanError),
    /// The importer cannot use the buffer.
    #[error("{importer} cannot use {buffer}: {evidence} ({code})")]
    Impossible {
        /// The importer's name.
        importer: String,
        /// The buffer's name.
        buffer: String,
        /// The kind of reason, for programs.
        code: ReasonCode,
        /// The evidence, for people.
        evidence: String,
    },
}

impl ImportError {
    /// The kernel's error, if a call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            ImportError::Unavailable(error) => error.errno(),
            ImportError::System(error) => error.errno(),
            ImportError::Buffer(error) => error.errno(),
            ImportError::Transfer(error) => error.errno(),
            ImportError::Probe(error) => error.errno(),
            ImportError::Impossible { .. } | ImportError::Runtime { .. } => None,
            #[cfg(feature = "vulkan")]
            ImportError::Vulkan(error) => error.errno(),
        }
    }
}

into_io_error!(ImportError, |_| ErrorKind::Unsupported);

/// The error of a transfer between a file and a buffer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// A system call failed.
    #[error(transparent)]
    System(#[from] SystemError),
    /// The buffer could not be mapped or accessed.
    #[error(transparent)]
    Buffer(#[from] BufferError),
    /// The object does not support data transfers.
    #[error("{object} is neither a regular file nor a block device")]
    NotAFile {
        /// The rejected object.
        object: String,
    },
    /// The file is open for reading only.
    #[error("{object} is not open for writing")]
    ReadOnly {
        /// The file.
        object: String,
    },
    /// The file is open for writing only.
    #[error("{object} is not open for reading")]
    WriteOnly {
        /// The file.
        object: String,
    },
    /// The file is open for appending: the kernel ignores the offset of a write through that
    /// descriptor.
    #[error(
        "{object} is open for appending (O_APPEND), so the kernel would put each write at its end: \
         open it without, or clear the flag (fcntl(F_SETFL))"
    )]
    Appending {
        /// The file.
        object: String,
    },
    /// The file is open with `O_DIRECT` and cannot be reopened without it, so part of a block
    /// cannot be written.
    #[error(
        "{object} is open with O_DIRECT, which writes whole blocks of {block} bytes, but {length} bytes at offset \
         {offset} are only part of a block, and opening it without O_DIRECT failed: {cause}"
    )]
    WholeBlocksOnly {
        /// The file.
        object: String,
        /// The block size in bytes.
        block: u64,
        /// Offset of the first byte in the file.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// The reason why there is no descriptor without `O_DIRECT`.
        cause: SystemError,
    },
    /// The file accepted fewer bytes than requested, without an error.
    #[error(
        "wrote {written} of {wanted} bytes to {object}: a write at offset {offset} wrote nothing"
    )]
    ShortWrite {
        /// The file.
        object: String,
        /// File offset of the write that wrote nothing.
        offset: u64,
        /// Number of bytes written.
        written: u64,
        /// Number of bytes requested.
        wanted: u64,
    },
    /// A request failed on every remaining path. The other requests in flight have completed.
    #[error("{cause}, for {length} bytes at {offset}; {arrived} of {wanted} bytes have arrived")]
    Stopped {
        /// The call that failed.
        cause: SystemError,
        /// The request's offset in the file.
        offset: u64,
        /// The request's length in bytes.
        length: u64,
        /// Number of bytes that have arrived, in any place.
        arrived: u64,
        /// Number of bytes requested.
        wanted: u64,
        /// Number of bytes that have arrived without a gap from the start of the transfer. A
        /// retry can resume here.
        prefix: u64,
    },
    /// The transfer was cancelled ([`Watch::cancel`](crate::transfer::Watch::cancel)).
    #[error("{object}: cancelled after {arrived} of {wanted} bytes")]
    Cancelled {
        /// The file.
        object: String,
        /// Number of bytes that have arrived, in any place.
        arrived: u64,
        /// Number of bytes requested.
        wanted: u64,
        /// Number of bytes that have arrived without a gap from the start of the transfer.
        prefix: u64,
    },
    /// The file ended early, because it shrank during the transfer.
    #[error("read {read} of {wanted} bytes from {object}, which became shorter")]
    ShortRead {
        /// The file.
        object: String,
        /// Number of bytes read.
        read: u64,
        /// Number of bytes requested.
        wanted: u64,
    },
    /// The caller required a better path than the possible ones.
    #[error("only {} is possible: {plan}", plan.path)]
    PathTooPoor {
        /// The best possible path, and the reasons against better ones.
        plan: Plan,
    },
}

impl TransferError {
    /// The kernel's error, if a call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            TransferError::System(error) => error.errno(),
            TransferError::Buffer(error) => error.errno(),
            _ => None,
        }
    }
}

into_io_error!(TransferError, |error| match error {
    TransferError::NotAFile { .. } | TransferError::WholeBlocksOnly { .. } => {
        ErrorKind::InvalidInput
    }
    TransferError::ReadOnly { .. }
    | TransferError::WriteOnly { .. }
    | TransferError::Appending { .. } => ErrorKind::PermissionDenied,
    TransferError::ShortWrite { .. } => ErrorKind::WriteZero,
    TransferError::ShortRead { .. } => ErrorKind::UnexpectedEof,
    TransferError::PathTooPoor { .. } => ErrorKind::Unsupported,
    _ => ErrorKind::Other,
});
