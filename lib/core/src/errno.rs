//! Error numbers with their symbolic names.
//!
//! The kernel's internal numbers, from 512 on, are not meant for userspace, and no C library names them. But
//! drivers leak them (most often 524), so they are named here. libfabric has its own numbers from 256 on,
//! which the kernel does not use. Tools pass on 800 and 801 of CUDA and HIP as if they were system errors.

use std::fmt;

/// An error number of a system call, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// `EPERM`: not allowed.
    pub const PERM: Errno = Errno(libc::EPERM);
    /// `ENOENT`: no such file.
    pub const NOENT: Errno = Errno(libc::ENOENT);
    /// `EINTR`: a signal came first.
    pub const INTR: Errno = Errno(libc::EINTR);
    /// `EIO`: I/O error.
    pub const IO: Errno = Errno(libc::EIO);
    /// `ENXIO`: no such device or address.
    pub const NXIO: Errno = Errno(libc::ENXIO);
    /// `EBADF`: not an open descriptor, or opened for other access.
    pub const BADF: Errno = Errno(libc::EBADF);
    /// `EAGAIN`: try again later.
    pub const AGAIN: Errno = Errno(libc::EAGAIN);
    /// `ENOMEM`: out of memory, or over a limit.
    pub const NOMEM: Errno = Errno(libc::ENOMEM);
    /// `EACCES`: no permission.
    pub const ACCES: Errno = Errno(libc::EACCES);
    /// `EFAULT`: memory that the kernel cannot use for this call.
    pub const FAULT: Errno = Errno(libc::EFAULT);
    /// `EBUSY`: in use.
    pub const BUSY: Errno = Errno(libc::EBUSY);
    /// `ENODEV`: no such device, or the device is gone.
    pub const NODEV: Errno = Errno(libc::ENODEV);
    /// `EINVAL`: invalid argument, or a route that the kernel refuses.
    pub const INVAL: Errno = Errno(libc::EINVAL);
    /// `ENOTTY`: the descriptor does not have this ioctl.
    pub const NOTTY: Errno = Errno(libc::ENOTTY);
    /// `ENOSPC`: no space left.
    pub const NOSPC: Errno = Errno(libc::ENOSPC);
    /// `ETIME`: timed out.
    pub const TIME: Errno = Errno(libc::ETIME);
    /// `ELIBACC`: a shared library cannot be opened.
    pub const LIBACC: Errno = Errno(libc::ELIBACC);
    /// `EUNATCH`: the driver is not attached.
    pub const UNATCH: Errno = Errno(libc::EUNATCH);
    /// `EPROTONOSUPPORT`: the kernel or the driver lacks the interface.
    pub const PROTONOSUPPORT: Errno = Errno(libc::EPROTONOSUPPORT);
    /// `EOPNOTSUPP`: the operation is not supported.
    pub const OPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    /// `EADDRNOTAVAIL`: no such address.
    pub const ADDRNOTAVAIL: Errno = Errno(libc::EADDRNOTAVAIL);
    /// `ENETDOWN`: the network is down.
    pub const NETDOWN: Errno = Errno(libc::ENETDOWN);
    /// `ENOTCONN`: not connected.
    pub const NOTCONN: Errno = Errno(libc::ENOTCONN);
    /// `EREMOTEIO`: newer block layers refuse peer-to-peer memory with it.
    pub const REMOTEIO: Errno = Errno(libc::EREMOTEIO);
    /// `ENOTSUPP`, kernel-internal: not supported.
    pub const NOTSUPP: Errno = Errno(524);

    /// The symbolic name, such as `EINVAL`; `None` for a number without one.
    pub fn name(self) -> Option<&'static str> {
        let mut all = NAMES.iter().chain(OTHERS);
        all.find(|(number, _)| *number == self.0)
            .map(|(_, name)| *name)
    }

    /// The corresponding kind of [`std::io::Error`].
    pub fn kind(self) -> std::io::ErrorKind {
        std::io::Error::from_raw_os_error(self.0).kind()
    }

    /// True for the kernel-internal numbers.
    pub fn is_kernel_internal(self) -> bool {
        (512..=531).contains(&self.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) if self.is_kernel_internal() => {
                write!(f, "{name} (error {}, internal to the kernel)", self.0)
            }
            Some(name) if name.starts_with("FI_") => {
                write!(f, "{name} (error {}, libfabric's own)", self.0)
            }
            Some(name) if name.starts_with("CUDA_") => {
                write!(f, "{name} (error {}, CUDA's and HIP's own)", self.0)
            }
            Some(name) => {
                let text = std::io::Error::from_raw_os_error(self.0).to_string();
                // std appends the number, which the name already says.
                let text = text.split(" (os error").next().unwrap_or_default();
                write!(f, "{name} ({text})")
            }
            None => write!(f, "error {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name().unwrap_or("Errno"))?;
        write!(f, "({})", self.0)
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Self {
        Errno(errno.raw_os_error())
    }
}

impl From<&std::io::Error> for Errno {
    /// An error without an OS error number becomes [`Errno::IO`].
    fn from(error: &std::io::Error) -> Self {
        error.raw_os_error().map_or(Errno::IO, Errno)
    }
}

macro_rules! names {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

/// The C library's numbers.
const NAMES: &[(i32, &str)] = names! {
    EPERM ENOENT ESRCH EINTR EIO ENXIO E2BIG ENOEXEC EBADF ECHILD EAGAIN ENOMEM EACCES
    EFAULT ENOTBLK EBUSY EEXIST EXDEV ENODEV ENOTDIR EISDIR EINVAL ENFILE EMFILE ENOTTY
    ETXTBSY EFBIG ENOSPC ESPIPE EROFS EMLINK EPIPE EDOM ERANGE EDEADLK ENAMETOOLONG ENOLCK
    ENOSYS ENOTEMPTY ELOOP ENOMSG EIDRM ECHRNG EL2NSYNC EL3HLT EL3RST ELNRNG EUNATCH ENOCSI
    EL2HLT EBADE EBADR EXFULL ENOANO EBADRQC EBADSLT EBFONT ENOSTR ENODATA ETIME ENOSR
    ENONET ENOPKG EREMOTE ENOLINK EADV ESRMNT ECOMM EPROTO EMULTIHOP EDOTDOT EBADMSG
    EOVERFLOW ENOTUNIQ EBADFD EREMCHG ELIBACC ELIBBAD ELIBSCN ELIBMAX ELIBEXEC EILSEQ
    ERESTART ESTRPIPE EUSERS ENOTSOCK EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT
    EPROTONOSUPPORT ESOCKTNOSUPPORT EOPNOTSUPP EPFNOSUPPORT EAFNOSUPPORT EADDRINUSE
    EADDRNOTAVAIL ENETDOWN ENETUNREACH ENETRESET ECONNABORTED ECONNRESET ENOBUFS EISCONN
    ENOTCONN ESHUTDOWN ETOOMANYREFS ETIMEDOUT ECONNREFUSED EHOSTDOWN EHOSTUNREACH EALREADY
    EINPROGRESS ESTALE EUCLEAN ENOTNAM ENAVAIL EISNAM EREMOTEIO EDQUOT ENOMEDIUM EMEDIUMTYPE
    ECANCELED ENOKEY EKEYEXPIRED EKEYREVOKED EKEYREJECTED EOWNERDEAD ENOTRECOVERABLE ERFKILL
};

/// Numbers that the C library does not know.
const OTHERS: &[(i32, &str)] = &[
    // rdma/fi_errno.h of libfabric 2.1
    (256, "FI_EOTHER"),
    (257, "FI_ETOOSMALL"),
    (258, "FI_EOPBADSTATE"),
    (259, "FI_EAVAIL"),
    (260, "FI_EBADFLAGS"),
    (261, "FI_ENOEQ"),
    (262, "FI_EDOMAIN"),
    (263, "FI_ENOCQ"),
    (264, "FI_ECRC"),
    (265, "FI_ETRUNC"),
    (266, "FI_ENOKEY"),
    (267, "FI_ENOAV"),
    (268, "FI_EOVERRUN"),
    (269, "FI_ENORX"),
    (270, "FI_ENOMR"),
    // include/linux/errno.h, Linux 7.3
    (512, "ERESTARTSYS"),
    (513, "ERESTARTNOINTR"),
    (514, "ERESTARTNOHAND"),
    (515, "ENOIOCTLCMD"),
    (516, "ERESTART_RESTARTBLOCK"),
    (517, "EPROBE_DEFER"),
    (518, "EOPENSTALE"),
    (519, "ENOPARAM"),
    (521, "EBADHANDLE"),
    (522, "ENOTSYNC"),
    (523, "EBADCOOKIE"),
    (524, "ENOTSUPP"),
    (525, "ETOOSMALL"),
    (526, "ESERVERFAULT"),
    (527, "EBADTYPE"),
    (528, "EJUKEBOX"),
    (529, "EIOCBQUEUED"),
    (530, "ERECALLCONFLICT"),
    (531, "ENOGRACE"),
    // cuda.h of CUDA 8.0 and later; HIP has the same numbers
    (800, "CUDA_ERROR_NOT_PERMITTED"),
    (801, "CUDA_ERROR_NOT_SUPPORTED"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_numbers_are_named_and_explained() {
        assert_eq!(Errno::INVAL.to_string(), "EINVAL (Invalid argument)");
        assert_eq!(Errno::REMOTEIO.name(), Some("EREMOTEIO"));
        assert_eq!(Errno::OPNOTSUPP.name(), Some("EOPNOTSUPP"));
    }

    #[test]
    fn a_leaked_kernel_number_is_named_and_called_internal() {
        assert_eq!(
            Errno(524).to_string(),
            "ENOTSUPP (error 524, internal to the kernel)"
        );
        assert_eq!(Errno(517).name(), Some("EPROBE_DEFER"));
        // The kernel has no 520.
        for number in (512..=531).filter(|number| *number != 520) {
            let said = Errno(number).to_string();
            assert!(said.ends_with("internal to the kernel)"), "{said}");
        }
    }

    #[test]
    fn a_number_of_libfabrics_is_named_as_its_own() {
        assert_eq!(
            Errno(266).to_string(),
            "FI_ENOKEY (error 266, libfabric's own)"
        );
    }

    #[test]
    fn a_number_of_a_graphics_library_is_named_as_its_own() {
        assert_eq!(
            Errno(801).to_string(),
            "CUDA_ERROR_NOT_SUPPORTED (error 801, CUDA's and HIP's own)"
        );
    }

    #[test]
    fn an_unknown_number_stays_a_number() {
        assert_eq!(Errno(4000).to_string(), "error 4000");
    }

    #[test]
    fn the_tables_name_each_number_once() {
        for table in [NAMES, OTHERS] {
            assert!(table.windows(2).all(|pair| pair[0].0 < pair[1].0));
        }
        assert!(NAMES.last() < OTHERS.first());
    }
}
