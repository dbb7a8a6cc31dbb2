//! Process limits behind an error number.

use crate::errno::Errno;
use rustix::process::{Resource, getrlimit};

/// For a failed call that locks or pins memory: a suffix for the error message that names the limit behind
/// `ENOMEM`, its current use, and how to raise it. It begins with a colon. Empty for other error numbers and
/// without a limit.
#[doc(hidden)]
pub fn on_pinning(errno: Errno) -> String {
    if errno != Errno::NOMEM {
        return String::new();
    }
    let limit = getrlimit(Resource::Memlock).current;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    limit.map_or_else(String::new, |limit| locked(limit, &status))
}

/// The kernel counts pinned memory (`VmPin`: drivers, RDMA) and locked memory (`VmLck`: mlock, VFIO)
/// separately, and compares each count with the same limit.
fn locked(limit: u64, status: &str) -> String {
    let of = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.map_or("unknown", str::trim)
    };
    format!(
        ": this process may lock {limit} bytes of memory (RLIMIT_MEMLOCK), and has locked {} and pinned {}: \
         raise the limit (ulimit -l, LimitMEMLOCK= of a systemd unit), or give it CAP_IPC_LOCK; or memory is \
         short",
        of("VmLck:"),
        of("VmPin:")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_named_with_what_is_used_of_it() {
        let status = "VmPeak:\t 9 kB\nVmLck:\t       4 kB\nVmPin:\t    8192 kB\nVmHWM:\t 1 kB\n";
        let text = locked(8_388_608, status);
        for part in [
            "8388608 bytes",
            "RLIMIT_MEMLOCK",
            "locked 4 kB",
            "pinned 8192 kB",
            "CAP_IPC_LOCK",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(locked(1, "").contains("unknown"));
        assert_eq!(on_pinning(Errno::FAULT), "");
    }
}
