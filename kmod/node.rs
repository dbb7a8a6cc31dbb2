// SPDX-License-Identifier: GPL-2.0

//! `/dev/peerbuf/<BDF>`: the node of one device, and its ioctls.

use kernel::{
    bindings,
    ffi::*,
    prelude::*,
    sync::{Arc, ArcBorrow},
    uaccess::UserPtr,
};

use crate::{
    abi,
    device::{self, Device},
    ffi::Table,
    misc::{read_struct, write_struct, Fd, Misc},
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

/// The registered node of a device.
pub(crate) type Node = Misc<Arc<Device>>;

/// Registers the node of `device`.
pub(crate) fn register(device: &Arc<Device>) -> Result<Node> {
    // SAFETY: It is the address of a field of a valid `struct pci_dev`, and the node goes when the
    // device is unbound.
    unsafe {
        let parent = &raw mut (*device::raw(device.pci())).dev;
        Misc::register(device.name(), parent, &FOPS, device.clone())
    }
}

/// `file_operations.open`.
unsafe extern "C" fn open(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
    // SAFETY: `misc_open` calls this for a node that `register` made.
    unsafe {
        let device: &Arc<Device> = Node::data(file);
        (*file).private_data = Arc::into_raw(device.clone()).cast_mut().cast();
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
    request.fd = fd.number();
    write_struct(arg, &request)?;
    // SAFETY: The number was reserved above and is not given back any more.
    unsafe { dmabuf.install(fd.into_number()) };
    Ok(())
}
