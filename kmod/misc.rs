// SPDX-License-Identifier: GPL-2.0

//! Common parts of the nodes under `/dev/peerbuf`: registration, ioctl structs, new file descriptors. Both
//! modules compile it, as `common.rs`.
//!
//! Rust's `MiscDeviceRegistration` needs a `'static` name, so this module registers its nodes itself. A
//! node's permissions say who may use it: 0600 and root, until an administrator changes them.

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

/// The data of a node that must not change its address.
struct Registration<T> {
    misc: bindings::miscdevice,
    data: T,
    /// `misc` points to both strings.
    _name: CString,
    _path: CString,
}

/// A registered node, `/dev/peerbuf/NAME`. Dropping it removes the node; open files stay open.
///
/// # Invariants
///
/// The pointer came from `KBox::into_raw`, and its `misc` is registered.
pub(crate) struct Misc<T>(NonNull<Registration<T>>);

// SAFETY: A registration is not tied to a thread.
unsafe impl<T: Send> Send for Misc<T> {}
// SAFETY: A shared reference allows no operation.
unsafe impl<T: Sync> Sync for Misc<T> {}

impl<T> Misc<T> {
    /// Registers a node. The `open` in `fops` gets the data with [`Misc::data`].
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
        // SAFETY: The registration, its strings and the operations keep their addresses until they are
        // unregistered.
        let registered = to_result(unsafe { bindings::misc_register(&raw mut (*raw).misc) });
        if let Err(e) = registered {
            // SAFETY: The pointer came from `into_raw`, and no one else uses it.
            drop(unsafe { KBox::from_raw(raw) });
            return Err(e);
        }
        // INVARIANT: `misc` was registered above.
        // SAFETY: A box is not null.
        Ok(Self(unsafe { NonNull::new_unchecked(raw) }))
    }

    /// The data of the node that is being opened. (peerbuf_probe.ko does not call it.)
    ///
    /// # Safety
    ///
    /// Called from the `open` of a node that was registered with this `T`, before `open` writes
    /// `private_data`. The result is not used after `open` returns: `misc_mtx`, held until then, keeps the
    /// node registered.
    #[allow(dead_code)]
    pub(crate) unsafe fn data<'a>(file: *mut bindings::file) -> &'a T {
        // SAFETY: `misc_open` put the `miscdevice` there, which is part of a `Registration<T>`.
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
        // SAFETY: By the type invariant `misc` is registered. When `misc_deregister` returns, no open is in
        // progress and none can begin, so no one else uses the registration.
        unsafe {
            bindings::misc_deregister(&raw mut (*raw).misc);
            drop(KBox::from_raw(raw));
        }
    }
}

/// A reserved file descriptor number. Dropping it frees the number.
pub(crate) struct Fd(u32);

impl Fd {
    /// Reserves a number. Of the flags only `O_CLOEXEC` counts.
    pub(crate) fn reserve(flags: u32) -> Result<Self> {
        // SAFETY: Changes only the current task's descriptor table.
        let fd = unsafe { bindings::get_unused_fd_flags(flags & bindings::O_CLOEXEC) };
        u32::try_from(fd)
            .map(Self)
            .map_err(|_| Error::from_errno(fd))
    }

    /// The number, for the ioctl's answer, which is written before the file is installed.
    pub(crate) fn number(&self) -> i32 {
        self.0 as i32
    }

    /// Installs a file under the number.
    ///
    /// # Safety
    ///
    /// The file is valid, and the caller gives up one reference to it.
    pub(crate) unsafe fn install(self, file: *mut bindings::file) {
        // SAFETY: The file is valid, by the caller's promise. The number is reserved, and `forget` keeps it
        // so.
        unsafe { bindings::fd_install(self.0, file) };
        core::mem::forget(self);
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: `reserve` reserved the number, and no file was installed.
        unsafe { bindings::put_unused_fd(self.0) };
    }
}

/// Reads an ioctl struct, whose first field is its size as the caller knows it.
///
/// Errors: EFAULT; EINVAL if the size is smaller than the struct; E2BIG if it is larger and the additional
/// bytes are not all zero, or larger than a page.
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

/// Reads a struct that will be written back, checks it with `valid`, and writes it back unchanged. The write
/// shows that the answer can be delivered, before anything irreversible happens.
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

/// Writes the answer to a request from [`begin`], which has taken effect. An error is ignored: only the
/// caller itself can have unmapped the memory since.
pub(crate) fn deliver<T: AsBytes>(arg: UserPtr, answer: &T) {
    let _ = write_struct(arg, answer);
}

/// Writes an ioctl struct back to the address it was read from.
pub(crate) fn write_struct<T: AsBytes>(arg: UserPtr, value: &T) -> Result {
    UserSlice::new(arg, size_of::<T>()).writer().write(value)
}

/// Marks ioctl structs as plain bytes.
macro_rules! plain {
    ($($name:ty)*) => {$(
        // SAFETY: The struct has only integers and arrays of integers, for which every bit pattern is valid.
        unsafe impl kernel::transmute::FromBytes for $name {}
        // SAFETY: The struct has neither padding nor pointers: the crate `peerbuf-uapi` derives
        // `bytemuck::Pod`.
        unsafe impl kernel::transmute::AsBytes for $name {}
    )*};
}
pub(crate) use plain;
