//! Failures as Python's exceptions, and arguments as Rust's values.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use library::Access;
use library::error::{ShareError, SystemError};
use peerbuf_c::failure::Failure;
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::{create_exception, ffi};

create_exception!(
    peerbuf,
    Error,
    PyException,
    "A failure: `code`, `evidence`, `remedy`, `errno`."
);

/// `NotSealed` as `not-sealed`.
fn kebab(name: &str) -> String {
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push('-');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

pub fn raise(failure: impl Into<Failure>) -> PyErr {
    let failure = failure.into();
    let error = Error::new_err(failure.message);
    let told = Python::attach(|py| {
        let value = error.value(py);
        value.setattr("code", kebab(&format!("{:?}", failure.code)))?;
        value.setattr("evidence", failure.evidence)?;
        value.setattr("remedy", failure.remedy)?;
        value.setattr("errno", failure.system_error)
    });
    told.err().unwrap_or(error)
}

/// Runs what may wait without holding up Python's other threads.
pub fn work<T: Send, E: Into<Failure> + Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> PyResult<T> {
    py.detach(work).map_err(raise)
}

/// Waits in pieces, since a signal's handler runs between them only: without, nobody could interrupt the program.
pub fn patiently<T: Send>(
    py: Python<'_>,
    limit: Option<Duration>,
    wait: impl Fn(Duration) -> Result<T, ShareError> + Sync,
) -> PyResult<T> {
    const PIECE: Duration = Duration::from_millis(100);
    let begun = Instant::now();
    loop {
        let left = limit.map(|limit| limit.saturating_sub(begun.elapsed()));
        let piece = left.map_or(PIECE, |left| left.min(PIECE));
        match py.detach(|| wait(piece)) {
            Err(ShareError::TimedOut { .. }) if left != Some(piece) => py.check_signals()?,
            done => return done.map_err(raise),
        }
    }
}

pub fn access(text: &str) -> PyResult<Access> {
    match text {
        "r" => Ok(Access::Read),
        "w" => Ok(Access::Write),
        "rw" => Ok(Access::ReadWrite),
        other => {
            let message = format!("the access is {other:?}, and must be 'r', 'w' or 'rw'");
            Err(PyValueError::new_err(message))
        }
    }
}

pub fn seconds(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|error| PyValueError::new_err(format!("{seconds} seconds: {error}")))
}

pub fn limit(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    timeout.map(seconds).transpose()
}

/// A descriptor of this library's own for what the caller's is of: a number, or an object with `fileno()`.
pub fn descriptor(of: &Bound<'_, PyAny>) -> PyResult<OwnedFd> {
    // SAFETY: called with the interpreter attached, on a live object.
    let fd = unsafe { ffi::PyObject_AsFileDescriptor(of.as_ptr()) };
    if fd < 0 {
        return Err(PyErr::fetch(of.py()));
    }
    // SAFETY: used for this call only; a number that is not open is refused by the kernel.
    let theirs = unsafe { BorrowedFd::borrow_raw(fd) };
    theirs.try_clone_to_owned().map_err(|error| {
        let errno = library::Errno(error.raw_os_error().unwrap_or(0));
        raise(SystemError::new(
            "fcntl(F_DUPFD_CLOEXEC)",
            format!("descriptor {fd}"),
            errno,
        ))
    })
}
