// SPDX-License-Identifier: GPL-2.0

//! `/dev/peerbuf/<BDF>`: the node of one device, and its ioctls.
//!
//! Rust's `MiscDeviceRegistration` wants a `'static` name, so the registration is made here. Who
//! may use a device is a matter of the node's permissions: 0600, root, until an administrator
//! says otherwise.

use core::ptr::NonNull;

use kernel::{
    bindings, container_of,
    error::to_result,
    ffi::*,
    prelude::*,
    str::CString,
    sync::{Arc, ArcBorrow},
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

use crate::{
    abi,
    device::{self, Device},
    ffi::Table,
    region::Place,
};

static FOPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::THIS_MODULE.as_ptr(),
    open: Some(open),
    release: Some(release),
    unlocked_ioctl: Some(ioctl),
    // The structs are the same for 32-bit callers.
    compat_ioctl: bindings::compat_ptr_ioctl,
    llseek: Some(bindings::noop_llseek),
    // SAFETY: Null function pointers are operations that the node does not have.
    ..unsafe { core::mem::zeroed() }
});

/// What a node needs at an address that stays.
struct Registration {
    misc: bindings::miscdevice,
    device: Arc<Device>,
    /// `misc` points to these two.
    _name: CString,
    _path: CString,
}

/// A registered node. Dropping it takes the node away; files that were opened stay.
///
/// # Invariants
///
/// The pointer came from `KBox::into_raw`, and its `misc` is registered.
pub(crate) struct Node(NonNull<Registration>);

// SAFETY: A registration is not tied to a thread.
unsafe impl Send for Node {}

impl Node {
    /// Registers the node of `device`.
    pub(crate) fn new(device: Arc<Device>) -> Result<Self> {
        let name = CString::try_from_fmt(fmt!("peerbuf-{}", device.name()))?;
        let path = CString::try_from_fmt(fmt!("peerbuf/{}", device.name()))?;
        let registration = KBox::new(
            Registration {
                misc: bindings::miscdevice {
                    minor: bindings::MISC_DYNAMIC_MINOR as c_int,
                    name: name.as_char_ptr(),
                    nodename: path.as_char_ptr(),
                    fops: &FOPS.0,
                    mode: 0o600,
                    // SAFETY: It is the address of a field of a valid `struct pci_dev`.
                    parent: unsafe { &raw mut (*device::raw(device.pci())).dev },
                    ..Default::default()
                },
                device,
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
}

impl Drop for Node {
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

/// `file_operations.open`, called with `misc_mtx` held, so the node is registered until it
/// returns.
unsafe extern "C" fn open(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `misc_open` has put the `miscdevice` there, which is part of a `Registration`.
    unsafe {
        let misc = (*file).private_data.cast::<bindings::miscdevice>();
        let registration: *mut Registration = container_of!(misc, Registration, misc);
        (*file).private_data = Arc::into_raw((*registration).device.clone())
            .cast_mut()
            .cast();
    }
    0
}

/// `file_operations.release`.
unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `open` has put the reference there; this is its end.
    drop(unsafe { Arc::from_raw((*file).private_data.cast_const().cast::<Device>()) });
    0
}

/// `file_operations.unlocked_ioctl`.
unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    // SAFETY: `open` has put a reference there, which lives as long as the file.
    let device = unsafe { ArcBorrow::from_raw((*file).private_data.cast_const().cast::<Device>()) };
    let arg = UserPtr::from_addr(arg as usize);
    let answer = match cmd {
        abi::IOC_QUERY => query(device, arg),
        abi::IOC_EXPORT => export(device, arg),
        _ => Err(ENOTTY),
    };
    match answer {
        Ok(()) => 0,
        Err(e) => e.to_errno() as c_long,
    }
}

fn query(device: ArcBorrow<'_, Device>, arg: UserPtr) -> Result {
    let asked: abi::Query = read_struct(arg)?;
    if asked.flags != 0 || asked.reserved != 0 {
        return Err(EINVAL);
    }
    let mut answer = device.query()?;
    // The caller's idea of the size, so that it finds its own field as it was.
    answer.size = asked.size;
    write_struct(arg, &answer)
}

fn export(device: ArcBorrow<'_, Device>, arg: UserPtr) -> Result {
    let mut request: abi::Export = read_struct(arg)?;
    let mode = request.fd_flags & bindings::O_ACCMODE;
    if request.flags & !abi::EXPORT_FLAGS != 0
        || request.fd_flags & !(bindings::O_ACCMODE | bindings::O_CLOEXEC) != 0
        || !(mode == bindings::O_RDONLY || mode == bindings::O_RDWR)
        || request.fd != 0
        || request.reserved != 0
    {
        return Err(EINVAL);
    }
    let place = match request.flags & abi::EXPORT_ANY_OFFSET != 0 {
        true if request.offset != 0 => return Err(EINVAL),
        true => Place::Any,
        false => Place::At(request.offset),
    };

    // The descriptor is published last: until then every step can be undone.
    let fd = Fd::reserve(request.fd_flags)?;
    let (dmabuf, offset) = device.export(request.bar, place, request.length, request.fd_flags)?;
    request.offset = offset;
    request.fd = fd.0 as i32;
    write_struct(arg, &request)?;
    let number = fd.0;
    core::mem::forget(fd);
    // SAFETY: The number was reserved above and is not given back any more.
    unsafe { dmabuf.install(number) };
    Ok(())
}

/// A reserved descriptor number, given back when dropped.
struct Fd(u32);

impl Fd {
    fn reserve(flags: u32) -> Result<Self> {
        // SAFETY: Called by a task on its own behalf.
        let fd = unsafe { bindings::get_unused_fd_flags(flags & bindings::O_CLOEXEC) };
        u32::try_from(fd)
            .map(Self)
            .map_err(|_| Error::from_errno(fd))
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
fn read_struct<T: FromBytes>(arg: UserPtr) -> Result<T> {
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

fn write_struct<T: AsBytes>(arg: UserPtr, value: &T) -> Result {
    UserSlice::new(arg, size_of::<T>()).writer().write(value)
}
