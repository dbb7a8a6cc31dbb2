// SPDX-License-Identifier: GPL-2.0

//! Common parts of the nodes under `/dev/peerbuf`: registration, ioctl structs, new file descriptors. Both
//! modules compile it, as `common.rs`.
//!
//! Rust's `MiscDeviceRegistration` needs a `'static` name, so this module registers its nodes itself. A
//! node's permissions say who may use it: 0600 and root, until an administrator changes them.

use core::{
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
};

use kernel::{
    bindings, container_of,
    error::to_result,
    ffi::*,
    prelude::*,
    str::CString,
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

use crate::ffi::{self, Table};

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

/// A struct of the interface. It grows at the end, as `copy_struct_from_user` describes.
pub(crate) trait Struct: FromBytes + AsBytes + Sized {
    /// The fewest bytes that a caller may know of it.
    const MIN_SIZE: usize;

    /// Reads a struct of which the caller knows `size` bytes; the rest is zero.
    ///
    /// Errors: EINVAL if that is less than the minimum; E2BIG if it is more than the struct and the further bytes
    /// are not zero, or more than a page; EFAULT.
    fn read(from: UserPtr, size: usize) -> Result<Self> {
        check_size::<Self>(size)?;
        let mut value = MaybeUninit::<Self>::uninit();
        let to = value.as_mut_ptr().cast();
        // SAFETY: `to` is valid for writes of as many bytes as the struct has.
        to_result(unsafe {
            ffi::peerbuf_copy_struct_from_user(to, size_of::<Self>(), from.as_const_ptr(), size)
        })?;
        // SAFETY: The call has written every byte, and every bit pattern is valid.
        Ok(unsafe { value.assume_init() })
    }

    /// Writes the struct to a caller who knows `size` bytes of it: as many, and zeros after the struct. EFAULT.
    fn write(&self, to: UserPtr, size: usize) -> Result {
        let from = ptr::from_ref(self).cast();
        // SAFETY: `from` is valid for reads of as many bytes as the struct has, without padding.
        to_result(unsafe {
            ffi::peerbuf_copy_struct_to_user(to.as_mut_ptr(), size, from, size_of::<Self>())
        })
    }
}

/// Checks the size that a caller knows of a struct; its errors are those of [`Struct::read`].
fn check_size<T: Struct>(size: usize) -> Result {
    match size {
        size if size < T::MIN_SIZE => Err(EINVAL),
        size if size > kernel::page::PAGE_SIZE => Err(E2BIG),
        _ => Ok(()),
    }
}

/// The argument of an ioctl: a struct whose first field is its size as the caller knows it.
pub(crate) struct Argument<T> {
    at: UserPtr,
    size: usize,
    value: T,
}

impl<T: Struct> Argument<T> {
    /// Reads an argument. Errors: those of [`Struct::read`].
    pub(crate) fn read(at: UserPtr) -> Result<Self> {
        let size = UserSlice::new(at, size_of::<u32>())
            .reader()
            .read::<u32>()? as usize;
        let value = T::read(at, size)?;
        Ok(Self { at, size, value })
    }

    /// Reads an argument that will be written back, checks it with `valid`, and writes it back unchanged. The write
    /// shows that the answer can be delivered, before anything irreversible happens.
    pub(crate) fn begin(at: UserPtr, valid: impl FnOnce(&T) -> bool) -> Result<Self> {
        let this = Self::read(at)?;
        if !valid(&this) {
            return Err(EINVAL);
        }
        this.answer()?;
        Ok(this)
    }

    /// Writes the argument back.
    pub(crate) fn answer(&self) -> Result {
        self.value.write(self.at, self.size)
    }

    /// Writes the answer to a request from [`Argument::begin`], which has taken effect. An error is ignored: only
    /// the caller itself can have unmapped the memory since.
    pub(crate) fn deliver(&self) {
        let _ = self.answer();
    }
}

impl<T> Deref for Argument<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Argument<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

/// An array in userspace. (peerbuf_probe.ko has none.)
#[allow(dead_code)]
pub(crate) struct List {
    at: UserPtr,
    count: usize,
    /// The size of an entry as the caller knows it.
    size: usize,
}

#[allow(dead_code)]
impl List {
    /// An array of `count` entries. Errors: those of a size, as in [`Struct::read`], unless the array is empty.
    pub(crate) fn new<T: Struct>(address: u64, count: u32, size: u32) -> Result<Self> {
        let (count, size) = (count as usize, size as usize);
        if count != 0 {
            check_size::<T>(size)?;
        }
        let at = UserPtr::from_addr(address as usize);
        Ok(Self { at, count, size })
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    fn entry(&self, index: usize) -> UserPtr {
        self.at.wrapping_byte_add(index * self.size)
    }

    /// Reads all entries. Errors: those of [`Struct::read`]; ENOMEM.
    pub(crate) fn read<T: Struct>(&self) -> Result<KVec<T>> {
        let mut list = KVec::with_capacity(self.count, GFP_KERNEL_ACCOUNT)?;
        for index in 0..self.count {
            list.push(T::read(self.entry(index), self.size)?, GFP_KERNEL_ACCOUNT)?;
        }
        Ok(list)
    }

    /// Writes the first entries. EFAULT.
    pub(crate) fn write<T: Struct>(&self, list: &[T]) -> Result {
        let mut entries = list.iter().take(self.count).enumerate();
        entries.try_for_each(|(index, entry)| entry.write(self.entry(index), self.size))
    }
}

/// Marks structs of the interface as plain bytes, and names the minimum of their size.
macro_rules! plain {
    ($($name:ty, $min:expr;)*) => {$(
        // SAFETY: The struct has only integers and arrays of integers, for which every bit pattern is valid.
        unsafe impl kernel::transmute::FromBytes for $name {}
        // SAFETY: The struct has neither padding nor pointers: the crate `peerbuf-uapi` derives
        // `bytemuck::Pod`.
        unsafe impl kernel::transmute::AsBytes for $name {}
        impl $crate::misc::Struct for $name {
            const MIN_SIZE: usize = $min;
        }
    )*};
}
pub(crate) use plain;
