// SPDX-License-Identifier: GPL-2.0

//! What every node under `/dev/peerbuf` needs: its registration, the structs that its ioctls read
//! and write, and new descriptor numbers. Part of both modules, as `common.rs`.
//!
//! Rust's `MiscDeviceRegistration` wants a `'static` name, so the registration is made here. Who
//! may use a node is a matter of its permissions: 0600, root, until an administrator says
//! otherwise.

use core::ptr::NonNull;

use kernel::{
    bindings, container_of,
    error::to_result,
    ffi::*,
    prelude::*,
    str::CString,
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

use crate::ffi::Table;

/// What a node needs at an address that stays.
struct Registration<T> {
    misc: bindings::miscdevice,
    data: T,
    /// `misc` points to these two.
    _name: CString,
    _path: CString,
}

/// A registered node, `/dev/peerbuf/NAME`. Dropping it takes the node away; files that were opened
/// stay.
///
/// # Invariants
///
/// The pointer came from `KBox::into_raw`, and its `misc` is registered.
pub(crate) struct Misc<T>(NonNull<Registration<T>>);

// SAFETY: A registration is not tied to a thread.
unsafe impl<T: Send> Send for Misc<T> {}
// SAFETY: There is nothing to be done with a shared one.
unsafe impl<T: Sync> Sync for Misc<T> {}

impl<T> Misc<T> {
    /// Registers the node with its operations, whose `open` finds the data by [`Misc::data`].
    ///
    /// # Safety
    ///
    /// `parent` is null, or a device that outlives the node.
    pub(crate) unsafe fn register(
        name: &CStr,
        parent: *mut bindings::device,
        fops: &'static Table<bindings::file_operations>,
        data: T,
    ) -> Result<Self> {
        let path = CString::try_from_fmt(fmt!("peerbuf/{}", name))?;
        let name = CString::try_from_fmt(fmt!("peerbuf-{}", name))?;
        let registration = KBox::new(
            Registration {
                misc: bindings::miscdevice {
                    minor: bindings::MISC_DYNAMIC_MINOR as c_int,
                    name: name.as_char_ptr(),
                    nodename: path.as_char_ptr(),
                    fops: &fops.0,
                    mode: 0o600,
                    parent,
                    ..Default::default()
                },
                data,
                _name: name,
                _path: path,
            },
            GFP_KERNEL,
        )?;
        let raw = KBox::into_raw(registration);
        // SAFETY: The registration stays where it is until it is unregistered, and so do the
        // strings and the operations that it points to.
        let registered = to_result(unsafe { bindings::misc_register(&raw mut (*raw).misc) });
        if let Err(e) = registered {
            // SAFETY: It came from `into_raw`, and nobody else has it.
            drop(unsafe { KBox::from_raw(raw) });
            return Err(e);
        }
        // INVARIANT: Registered above.
        // SAFETY: A box is not null.
        Ok(Self(unsafe { NonNull::new_unchecked(raw) }))
    }

    /// The data of the node that is being opened. (That of the importer has none.)
    ///
    /// # Safety
    ///
    /// Called from the `open` of a node that was registered with this `T`, before it writes
    /// `private_data`. The result is not used when `open` has returned: until then `misc_mtx` is
    /// held, so that the node is registered.
    #[allow(dead_code)]
    pub(crate) unsafe fn data<'a>(file: *mut bindings::file) -> &'a T {
        // SAFETY: `misc_open` has put the `miscdevice` there, which is part of a `Registration`.
        unsafe {
            let misc = (*file).private_data.cast::<bindings::miscdevice>();
            let registration: *mut Registration<T> = container_of!(misc, Registration<T>, misc);
            &(*registration).data
        }
    }
}

impl<T> Drop for Misc<T> {
    fn drop(&mut self) {
        let raw = self.0.as_ptr();
        // SAFETY: By the type invariant. When the first call returns, no open is under way and
        // none can begin, so nobody else uses the registration.
        unsafe {
            bindings::misc_deregister(&raw mut (*raw).misc);
            drop(KBox::from_raw(raw));
        }
    }
}

/// A reserved descriptor number, given back when dropped.
pub(crate) struct Fd(u32);

impl Fd {
    /// Reserves one; of the flags only `O_CLOEXEC` matters.
    pub(crate) fn reserve(flags: u32) -> Result<Self> {
        // SAFETY: Called by a task on its own behalf.
        let fd = unsafe { bindings::get_unused_fd_flags(flags & bindings::O_CLOEXEC) };
        u32::try_from(fd)
            .map(Self)
            .map_err(|_| Error::from_errno(fd))
    }

    /// The number, as it is written to the user before the file is there.
    pub(crate) fn number(&self) -> i32 {
        self.0 as i32
    }

    /// Publishes a file under the number.
    ///
    /// # Safety
    ///
    /// The file is valid, and takes a reference of the caller's along.
    pub(crate) unsafe fn install(self, file: *mut bindings::file) {
        // SAFETY: By the caller's promise; the number was reserved, and is not given back any more.
        unsafe { bindings::fd_install(self.0, file) };
        core::mem::forget(self);
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: Reserved by `reserve` and not installed.
        unsafe { bindings::put_unused_fd(self.0) };
    }
}

/// Reads a struct of the interface, whose first field is its size as the caller knows it.
///
/// Errors: EFAULT; EINVAL for a size below the struct's, which so far has only had one; E2BIG for
/// one above it with bytes that are not zero, or above a page.
pub(crate) fn read_struct<T: FromBytes>(arg: UserPtr) -> Result<T> {
    let size = UserSlice::new(arg, size_of::<u32>())
        .reader()
        .read::<u32>()? as usize;
    if size < size_of::<T>() {
        return Err(EINVAL);
    }
    if size > kernel::page::PAGE_SIZE {
        return Err(E2BIG);
    }
    let mut reader = UserSlice::new(arg, size).reader();
    let value = reader.read::<T>()?;
    while !reader.is_empty() {
        if reader.read::<u8>()? != 0 {
            return Err(E2BIG);
        }
    }
    Ok(value)
}

/// Reads a struct that will be written back, after `valid` has looked at it. Writing it back as it
/// was shows that the answer can be delivered, before anything is done that cannot be undone.
pub(crate) fn begin<T: FromBytes + AsBytes>(
    arg: UserPtr,
    valid: impl FnOnce(&T) -> bool,
) -> Result<T> {
    let request = read_struct(arg)?;
    if !valid(&request) {
        return Err(EINVAL);
    }
    write_struct(arg, &request)?;
    Ok(request)
}

/// The answer to what [`begin`] has begun and what is done by now. If the memory went away since, the
/// answer is missed by nobody but who took it away.
pub(crate) fn deliver<T: AsBytes>(arg: UserPtr, answer: &T) {
    let _ = write_struct(arg, answer);
}

/// Writes a struct of the interface back to where it was read.
pub(crate) fn write_struct<T: AsBytes>(arg: UserPtr, value: &T) -> Result {
    UserSlice::new(arg, size_of::<T>()).writer().write(value)
}

/// Says of structs of the interface that they are plain bytes.
macro_rules! plain {
    ($($name:ty)*) => {$(
        // SAFETY: Only integers and arrays of integers, for which every bit pattern is valid.
        unsafe impl kernel::transmute::FromBytes for $name {}
        // SAFETY: No padding and no pointers: the crate `peerbuf-uapi` derives `bytemuck::Pod`.
        unsafe impl kernel::transmute::AsBytes for $name {}
    )*};
}
pub(crate) use plain;
