//! Result codes, and details of a failure.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};

use peerbuf::error::{
    BufferError, ControlError, ExportError, ShareError, SystemError, TransferError, Unavailable,
};
use peerbuf_rdma::RdmaError;

/// The result of a function. The numbers never change; new ones may be added.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Success.
    Ok = 0,
    /// An invalid argument: a null pointer, a text that is not UTF-8, an unknown number.
    Argument = 1,
    /// Not a handle, a freed one, or one of another type.
    Handle = 2,
    /// Called in the wrong order: an access that has already begun, or has not begun.
    Order = 3,
    /// A bug in this library.
    Internal = 4,
    /// A system call failed; `system_error` is its number.
    System = 5,
    /// The machine lacks a required feature.
    Unavailable = 6,
    /// A length, an offset or a name that is not allowed; a buffer that an engine cannot take.
    Unsuitable = 7,
    /// The kernel module and this library are from different releases.
    Version = 8,
    /// The descriptor is not a dma-buf.
    NotADmabuf = 9,
    /// Another holder could shrink the memory.
    NotSealed = 10,
    /// The bytes are not all inside the buffer.
    OutOfRange = 11,
    /// A write to something read-only, or a read of something write-only.
    Access = 12,
    /// A wait timed out.
    TimedOut = 13,
    /// The object belongs to the process that this one was forked from.
    Inherited = 14,
    /// The peer has closed the connection.
    PeerGone = 15,
    /// The peer violated the protocol.
    Malformed = 16,
    /// The publisher ended the connection.
    CutOff = 17,
    /// The descriptor is not a unix socket of type SOCK_SEQPACKET.
    WrongSocket = 18,
    /// Neither a regular file nor a block device.
    NotAFile = 19,
    /// The file is open in an unsuitable mode.
    FileMode = 20,
    /// The file accepted fewer bytes than were written.
    ShortWrite = 21,
    /// The card could not register the buffer; the evidence lists each attempt.
    NotRegistered = 22,
    /// The buffer has changed since its registration.
    Stale = 23,
    /// Another failure; see the message.
    Other = 24,
}

impl Code {
    /// The default remedy.
    fn remedy(self) -> &'static str {
        match self {
            Code::Ok => "",
            Code::Argument | Code::Handle | Code::Order => {
                "correct the program: include/peerbuf.h says what the function takes"
            }
            Code::Internal => "report it with the message",
            Code::System => "see the error number",
            Code::Unavailable => "use another exporter, such as peerbuf_export_memfd",
            Code::Unsuitable => "use a value as the message says",
            Code::Version => "install the module and the library of one release",
            Code::NotADmabuf => "give a dma-buf's descriptor, or a sealed memfd's",
            Code::NotSealed => "seal the memfd: fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)",
            Code::OutOfRange => "ask for bytes inside the buffer",
            Code::Access => "export, map or open it for this access",
            Code::TimedOut => "try again, or wait longer",
            Code::Inherited => "make one in this process",
            Code::PeerGone => "connect again",
            Code::Malformed => "see docs/wire.md for the messages that the peer may send",
            Code::CutOff => "connect again, and return buffers in time",
            Code::WrongSocket => "make it with socket(AF_UNIX, SOCK_SEQPACKET, 0)",
            Code::NotAFile => "give a regular file or a block device",
            Code::FileMode => "open the file for this access, without O_APPEND",
            Code::ShortWrite => "make room on the filesystem",
            Code::NotRegistered => {
                "see the evidence; a udmabuf's memory can be given to every card"
            }
            Code::Stale => "register it again",
            Code::Other => "see the message",
        }
    }
}

/// A failure with its texts.
#[derive(Debug)]
pub struct Failure {
    /// The code, for programs.
    pub code: Code,
    /// The error number of the failed system call; 0 if none failed.
    pub system_error: i32,
    /// The operation, its object and its result.
    pub message: String,
    /// The failed call, its object and its error; empty if no call failed.
    pub evidence: String,
    /// The remedy.
    pub remedy: String,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure {
            code,
            system_error: 0,
            message: message.into(),
            evidence: String::new(),
            remedy: code.remedy().to_owned(),
        }
    }

    /// A failure with the failed call as evidence.
    fn of(code: Code, message: String, cause: &SystemError) -> Failure {
        Failure {
            system_error: cause.errno.0,
            evidence: cause.to_string(),
            ..Failure::new(code, message)
        }
    }
}

impl From<SystemError> for Failure {
    fn from(error: SystemError) -> Failure {
        Failure::of(Code::System, error.to_string(), &error)
    }
}

impl From<Unavailable> for Failure {
    fn from(error: Unavailable) -> Failure {
        Failure {
            remedy: error.remedy.clone(),
            ..Failure::of(Code::Unavailable, error.to_string(), &error.cause)
        }
    }
}

impl From<BufferError> for Failure {
    fn from(error: BufferError) -> Failure {
        let code = match error {
            BufferError::System(cause) => return cause.into(),
            BufferError::NotADmaBuf { .. } => Code::NotADmabuf,
            BufferError::NotSealed { .. } => Code::NotSealed,
            BufferError::OutOfRange { .. } => Code::OutOfRange,
            BufferError::Access { .. } => Code::Access,
            BufferError::TimedOut { .. } => Code::TimedOut,
            BufferError::Inherited { .. } => Code::Inherited,
            BufferError::Name { .. } | BufferError::Engine { .. } => Code::Unsuitable,
            _ => Code::Other,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Failure {
        let message = error.to_string();
        match error {
            ExportError::Unavailable(error) => error.into(),
            ExportError::System { cause, .. } => Failure::of(Code::System, message, &cause),
            ExportError::Unsuitable { .. } => Failure::new(Code::Unsuitable, message),
            ExportError::Version { .. } => Failure::new(Code::Version, message),
            ExportError::Buffer(error) => error.into(),
            _ => Failure::new(Code::Other, message),
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Failure {
        Failure::of(Code::System, error.to_string(), &error.cause)
    }
}

impl From<ShareError> for Failure {
    fn from(error: ShareError) -> Failure {
        let code = match error {
            ShareError::System(cause) => return cause.into(),
            ShareError::Export(error) => return error.into(),
            ShareError::Control(error) => return error.into(),
            ShareError::Buffer(error) => return error.into(),
            ShareError::PeerGone => Code::PeerGone,
            ShareError::Truncated { .. } | ShareError::Malformed { .. } => Code::Malformed,
            ShareError::WrongSocket => Code::WrongSocket,
            ShareError::Inherited { .. } => Code::Inherited,
            ShareError::CutOff { .. } => Code::CutOff,
            ShareError::TimedOut { .. } => Code::TimedOut,
            ShareError::Lent { .. } => Code::Argument,
            _ => Code::Other,
        };
        Failure::new(code, error.to_string())
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Failure {
        let message = error.to_string();
        let code = match error {
            TransferError::System(cause) => return cause.into(),
            TransferError::Buffer(error) => return error.into(),
            TransferError::WholeBlocksOnly { cause, .. } => {
                return Failure::of(Code::FileMode, message, &cause);
            }
            TransferError::NotAFile { .. } => Code::NotAFile,
            TransferError::ReadOnly { .. }
            | TransferError::WriteOnly { .. }
            | TransferError::Appending { .. } => Code::FileMode,
            TransferError::ShortWrite { .. } => Code::ShortWrite,
            _ => Code::Other,
        };
        Failure::new(code, message)
    }
}

impl From<RdmaError> for Failure {
    fn from(error: RdmaError) -> Failure {
        let message = error.to_string();
        let code = match error {
            RdmaError::Unavailable(error) => return error.into(),
            RdmaError::System(cause) => return cause.into(),
            RdmaError::Buffer(error) => return error.into(),
            RdmaError::Share(error) => return (*error).into(),
            RdmaError::NotRegistered { attempts, .. } => {
                let lines: Vec<String> = attempts.iter().map(ToString::to_string).collect();
                return Failure {
                    evidence: lines.join("; "),
                    ..Failure::new(Code::NotRegistered, message)
                };
            }
            RdmaError::Empty { .. } => Code::Unsuitable,
            RdmaError::Mismatch { .. } => Code::Argument,
            RdmaError::Stale { .. } => Code::Stale,
            RdmaError::TimedOut { .. } => Code::TimedOut,
            RdmaError::Malformed { .. } => Code::Malformed,
            _ => Code::Other,
        };
        Failure::new(code, message)
    }
}

/// The last failure of a thread. The texts are never null, and valid until the thread's next failure.
#[repr(C)]
pub struct Error {
    /// The function's result; `PEERBUF_CODE_OK` if none has failed yet.
    pub code: Code,
    /// The error number of the failed system call (errno); 0 if none failed.
    pub system_error: c_int,
    /// The operation, its object and its result.
    pub message: *const c_char,
    /// The failed call, its object and its error; empty if no call failed.
    pub evidence: *const c_char,
    /// The remedy.
    pub remedy: *const c_char,
}

struct Kept {
    error: Error,
    /// The texts that the pointers refer to.
    _texts: [CString; 3],
}

impl Kept {
    fn new(failure: Failure) -> Box<Kept> {
        let text = |text: String| CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default();
        let texts = [failure.message, failure.evidence, failure.remedy].map(text);
        let [message, evidence, remedy] =
            [&texts[0], &texts[1], &texts[2]].map(|text| text.as_ptr());
        Box::new(Kept {
            error: Error {
                code: failure.code,
                system_error: failure.system_error,
                message,
                evidence,
                remedy,
            },
            _texts: texts,
        })
    }
}

thread_local! {
    static LAST: RefCell<Box<Kept>> = RefCell::new(Kept::new(Failure::new(Code::Ok, "")));
}

/// Stores a failure for [`peerbuf_last_error`].
pub(crate) fn keep(failure: Failure) -> Code {
    let code = failure.code;
    // A thread that is ending cannot query it any more.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Kept::new(failure));
    code
}

/// The calling thread's last failure. Never null; valid until the thread's next failure.
#[unsafe(no_mangle)]
pub extern "C" fn peerbuf_last_error() -> *const Error {
    static NONE: Error = Error {
        code: Code::Ok,
        system_error: 0,
        message: c"".as_ptr(),
        evidence: c"".as_ptr(),
        remedy: c"".as_ptr(),
    };
    let last = LAST.try_with(|last| &raw const last.borrow().error);
    last.unwrap_or(&raw const NONE)
}

/// The version of the library, such as `0.1.0`.
#[unsafe(no_mangle)]
pub extern "C" fn peerbuf_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

// SAFETY: its pointers refer to constant texts; only `NONE` is shared.
unsafe impl Sync for Error {}
