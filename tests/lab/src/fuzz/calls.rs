//! The calls of the fuzzer, and their allowed results.

use std::sync::atomic::{AtomicU64, Ordering};

use peerbuf_uapi::{self as abi, probe};

/// A kind of call.
pub struct Call {
    /// The name.
    pub name: &'static str,
    /// The ioctl number; zero for other calls.
    pub number: u32,
    /// Allowed errnos in addition to [`ALWAYS`].
    errnos: &'static [i32],
    /// True if a run without a success of this call has tested nothing.
    pub must_succeed: bool,
}

/// Errnos allowed for every call: the fuzzer passes descriptors that are closed, or refer to another file by
/// now, and invalid addresses.
const ALWAYS: &[i32] = &[
    libc::EBADF,
    libc::ENOTTY,
    libc::EINVAL,
    libc::EFAULT,
    libc::E2BIG,
    libc::ENOMEM,
];

const fn ioctl(name: &'static str, number: u32, errnos: &'static [i32]) -> Call {
    Call {
        name,
        number,
        errnos,
        must_succeed: true,
    }
}

const fn other(name: &'static str, errnos: &'static [i32], must_succeed: bool) -> Call {
    Call {
        name,
        number: 0,
        errnos,
        must_succeed,
    }
}

macro_rules! calls {
    ($($name:ident = $call:expr;)*) => {
        calls!(@index 0usize; $($name)*);
        /// All kinds of calls. The constants are indices into this list.
        pub const CALLS: &[Call] = &[$($call),*];
    };
    (@index $at:expr; $name:ident $($rest:ident)*) => {
        #[allow(missing_docs)]
        pub const $name: usize = $at;
        calls!(@index $at + 1; $($rest)*);
    };
    (@index $at:expr;) => {};
}

use libc::{
    EACCES, EAGAIN, EALREADY, EBUSY, EINTR, EIO, EMFILE, ENOBUFS, ENODATA, ENODEV, ENOENT, ENOSPC,
    ENOTCONN, ENXIO, EOPNOTSUPP, EOVERFLOW, EREMOTEIO, ESPIPE, ETIMEDOUT, EUNATCH,
};

/// An exporter's allowed errnos for a map.
const MAPPING: &[i32] = &[
    EACCES, EBUSY, ENOTCONN, EINTR, ETIMEDOUT, ENODEV, EREMOTEIO, EOPNOTSUPP,
];

calls! {
    QUERY = ioctl("QUERY", abi::IOC_QUERY, &[ENODEV, EAGAIN]);
    EXPORT = ioctl("EXPORT", abi::IOC_EXPORT,
        &[EOVERFLOW, EOPNOTSUPP, EBUSY, ENOSPC, ENODEV, EAGAIN, EACCES, EMFILE]);
    MOVE = ioctl("MOVE", abi::IOC_MOVE, &[EBUSY, EOPNOTSUPP, ENODEV, EACCES, EINTR]);
    REVOKE = ioctl("REVOKE", abi::IOC_REVOKE, &[ENODEV, EACCES]);
    RESTORE = ioctl("RESTORE", abi::IOC_RESTORE, &[EBUSY, EALREADY, ENODEV, EACCES]);
    WATCH = ioctl("WATCH", abi::IOC_WATCH, &[ENOSPC, ENODEV]);
    UNWATCH = ioctl("UNWATCH", abi::IOC_UNWATCH, &[ENOENT, ENODEV]);
    PROVIDER_OPEN = ioctl("PROVIDER_OPEN", abi::IOC_PROVIDER_OPEN,
        &[ENXIO, EUNATCH, ENODEV, EOPNOTSUPP, ENOSPC, EINTR, EACCES, EMFILE]);
    BUFFER = ioctl("BUFFER", abi::IOC_BUFFER, &[]);
    ATTACH = ioctl("ATTACH", probe::IOC_ATTACH,
        &[ENXIO, EUNATCH, EMFILE, EOPNOTSUPP, ENODEV, EREMOTEIO, EBUSY, EINTR]);
    MAP = ioctl("MAP", probe::IOC_MAP, MAPPING);
    UNMAP = ioctl("UNMAP", probe::IOC_UNMAP, &[ENOENT]);
    PIN = ioctl("PIN", probe::IOC_PIN, &[EBUSY, ENOTCONN, ENODEV]);
    UNPIN = ioctl("UNPIN", probe::IOC_UNPIN, &[ENOENT, EBUSY, ENOTCONN]);
    FENCE = ioctl("FENCE", probe::IOC_FENCE, &[EBUSY, ENOTCONN]);
    SIGNAL = ioctl("SIGNAL", probe::IOC_SIGNAL, &[ENOENT]);
    VMAP = ioctl("VMAP", probe::IOC_VMAP, MAPPING);
    VUNMAP = ioctl("VUNMAP", probe::IOC_VUNMAP, &[ENOENT]);
    DETACH = ioctl("DETACH", probe::IOC_DETACH, &[ENOTCONN]);
    IMPORT_QUERY = ioctl("IMPORT_QUERY", probe::IOC_QUERY, &[]);
    SYNC = ioctl("DMA_BUF_SYNC", 0x4008_6200, &[ENODEV, EINTR]);
    SET_NAME = ioctl("DMA_BUF_SET_NAME", 0x4008_6201, &[]);
    EXPORT_SYNC_FILE = ioctl("DMA_BUF_EXPORT_SYNC_FILE", 0xc008_6202, &[EMFILE]);
    IMPORT_SYNC_FILE = ioctl("DMA_BUF_IMPORT_SYNC_FILE", 0x4008_6203, &[]);
    NO_IOCTL = other("an ioctl that does not exist", &[], false);
    OPEN = other("open", &[ENOENT, ENODEV, ENXIO], true);
    CLOSE = other("close", &[], true);
    MMAP = other("mmap", &[ENODEV, EACCES], true);
    MUNMAP = other("munmap", &[], true);
    // EAGAIN: another thread has filled or emptied the pipe.
    TOUCH = other("touch a mapping", &[EAGAIN], true);
    READ_DISK = other("direct read", &[EIO, EREMOTEIO, ENODATA, EOPNOTSUPP], true);
    WRITE_DISK = other("direct write", &[EIO, EREMOTEIO, ENODATA, EOPNOTSUPP], true);
    POLL = other("poll", &[EINTR], true);
    SEEK = other("lseek", &[ESPIPE], true);
    FDINFO = other("fdinfo", &[ENOENT, ENOBUFS], true);
}

impl Call {
    /// Whether the errno is allowed.
    pub fn may_answer(&self, errno: i32) -> bool {
        errno == 0 || ALWAYS.contains(&errno) || self.errnos.contains(&errno)
    }
}

/// The errnos from 0, which means success, to the last that has a name.
pub const ERRNOS: usize = 134;

/// The number of results of each call, by errno. Lives in zeroed memory that processes share.
#[repr(C)]
pub struct Counts([[AtomicU64; ERRNOS]; CALLS.len()]);

impl Counts {
    /// Counts a result.
    pub fn add(&self, call: usize, errno: i32) {
        let errno = usize::try_from(errno).unwrap_or(ERRNOS).min(ERRNOS - 1);
        self.0[call][errno].fetch_add(1, Ordering::Relaxed);
    }

    /// The number of all results.
    pub fn all(&self) -> u64 {
        (0..CALLS.len()).map(|call| self.of(call)).sum()
    }

    /// The number of results of one kind of call.
    pub fn of(&self, call: usize) -> u64 {
        let counts = self.0[call].iter();
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }

    /// The number of successes of one kind of call.
    pub fn succeeded(&self, call: usize) -> u64 {
        self.0[call][0].load(Ordering::Relaxed)
    }

    /// A line for each call.
    pub fn table(&self) -> String {
        let mut text = format!("{:<30} {:>9} {:>9}  errnos\n", "call", "made", "done");
        for (call, about) in CALLS.iter().enumerate() {
            let failed: Vec<String> = (1..ERRNOS)
                .filter_map(|errno| {
                    let count = self.0[call][errno].load(Ordering::Relaxed);
                    let name = peerbuf::Errno(errno as i32);
                    let name = name.name().map_or(format!("{errno}"), str::to_owned);
                    (count != 0).then(|| format!("{name} {count}"))
                })
                .collect();
            text += &format!(
                "{:<30} {:>9} {:>9}  {}\n",
                about.name,
                self.of(call),
                self.succeeded(call),
                failed.join(", ")
            );
        }
        text + &format!("{:<30} {:>9}\n", "all", self.all())
    }
}
