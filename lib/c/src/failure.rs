//! Codes, and what is known of a failure.

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int};

use peerbuf::error::{
    BufferError, ControlError, ExportError, ShareError, SystemError, TransferError, Unavailable,
};
use peerbuf_rdma::RdmaError;

/// What a function returns. The numbers never change; new ones may come.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// It did what it is for.
    Ok = 0,
    /// An argument cannot be: a null pointer, a text that is not UTF-8, an unknown number.
    Argument = 1,
    /// No handle, one that was freed, or one of another type.
    Handle = 2,
    /// Not in this order: an access that has begun already, or has not begun.
    Order = 3,
    /// A fault of this library.
    Internal = 4,
    /// A system call failed; `system_error` is its number.
    System = 5,
    /// The machine lacks what was asked for.
    Unavailable = 6,
    /// A length, an offset or a name that does not do.
    Unsuitable = 7,
    /// The module and this library are of different releases.
    Version = 8,
    /// The descriptor is not of a dma-buf.
    NotADmabuf = 9,
    /// Memory that somebody else could shorten.
    NotSealed = 10,
    /// The bytes asked for are not all inside.
    OutOfRange = 11,
    /// Writing what is for reading only, or the reverse.
    Access = 12,
    /// It did not happen in time.
    TimedOut = 13,
    /// It belongs to the process that this one was forked from.
    Inherited = 14,
    /// The other end of the connection has gone.
    PeerGone = 15,
    /// What the other end sent breaks the protocol.
    Malformed = 16,
    /// The publisher ended the connection.
    CutOff = 17,
    /// The descriptor is not a unix socket of the seqpacket kind.
    WrongSocket = 18,
    /// Neither a regular file nor a block device.
    NotAFile = 19,
    /// The file does not do for this as it is open.
    FileMode = 20,
    /// The file took fewer bytes than it was given.
    ShortWrite = 21,
    /// No way to give the card the buffer has worked; the evidence has each.
    NotRegistered = 22,
    /// The buffer is not what was registered any more.
    Stale = 23,
    /// Anything else; the message says what.
    Other = 24,
}

impl Code {
    /// What to do where nothing better is known.
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
            Code::Malformed => "see docs/wire.md for what the other end may send",
            Code::CutOff => "connect again, and give buffers back in time",
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

/// A failure, in words.
#[derive(Debug)]
pub struct Failure {
    /// For programs.
    pub code: Code,
    /// The number that a system call returned; 0 where none failed.
    pub system_error: i32,
    /// What was tried, on what, and what came back.
    pub message: String,
    /// The call that failed, its object and its answer; empty where none did.
    pub evidence: String,
    /// What to do.
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

    /// With the call that failed as evidence.
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
            BufferError::Name { .. } => Code::Unsuitable,
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

/// The last failure of a thread. The texts are never null, and stay until the thread's next failure.
#[repr(C)]
pub struct Error {
    /// What the function returned; `PEERBUF_CODE_OK` where none has failed yet.
    pub code: Code,
    /// The number that a system call returned (errno); 0 where none failed.
    pub system_error: c_int,
    /// What was tried, on what, and what came back.
    pub message: *const c_char,
    /// The call that failed, its object and its answer; empty where none did.
    pub evidence: *const c_char,
    /// What to do.
    pub remedy: *const c_char,
}

struct Kept {
    error: Error,
    /// What the pointers point to.
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

/// Keeps a failure for [`peerbuf_last_error`].
pub(crate) fn keep(failure: Failure) -> Code {
    let code = failure.code;
    // A thread that ends has nobody left to ask.
    let _ = LAST.try_with(|last| *last.borrow_mut() = Kept::new(failure));
    code
}

/// What is known of this thread's last failure. Never null, and good until the thread's next failure.
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

// SAFETY: its pointers are to texts that nobody changes; `NONE` is the only one that is shared.
unsafe impl Sync for Error {}
