//! Files and block devices, and reports of transfers.

use std::ffi::{CString, OsStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

use peerbuf::buffer::BufferRange;
use peerbuf::import::file::FileImporter;
use peerbuf::plan::{Direction, Path, Plan};
use peerbuf::transfer::Receipt;
use serde_json::json;

use crate::buffer::Buffer;
use crate::failure::{Code, Failure};
use crate::foreign::{argument, bytes, descriptor, make, place, run, text};
use crate::handle::{free, get};

/// Path: the CPU copies through a bounce buffer.
pub const PEERBUF_STAGED_COPY: u32 = 1;
/// Path: both ends use the same pages of system memory.
pub const PEERBUF_SHARED_HOST_MEMORY: u32 = 2;
/// Path: the disk accesses the buffer's memory directly.
pub const PEERBUF_PEER_TO_PEER: u32 = 3;
/// Direction: from the file to the buffer.
pub const PEERBUF_DISK_TO_BUFFER: u32 = 1;
/// Direction: from the buffer to the file.
pub const PEERBUF_BUFFER_TO_DISK: u32 = 2;

/// An open file or block device.
pub struct File(FileImporter);

/// The result of a transfer, or of a plan.
pub struct Report {
    path: Path,
    bytes: u64,
    host_bytes: u64,
    json: CString,
}

impl Report {
    pub(crate) fn plan(plan: &Plan) -> Report {
        Report::of(plan, 0, 0)
    }

    fn receipt(receipt: &Receipt) -> Report {
        Report::of(&receipt.plan, receipt.bytes, receipt.host_bytes)
    }

    fn of(plan: &Plan, bytes: u64, host_bytes: u64) -> Report {
        let reasons = plan.reasons.iter().map(|reason| {
            json!({
                "path": reason.path.as_str(),
                "code": reason.code.as_str(),
                "evidence": reason.evidence,
            })
        });
        let json = json!({
            "path": plan.path.as_str(),
            "bytes": bytes,
            "host_bytes": host_bytes,
            "reasons": reasons.collect::<Vec<_>>(),
        });
        Report {
            path: plan.path,
            bytes,
            host_bytes,
            // JSON contains no zero bytes.
            json: CString::new(json.to_string()).unwrap_or_default(),
        }
    }
}

/// The contents of a report. The texts are valid until the report is freed.
#[repr(C)]
pub struct ReportInfo {
    /// The path: PEERBUF_STAGED_COPY, PEERBUF_SHARED_HOST_MEMORY or PEERBUF_PEER_TO_PEER.
    pub path: u32,
    /// The path's name.
    pub path_name: *const c_char,
    /// The number of bytes moved; 0 in a plan. Fewer than requested only at the end of a file that was read.
    pub bytes: u64,
    /// The number of those bytes that passed through system memory.
    pub host_bytes: u64,
    /// All of it, with the reason against each better path, as JSON: {"path": ..., "bytes": ...,
    /// "host_bytes": ..., "reasons": [{"path": ..., "code": ..., "evidence": ...}]}.
    pub json: *const c_char,
}

/// Opens an existing file or block device for PEERBUF_READ, PEERBUF_WRITE or both.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_open(
    path: *const c_char,
    access: u32,
    file: Option<&mut MaybeUninit<*mut File>>,
) -> Code {
    make(file, || {
        // SAFETY: the caller passes a valid string, as the crate's documentation demands.
        let path = OsStr::from_bytes(unsafe { bytes("the path", path) }?);
        let access = crate::foreign::access(access)?;
        Ok(File(FileImporter::open_for(path, access)?))
    })
}

/// Takes an open file. The caller keeps the descriptor; its position and flags do not change.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_from_descriptor(
    fd: c_int,
    name: *const c_char,
    file: Option<&mut MaybeUninit<*mut File>>,
) -> Code {
    make(file, || {
        // SAFETY: the caller passes a valid string and a descriptor, as the crate's documentation demands.
        let (fd, name) = unsafe { (descriptor(fd)?, text("the name", name)?) };
        Ok(File(FileImporter::from_fd(fd, name)?))
    })
}

/// Returns the current size in bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_size(
    file: *const File,
    size: Option<&mut MaybeUninit<u64>>,
) -> Code {
    run(|| {
        let bytes = get(file)?.0.size()?;
        place("the size", size)?.write(bytes);
        Ok(())
    })
}

/// Makes written bytes durable (fdatasync).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_sync(file: *const File) -> Code {
    run(|| Ok(get(file)?.0.sync()?))
}

/// Runs an operation on a file and a range of a buffer, and stores a report unless `report` is null.
fn with(
    file: *const File,
    buffer: *const Buffer,
    (offset, length): (u64, u64),
    report: Option<&mut MaybeUninit<*mut Report>>,
    work: impl FnOnce(&FileImporter, &BufferRange) -> Result<Report, Failure>,
) -> Code {
    let done = || {
        let (file, buffer) = (get(file)?, get(buffer)?);
        let range = buffer.range(offset, length)?;
        work(&file.0, &range)
    };
    match report {
        Some(report) => make(Some(report), done),
        None => run(|| done().map(drop)),
    }
}

/// Reads the file from `file_offset` into a range of a buffer, up to the end of the file. `length` may be
/// PEERBUF_ANY. `report` gets a report; it may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_read(
    file: *const File,
    file_offset: u64,
    buffer: *const Buffer,
    offset: u64,
    length: u64,
    report: Option<&mut MaybeUninit<*mut Report>>,
) -> Code {
    with(file, buffer, (offset, length), report, |file, range| {
        Ok(Report::receipt(&file.attach(range)?.read(file_offset)?))
    })
}

/// Writes a range of a buffer to the file at `file_offset`; otherwise as `peerbuf_file_read`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_write(
    file: *const File,
    file_offset: u64,
    buffer: *const Buffer,
    offset: u64,
    length: u64,
    report: Option<&mut MaybeUninit<*mut Report>>,
) -> Code {
    with(file, buffer, (offset, length), report, |file, range| {
        Ok(Report::receipt(&file.attach(range)?.write(file_offset)?))
    })
}

/// Returns the path that a transfer would take, in PEERBUF_DISK_TO_BUFFER or PEERBUF_BUFFER_TO_DISK. The
/// first call for a pair of devices proves the path; no one else may use the range meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_plan(
    file: *const File,
    file_offset: u64,
    buffer: *const Buffer,
    offset: u64,
    length: u64,
    direction: u32,
    report: Option<&mut MaybeUninit<*mut Report>>,
) -> Code {
    with(file, buffer, (offset, length), report, |file, range| {
        let direction = match direction {
            PEERBUF_DISK_TO_BUFFER => Direction::DiskToBuffer,
            PEERBUF_BUFFER_TO_DISK => Direction::BufferToDisk,
            other => return Err(argument(format!("{other} is no direction"))),
        };
        Ok(Report::plan(
            &file.attach(range)?.plan(direction, file_offset)?,
        ))
    })
}

/// Closes and frees a file. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_file_free(file: *mut File) -> Code {
    run(|| free(file))
}

/// Returns the contents of a report.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_report_get(
    report: *const Report,
    info: Option<&mut MaybeUninit<ReportInfo>>,
) -> Code {
    run(|| {
        let report = get(report)?;
        let (path, path_name) = match report.path {
            Path::StagedCopy => (PEERBUF_STAGED_COPY, c"staged-copy"),
            Path::SharedHostMemory => (PEERBUF_SHARED_HOST_MEMORY, c"shared-host-memory"),
            Path::PeerToPeer => (PEERBUF_PEER_TO_PEER, c"peer-to-peer"),
        };
        place("what it says", info)?.write(ReportInfo {
            path,
            path_name: path_name.as_ptr(),
            bytes: report.bytes,
            host_bytes: report.host_bytes,
            json: report.json.as_ptr(),
        });
        Ok(())
    })
}

/// Frees a report. Null does nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peerbuf_report_free(report: *mut Report) -> Code {
    run(|| free(report))
}
