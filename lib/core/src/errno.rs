//! Error numbers, with the names that people search for.
//!
//! The kernel's own numbers from 512 on are not meant for userspace and no C library knows them,
//! but drivers leak them (524 is seen most), so they have names here too. libfabric has numbers of
//! its own from 256 on, where the kernel has none.

use std::fmt;

/// An error number as a system call returned it, positive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// `EPERM`: not allowed.
    pub const PERM: Errno = Errno(1);
    /// `EINTR`: a signal came first.
    pub const INTR: Errno = Errno(4);
    /// `EAGAIN`: not now.
    pub const AGAIN: Errno = Errno(11);
    /// `EIO`: the device failed.
    pub const IO: Errno = Errno(5);
    /// `ENXIO`: no such device or address.
    pub const NXIO: Errno = Errno(6);
    /// `EFAULT`: memory that the kernel cannot use for this call.
    pub const FAULT: Errno = Errno(14);
    /// Somebody uses it, so it cannot be done now.
    pub const BUSY: Errno = Errno(16);
    /// `EINVAL`: a request that makes no sense, or a path that the kernel refuses.
    pub const INVAL: Errno = Errno(22);
    /// `ENODEV`: the device is gone.
    pub const NODEV: Errno = Errno(19);
    /// `ETIME`: it took too long.
    pub const TIME: Errno = Errno(62);
    /// `EPROTONOSUPPORT`: an interface that the kernel or the driver lacks.
    pub const PROTONOSUPPORT: Errno = Errno(93);
    /// `EOPNOTSUPP`: the operation is not supported.
    pub const OPNOTSUPP: Errno = Errno(95);
    /// `EREMOTEIO`: how newer block layers refuse peer-to-peer memory.
    pub const REMOTEIO: Errno = Errno(121);
    /// `ENOTSUPP`, internal to the kernel: not supported.
    pub const NOTSUPP: Errno = Errno(524);

    /// The symbolic name, such as `EINVAL`; `None` for a number without one.
    pub fn name(self) -> Option<&'static str> {
        NAMES
            .iter()
            .find(|(number, _)| *number == self.0)
            .map(|(_, name)| *name)
    }

    /// True for the numbers that the kernel keeps to itself and that have leaked.
    pub fn is_kernel_internal(self) -> bool {
        (512..=530).contains(&self.0)
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
    /// An error that has no number of the system's becomes [`Errno::IO`].
    fn from(error: &std::io::Error) -> Self {
        error.raw_os_error().map_or(Errno::IO, Errno)
    }
}

// include/uapi/asm-generic/errno-base.h and errno.h, include/linux/errno.h, Linux 7.2.
const NAMES: &[(i32, &str)] = &[
    (1, "EPERM"),
    (2, "ENOENT"),
    (3, "ESRCH"),
    (4, "EINTR"),
    (5, "EIO"),
    (6, "ENXIO"),
    (7, "E2BIG"),
    (8, "ENOEXEC"),
    (9, "EBADF"),
    (10, "ECHILD"),
    (11, "EAGAIN"),
    (12, "ENOMEM"),
    (13, "EACCES"),
    (14, "EFAULT"),
    (15, "ENOTBLK"),
    (16, "EBUSY"),
    (17, "EEXIST"),
    (18, "EXDEV"),
    (19, "ENODEV"),
    (20, "ENOTDIR"),
    (21, "EISDIR"),
    (22, "EINVAL"),
    (23, "ENFILE"),
    (24, "EMFILE"),
    (25, "ENOTTY"),
    (26, "ETXTBSY"),
    (27, "EFBIG"),
    (28, "ENOSPC"),
    (29, "ESPIPE"),
    (30, "EROFS"),
    (31, "EMLINK"),
    (32, "EPIPE"),
    (33, "EDOM"),
    (34, "ERANGE"),
    (35, "EDEADLK"),
    (36, "ENAMETOOLONG"),
    (37, "ENOLCK"),
    (38, "ENOSYS"),
    (39, "ENOTEMPTY"),
    (40, "ELOOP"),
    (42, "ENOMSG"),
    (43, "EIDRM"),
    (44, "ECHRNG"),
    (45, "EL2NSYNC"),
    (46, "EL3HLT"),
    (47, "EL3RST"),
    (48, "ELNRNG"),
    (49, "EUNATCH"),
    (50, "ENOCSI"),
    (51, "EL2HLT"),
    (52, "EBADE"),
    (53, "EBADR"),
    (54, "EXFULL"),
    (55, "ENOANO"),
    (56, "EBADRQC"),
    (57, "EBADSLT"),
    (59, "EBFONT"),
    (60, "ENOSTR"),
    (61, "ENODATA"),
    (62, "ETIME"),
    (63, "ENOSR"),
    (64, "ENONET"),
    (65, "ENOPKG"),
    (66, "EREMOTE"),
    (67, "ENOLINK"),
    (68, "EADV"),
    (69, "ESRMNT"),
    (70, "ECOMM"),
    (71, "EPROTO"),
    (72, "EMULTIHOP"),
    (73, "EDOTDOT"),
    (74, "EBADMSG"),
    (75, "EOVERFLOW"),
    (76, "ENOTUNIQ"),
    (77, "EBADFD"),
    (78, "EREMCHG"),
    (79, "ELIBACC"),
    (80, "ELIBBAD"),
    (81, "ELIBSCN"),
    (82, "ELIBMAX"),
    (83, "ELIBEXEC"),
    (84, "EILSEQ"),
    (85, "ERESTART"),
    (86, "ESTRPIPE"),
    (87, "EUSERS"),
    (88, "ENOTSOCK"),
    (89, "EDESTADDRREQ"),
    (90, "EMSGSIZE"),
    (91, "EPROTOTYPE"),
    (92, "ENOPROTOOPT"),
    (93, "EPROTONOSUPPORT"),
    (94, "ESOCKTNOSUPPORT"),
    (95, "EOPNOTSUPP"),
    (96, "EPFNOSUPPORT"),
    (97, "EAFNOSUPPORT"),
    (98, "EADDRINUSE"),
    (99, "EADDRNOTAVAIL"),
    (100, "ENETDOWN"),
    (101, "ENETUNREACH"),
    (102, "ENETRESET"),
    (103, "ECONNABORTED"),
    (104, "ECONNRESET"),
    (105, "ENOBUFS"),
    (106, "EISCONN"),
    (107, "ENOTCONN"),
    (108, "ESHUTDOWN"),
    (109, "ETOOMANYREFS"),
    (110, "ETIMEDOUT"),
    (111, "ECONNREFUSED"),
    (112, "EHOSTDOWN"),
    (113, "EHOSTUNREACH"),
    (114, "EALREADY"),
    (115, "EINPROGRESS"),
    (116, "ESTALE"),
    (117, "EUCLEAN"),
    (118, "ENOTNAM"),
    (119, "ENAVAIL"),
    (120, "EISNAM"),
    (121, "EREMOTEIO"),
    (122, "EDQUOT"),
    (123, "ENOMEDIUM"),
    (124, "EMEDIUMTYPE"),
    (125, "ECANCELED"),
    (126, "ENOKEY"),
    (127, "EKEYEXPIRED"),
    (128, "EKEYREVOKED"),
    (129, "EKEYREJECTED"),
    (130, "EOWNERDEAD"),
    (131, "ENOTRECOVERABLE"),
    (132, "ERFKILL"),
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
    }

    #[test]
    fn a_number_of_libfabrics_is_named_as_its_own() {
        assert_eq!(
            Errno(266).to_string(),
            "FI_ENOKEY (error 266, libfabric's own)"
        );
    }

    #[test]
    fn an_unknown_number_stays_a_number() {
        assert_eq!(Errno(4000).to_string(), "error 4000");
    }

    #[test]
    fn the_table_names_each_number_once() {
        assert!(NAMES.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }
}
