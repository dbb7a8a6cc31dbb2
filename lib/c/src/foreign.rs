//! Arguments and results across the C boundary: strings, file descriptors, output pointers.

use std::any::Any;
use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use peerbuf::Access;
use peerbuf::error::SystemError;

use crate::failure::{self, Code, Failure};
use crate::handle;

/// An output pointer, or null.
pub(crate) type Out<'o, T> = Option<&'o mut MaybeUninit<T>>;

/// Runs the body of an exported function. Catches panics, and stores a failure for the thread's last error.
pub(crate) fn run(work: impl FnOnce() -> Result<(), Failure>) -> Code {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => Code::Ok,
        Ok(Err(failure)) => failure::keep(failure),
        Err(panic) => failure::keep(Failure::new(Code::Internal, words(&*panic))),
    }
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("peerbuf panicked: {}", text.unwrap_or("without a word"))
}

/// As [`run`], for a function that makes an object. On a failure the output is null.
pub(crate) fn make<T: Send + Sync + 'static>(
    out: Out<'_, *mut T>,
    work: impl FnOnce() -> Result<T, Failure>,
) -> Code {
    run(|| {
        let out = place("the result", out)?;
        out.write(std::ptr::null_mut());
        out.write(handle::keep(work()?));
        Ok(())
    })
}

/// The output pointer of a required result.
pub(crate) fn place<'o, T>(what: &str, out: Out<'o, T>) -> Result<&'o mut MaybeUninit<T>, Failure> {
    out.ok_or_else(|| argument(format!("there is no place for {what}: it is null")))
}

/// The failure of an invalid argument.
pub(crate) fn argument(message: String) -> Failure {
    Failure::new(Code::Argument, message)
}

/// The bytes of a C string.
///
/// # Safety `text` is null, or valid as the crate's documentation demands, as long as the result is used.
pub(crate) unsafe fn bytes<'t>(what: &str, text: *const c_char) -> Result<&'t [u8], Failure> {
    if text.is_null() {
        return Err(argument(format!("{what} is null")));
    }
    // SAFETY: not null, so a valid string by the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
}

/// A C string, which must be UTF-8.
///
/// # Safety
/// As [`bytes`].
pub(crate) unsafe fn text<'t>(what: &str, text: *const c_char) -> Result<&'t str, Failure> {
    // SAFETY: the caller's promise is the same.
    let bytes = unsafe { bytes(what, text) }?;
    std::str::from_utf8(bytes).map_err(|error| argument(format!("{what} is not UTF-8: {error}")))
}

/// A duplicate of the descriptor `fd`.
///
/// # Safety `fd` is open or negative.
pub(crate) unsafe fn descriptor(fd: c_int) -> Result<OwnedFd, Failure> {
    if fd < 0 {
        return Err(argument(format!("{fd} is no descriptor")));
    }
    // SAFETY: `fd` is open or negative, by the caller's promise; the kernel refuses a number that is not
    // open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|error| {
        let errno = peerbuf::Errno(error.raw_os_error().unwrap_or(0));
        SystemError::new("fcntl(F_DUPFD_CLOEXEC)", format!("descriptor {fd}"), errno).into()
    })
}

/// `PEERBUF_READ`, `PEERBUF_WRITE`, or both.
pub(crate) fn access(number: u32) -> Result<Access, Failure> {
    match number {
        1 => Ok(Access::Read),
        2 => Ok(Access::Write),
        3 => Ok(Access::ReadWrite),
        other => Err(argument(format!(
            "the access is {other}, and must be 1, 2 or 3"
        ))),
    }
}

/// A time limit in milliseconds; `None` for a negative number.
pub(crate) fn limit(milliseconds: i64) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::peerbuf_last_error;

    #[test]
    fn a_panic_becomes_a_code_and_no_object() {
        let mut out = MaybeUninit::new(std::ptr::without_provenance_mut::<u32>(8));
        let code = make(Some(&mut out), || panic!("a fault of ours"));
        assert_eq!(code, Code::Internal);
        // SAFETY: it was initialised above.
        assert!(unsafe { out.assume_init() }.is_null());
        // SAFETY: the pointer is never null, and this thread has no later failure.
        let message = unsafe { CStr::from_ptr((*peerbuf_last_error()).message) };
        assert_eq!(message, c"peerbuf panicked: a fault of ours");
    }
}
