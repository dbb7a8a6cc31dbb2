// SPDX-License-Identifier: GPL-2.0

//! `/dev/peerbuf/<BDF>`: the node of one device, and its ioctls.
//!
//! A node opened read-only allows queries, watches and exports of read-only dma-bufs. Exports of writable
//! dma-bufs, move, revoke and restore need a node opened for writing. A holder of only a buffer's file
//! descriptor can use the buffer, but none of these ioctls.

use kernel::{
    bindings,
    error::from_err_ptr,
    ffi::*,
    prelude::*,
    seq_file::SeqFile,
    sync::{Arc, ArcBorrow},
    uaccess::UserPtr,
};

use crate::{
    abi,
    buffer::{Left, Locked},
    common::{self, DmaBuf},
    device::{revoked, Device, Part},
    exporter,
    ffi::{self, Table},
    misc::{Argument, Fd, List, Misc},
    moves::{self, For, To},
    region::Place,
    revoke::{self, Scope},
    watch,
};

static FOPS: Table<bindings::file_operations> = Table(bindings::file_operations {
    owner: crate::compat::THIS_MODULE.as_ptr(),
    open: Some(open),
    release: Some(release),
    unlocked_ioctl: Some(ioctl),
    // The structs have the same layout for 32-bit callers.
    compat_ioctl: bindings::compat_ptr_ioctl,
    llseek: Some(bindings::noop_llseek),
    show_fdinfo: Some(show_fdinfo),
    // SAFETY: A null function pointer means that the node lacks the operation.
    ..unsafe { core::mem::zeroed() }
});

/// The registered node of a device.
pub(crate) type Node = Misc<Arc<Device>>;

/// Registers the node of `device`.
pub(crate) fn register(device: &Arc<Device>) -> Result<Node> {
    // SAFETY: `parent` is the address of a field of a valid `struct pci_dev`, and the node is dropped when
    // the device is unbound.
    unsafe {
        let parent = &raw mut (*common::raw(device.pci())).dev;
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
    // SAFETY: `open` put the reference there, and release consumes it.
    let device = unsafe { Arc::from_raw((*file).private_data.cast_const().cast::<Device>()) };
    device.each_export(|buffer| buffer.watchers.remove_all(file));
    0
}

/// `file_operations.show_fdinfo`: the exports of the device, as text.
unsafe extern "C" fn show_fdinfo(to: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: `open` put a reference there, which lives as long as the file; `to` is valid and used by this
    // task only.
    let (device, to) = unsafe {
        let device = (*file).private_data.cast_const().cast::<Device>();
        (ArcBorrow::from_raw(device), SeqFile::from_raw(to))
    };
    device.each_export(|buffer| {
        // Cannot fail: a seq_file handles overflow by itself.
        let _ = watch::print(buffer, &mut watch::Text(to));
    });
}

/// A file for a provider, which has no node. ENOMEM, ENFILE.
pub(crate) fn open_unnamed(device: Arc<Device>, flags: u32) -> Result<*mut bindings::file> {
    let device = Arc::into_raw(device);
    // SAFETY: The operations are static, and expect this private data.
    let file = from_err_ptr(unsafe {
        ffi::anon_inode_getfile(
            c"[peerbuf-provider]".as_char_ptr(),
            &FOPS.0,
            device.cast_mut().cast(),
            (flags & bindings::O_ACCMODE) as c_int,
        )
    });
    if file.is_err() {
        // SAFETY: The failed call did not take the reference over.
        drop(unsafe { Arc::from_raw(device) });
    }
    file
}

/// An open node, during an ioctl.
struct Open<'a> {
    file: *mut bindings::file,
    device: ArcBorrow<'a, Device>,
}

/// `file_operations.unlocked_ioctl`.
unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
    // SAFETY: `open` put a reference there, which lives as long as the file.
    let device = unsafe { ArcBorrow::from_raw((*file).private_data.cast_const().cast::<Device>()) };
    let node = Open { file, device };
    let arg = UserPtr::from_addr(arg as usize);
    let answer = match cmd {
        abi::IOC_QUERY => node.query(arg),
        abi::IOC_EXPORT => node.export(arg),
        abi::IOC_MOVE => node.move_buffer(arg),
        abi::IOC_REVOKE => node.revoke(arg),
        abi::IOC_RESTORE => node.restore(arg),
        abi::IOC_WATCH => node.watch(arg, true),
        abi::IOC_UNWATCH => node.watch(arg, false),
        abi::IOC_BUFFER => node.buffer(arg),
        _ => Err(ENOTTY),
    };
    match answer {
        Ok(()) => 0,
        Err(e) => e.to_errno() as c_long,
    }
}

impl Open<'_> {
    fn query(&self, arg: UserPtr) -> Result {
        let mut query = Argument::<abi::Query>::read(arg)?;
        if query.flags != 0 {
            return Err(EINVAL);
        }
        *query = abi::Query {
            size: query.size,
            ..self.device.query()?
        };
        query.answer()
    }

    fn export(&self, arg: UserPtr) -> Result {
        let mut request = Argument::<abi::Export>::read(arg)?;
        let count = request.nr_ranges as usize;
        if request.flags & !abi::EXPORT_FLAGS != 0
            || request.fd != 0
            || request.length != 0
            || count == 0
            || count > abi::MAX_RANGES
        {
            return Err(EINVAL);
        }
        self.check_fd_flags(request.fd_flags)?;
        let list = List::new::<abi::Range>(request.ranges, request.nr_ranges, request.range_size)?;
        let mut ranges: KVec<abi::Range> = list.read()?;
        let mut parts = KVec::with_capacity(count, GFP_KERNEL_ACCOUNT)?;
        for range in &ranges {
            parts.push(part(range)?, GFP_KERNEL_ACCOUNT)?;
        }

        // The descriptor is installed last: every step before that can be undone.
        let fd = Fd::reserve(request.fd_flags)?;
        let dmabuf = self
            .device
            .export(&mut parts, request.flags, request.fd_flags)?;
        for (range, part) in ranges.iter_mut().zip(&parts) {
            range.offset = part.offset;
            request.length += range.length;
        }
        request.fd = fd.number();
        list.write(&ranges)?;
        request.answer()?;
        publish(dmabuf, fd);
        Ok(())
    }

    fn move_buffer(&self, arg: UserPtr) -> Result {
        let mut request = Argument::begin(arg, |request: &abi::Move| {
            let outputs = [
                request.generation,
                request.copied,
                request.holders,
                request.fences,
                request.pages,
                request.pins,
            ];
            request.flags == 0 && request.reserved == 0 && outputs == [0; 6]
        })?;
        let to = match request.placement {
            abi::PLACEMENT_DEVICE => To::Device,
            abi::PLACEMENT_SYSTEM => To::System,
            _ => return Err(EINVAL),
        };
        self.check_writable()?;
        let dmabuf = self.get(request.fd)?;
        let len = dmabuf.len();
        let end = match request.length {
            0 => len,
            length => request.offset.checked_add(length).ok_or(EINVAL)?,
        };
        let page = kernel::page::PAGE_SIZE as u64;
        if request.offset >= end || end > len || request.offset % page != 0 || end % page != 0 {
            return Err(EINVAL);
        }
        let part = request.offset..end;
        let limit = request.timeout_ms;
        let mut left = Left::default();
        // SAFETY: The dma-buf was exported by this module and is kept; the part is page-aligned, not empty
        // and inside it.
        let moved =
            unsafe { moves::move_part(dmabuf.raw(), part, to, limit, For::Owner, &mut left) };
        match &moved {
            Ok(moved) => {
                request.generation = moved.generation;
                request.copied = moved.copied;
            }
            Err(e) if *e == EBUSY => {
                request.holders = left.holders as u64;
                request.fences = left.fences as u64;
                request.pages = left.pages as u64;
                request.pins = u64::from(left.pins);
            }
            Err(e) => return Err(*e),
        }
        request.deliver();
        moved.map(drop)
    }

    fn revoke(&self, arg: UserPtr) -> Result {
        let mut request = Argument::begin(arg, |request: &abi::Revoke| {
            let outputs = [
                request.generation,
                request.holders,
                request.fences,
                request.pages,
            ];
            request.flags & !abi::REVOKE_FLAGS == 0 && outputs == [0; 4]
        })?;
        self.check_writable()?;
        let dmabuf = self.get(request.fd)?;
        let why = match request.flags & abi::REVOKE_PERMANENT {
            0 => revoked::BY_OWNER,
            _ => revoked::BY_OWNER | revoked::PERMANENTLY,
        };
        // SAFETY: The dma-buf was exported by this module and is kept.
        let left = unsafe { revoke::revoke(dmabuf.raw(), why, Scope::Buffer, request.timeout_ms) };
        request.generation = left.generation;
        request.holders = left.holders as u64;
        request.fences = left.fences as u64;
        request.pages = left.pages as u64;
        request.deliver();
        Ok(())
    }

    fn restore(&self, arg: UserPtr) -> Result {
        let mut request = Argument::begin(arg, |request: &abi::Restore| {
            request.flags == 0 && request.reserved == 0 && request.generation == 0
        })?;
        self.check_writable()?;
        let dmabuf = self.get(request.fd)?;
        request.generation = revoke::restore(&mut dmabuf.lock(), revoked::BY_OWNER)?;
        request.deliver();
        Ok(())
    }

    fn watch(&self, arg: UserPtr, begin: bool) -> Result {
        let request = Argument::<abi::Watch>::read(arg)?;
        let events = request.events;
        if request.flags != 0 || events & !abi::EVENT_FLAGS != 0 || (events != 0) != begin {
            return Err(EINVAL);
        }
        let dmabuf = self.get(request.fd)?;
        let mut locked = dmabuf.lock();
        if !begin {
            return locked.watchers.remove(request.eventfd, self.file);
        }
        if locked.buffer().gone() {
            // A buffer that is gone has no more events, and is in no list, so closing the node would not find
            // the watcher.
            return Err(ENODEV);
        }
        let already = locked.movable();
        let eventfd = request.eventfd;
        locked.watchers.add(eventfd, self.file, events, already)
    }

    fn buffer(&self, arg: UserPtr) -> Result {
        let mut request = Argument::<abi::BufferQuery>::read(arg)?;
        if request.flags != 0 {
            return Err(EINVAL);
        }
        let asked = &*request;
        let (count, size) = (asked.nr_attachments, asked.attachment_size);
        let attachments = List::new::<abi::Attachment>(asked.attachments, count, size)?;
        let (count, size) = (asked.nr_pieces, asked.piece_size);
        let pieces = List::new::<abi::Piece>(asked.pieces, count, size)?;
        let dmabuf = self.get(request.fd)?;
        let (found, parts) = {
            let locked = dmabuf.lock();
            watch::query(&locked, &mut request);
            (
                watch::attachments(&locked, attachments.count())?,
                watch::pieces(&locked, pieces.count())?,
            )
        };
        attachments.write(&found)?;
        pieces.write(&parts)?;
        request.answer()
    }

    fn check_writable(&self) -> Result {
        // SAFETY: The ioctl holds the file open.
        unsafe { check_writable(self.file) }
    }

    fn check_fd_flags(&self, flags: u32) -> Result {
        // SAFETY: The ioctl holds the file open.
        unsafe { check_fd_flags(self.file, flags) }
    }

    /// The dma-buf behind a descriptor. EBADF; EINVAL if the descriptor is not a dma-buf of this device.
    fn get(&self, fd: i32) -> Result<Got> {
        let got = DmaBuf::get(fd)?;
        // SAFETY: The reference keeps the dma-buf. Its buffer is read only if this module made it.
        let ours = unsafe {
            exporter::is_ours(got.raw())
                && core::ptr::eq(&*exporter::buffer(got.raw()).device, &*self.device)
        };
        match ours {
            true => Ok(Got(got)),
            false => Err(EINVAL),
        }
    }
}

/// EACCES where `file` was opened read-only.
///
/// # Safety
///
/// `file` is an open file.
unsafe fn check_writable(file: *mut bindings::file) -> Result {
    // SAFETY: The file is open, by the caller's promise.
    match unsafe { (*file).f_mode } & FMODE_WRITE {
        0 => Err(EACCES),
        _ => Ok(()),
    }
}

/// Checks the flags for a new descriptor: EINVAL if unknown, EACCES for O_RDWR if `file` was opened
/// read-only.
///
/// # Safety
///
/// `file` is an open file.
pub(crate) unsafe fn check_fd_flags(file: *mut bindings::file, flags: u32) -> Result {
    if flags & !(bindings::O_ACCMODE | bindings::O_CLOEXEC) != 0 {
        return Err(EINVAL);
    }
    match flags & bindings::O_ACCMODE {
        bindings::O_RDONLY => Ok(()),
        // SAFETY: The file is open, by the caller's promise.
        bindings::O_RDWR => unsafe { check_writable(file) },
        _ => Err(EINVAL),
    }
}

/// `FMODE_WRITE`, `linux/fs.h`.
const FMODE_WRITE: c_uint = 1 << 1;

/// A reference to a dma-buf that the node's device has exported.
struct Got(DmaBuf);

impl Got {
    fn raw(&self) -> *mut bindings::dma_buf {
        self.0.raw()
    }

    fn len(&self) -> u64 {
        // SAFETY: The reference keeps the dma-buf.
        unsafe { (*self.raw()).size as u64 }
    }

    fn lock(&self) -> Locked<'_> {
        // SAFETY: The reference keeps the dma-buf, and an ioctl starts with no lock held.
        unsafe { Locked::lock(self.raw()) }
    }
}

/// Installs a new dma-buf's file under a descriptor.
fn publish(dmabuf: DmaBuf, fd: Fd) {
    // SAFETY: The dma-buf is valid. `fd_install` takes over its one reference, the file's, which `forget`
    // leaves alone.
    unsafe { fd.install((*dmabuf.raw()).file) };
    core::mem::forget(dmabuf);
}

fn part(range: &abi::Range) -> Result<Part> {
    let place = match (range.flags, range.offset, range.bar) {
        (0, offset, _) => Some(Place::At(offset)),
        (abi::RANGE_ANY_OFFSET, 0, _) => Some(Place::Any),
        (abi::RANGE_SYSTEM, 0, 0) => None,
        _ => return Err(EINVAL),
    };
    Ok(Part {
        place,
        bar: range.bar,
        len: range.length,
        offset: 0,
    })
}
