//! The lab's requirements on the host (permission to mount, mmdebstrap), and its queries of the host: how
//! many guests it can run, and the frequency of its TSC.

use std::{
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{cache::Cache, progress::Step, sandbox};

/// Set in the environment after the lab has entered its own user namespace.
const IN_USER_NAMESPACE: &str = "PEERBUF_LAB_IN_USER_NAMESPACE";

/// The number of guests to run at a time: one per CPU of the host, if memory allows. A guest has two CPUs and
/// mostly uses one; a third guest on two CPUs made the longest runs take twice as long.
pub fn guests_at_once() -> usize {
    let cores = std::thread::available_parallelism().map_or(2, |n| n.get());
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    let room = available.map_or(2, |kib| kib / GUEST_KIB);
    cores.min(room).clamp(1, 4)
}

/// The host's own features that peerbuf uses, shown while the lab is being made.
pub fn summary() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
    let entries = |dir: &str| -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    };
    let is_there = |path: &str| match Path::new(path).exists() {
        true => path.to_owned(),
        false => String::new(),
    };
    let rows = [
        ("peerbuf.ko", entries("/dev/peerbuf").join(" ")),
        ("udmabuf", is_there("/dev/udmabuf")),
        ("dma-heaps", entries("/dev/dma_heap").join(" ")),
        ("GPUs", entries("/dev/dri").join(" ")),
        ("NVMe disks", entries("/sys/class/nvme").join(" ")),
        ("RDMA devices", entries("/sys/class/infiniband").join(" ")),
        ("KVM", is_there("/dev/kvm")),
    ];
    let mut text = format!(
        "This host: Linux {}, {processors} processors",
        release.trim()
    );
    for (what, found) in rows {
        let found = if found.is_empty() { "none" } else { &found };
        text += &format!("\n  {what:<13} {found}");
    }
    text += "\nThe demo needs none of these: it runs in machines that the lab makes.";
    text += "\n`cargo run --bin peerbuf -- info` says more of this host.\n";
    text
}

/// The usual maximum of host memory that a guest takes.
const GUEST_KIB: usize = 4 << 20;

/// If not root, restarts the lab in a user namespace in which it is root, and does not return.
///
/// # Errors If that fails, with a remedy.
pub fn become_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        if !may_mount(&status) {
            bail!(
                "the lab runs as root, but without the capability CAP_SYS_ADMIN, so the kernel refuses each mount \
                 and namespace; a container usually takes it away. Start the container with it (`docker run \
                 --privileged`, `podman run --privileged`), or call `cargo lab` outside"
            );
        }
        return Ok(());
    }
    if std::env::var_os(IN_USER_NAMESPACE).is_some() {
        bail!("in its own user namespace the lab is not root; run `cargo lab` as root instead");
    }
    // Installed first, because the namespace does not allow it. mmdebstrap is needed once, to make the tree.
    let mut wanted = Vec::new();
    if find("mmdebstrap").is_none() && !Cache::has_a_tree() {
        wanted.push("mmdebstrap");
    }
    if find("newuidmap").is_none() {
        wanted.push("uidmap");
    }
    if !wanted.is_empty() {
        install(&wanted)?;
    }
    let exe = std::env::current_exe().context("finding the lab's own program")?;
    let mut args: Vec<OsString> = ["--user", "--map-root-user", "--map-auto", "--"]
        .into_iter()
        .map(Into::into)
        .collect();
    args.push(exe.into_os_string());
    let probe = Command::new("unshare")
        .args(["--user", "--map-root-user", "--map-auto", "--mount", "true"])
        .stdin(Stdio::null())
        .output()
        .context("starting unshare (package util-linux)")?;
    if !probe.status.success() {
        let said = String::from_utf8_lossy(&probe.stderr);
        bail!(
            "without root, the lab needs a user namespace with a range of user ids, to make and enter its \
             distribution tree.\n  tried: unshare --user --map-root-user --map-auto --mount true\n  \
             result: {}\n  {}; or run the lab as root",
            said.trim(),
            Namespaces::of_this_host().remedy(&said)
        );
    }
    let error = Command::new("unshare")
        .args(args)
        .args(std::env::args_os().skip(1))
        .env(IN_USER_NAMESPACE, "1")
        .exec();
    Err(error).context("starting the lab in a user namespace")
}

/// Whether a process with this `/proc/self/status` has CAP_SYS_ADMIN.
fn may_mount(status: &str) -> bool {
    let effective = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    let bits = effective.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    bits.is_none_or(|bits| bits & 1 << CAP_SYS_ADMIN != 0)
}

/// The capability's number in linux/capability.h.
const CAP_SYS_ADMIN: u32 = 21;

/// The settings that allow this user a user namespace with several user IDs.
struct Namespaces {
    user: String,
    /// Whether /etc/subuid and /etc/subgid each have a range for the user.
    ranges: [bool; 2],
    /// user.max_user_namespaces is 0.
    none_at_all: bool,
    /// kernel.unprivileged_userns_clone (in Debian's kernels) is 0.
    only_root: bool,
    /// kernel.apparmor_restrict_unprivileged_userns (in Ubuntu's kernels) is 1.
    apparmor: bool,
}

impl Namespaces {
    fn of_this_host() -> Self {
        let uid = nix::unistd::geteuid();
        let user = nix::unistd::User::from_uid(uid).ok().flatten();
        let user = user.map_or(uid.to_string(), |user| user.name);
        let sysctl = |name: &str| {
            let text = fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        let range = |file| {
            let text = fs::read_to_string(file).unwrap_or_default();
            has_range(&text, &user, &uid.to_string())
        };
        Self {
            ranges: ["/etc/subuid", "/etc/subgid"].map(range),
            none_at_all: sysctl("user/max_user_namespaces") == "0",
            only_root: sysctl("kernel/unprivileged_userns_clone") == "0",
            apparmor: sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1",
            user,
        }
    }

    /// The remedy, given the error of `unshare`.
    fn remedy(&self, said: &str) -> String {
        let set = |setting| format!("this host forbids it; as root, run: sysctl -w {setting}");
        if said.contains("unrecognized option") {
            "its unshare is too old: it comes with util-linux 2.38 (Debian 12, Ubuntu 23.04) or later".into()
        } else if self.none_at_all {
            set("user.max_user_namespaces=15000")
        } else if self.only_root {
            set("kernel.unprivileged_userns_clone=1")
        } else if let [false, _] | [_, false] = self.ranges {
            let user = &self.user;
            format!(
                "user {user} has no range in /etc/subuid or /etc/subgid; as root, run: usermod --add-subuids \
                 100000-165535 --add-subgids 100000-165535 {user}"
            )
        } else if self.apparmor {
            set("kernel.apparmor_restrict_unprivileged_userns=0")
        } else {
            "a container or a security module on this host forbids it: call the lab outside of it"
                .into()
        }
    }
}

/// Whether a line of /etc/subuid or /etc/subgid belongs to this user.
fn has_range(text: &str, user: &str, uid: &str) -> bool {
    let mut owners = text.lines().filter_map(|line| line.split(':').next());
    owners.any(|owner| owner == user || owner == uid)
}

/// Ensures that mmdebstrap is installed.
///
/// # Errors If it is missing and cannot be installed, with the command to run.
pub fn need_mmdebstrap() -> Result<()> {
    if find("mmdebstrap").is_none() {
        install(&["mmdebstrap"])
    } else {
        Ok(())
    }
}

fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/bin")])
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// What the host offers to install packages with.
#[derive(Debug, Clone, Copy)]
struct Rights {
    apt: bool,
    root: bool,
    sudo: bool,
    /// Root of a user namespace has no rights over the host's packages.
    in_namespace: bool,
}

/// Whether apt-get is started through sudo; an error that says what to do if it cannot be started.
fn through_sudo(packages: &[&str], rights: Rights) -> Result<bool> {
    let names = packages.join(" and ");
    if !rights.apt {
        bail!(
            "the lab needs {names} on the host, and this host has no apt-get to install it with; \
             install it with your own package manager and call again"
        );
    }
    if !rights.root && (!rights.sudo || rights.in_namespace) {
        bail!(
            "the lab needs {names} on the host and may not install it here; as root, run: apt-get install {}",
            packages.join(" ")
        );
    }
    Ok(!rights.root)
}

fn install(packages: &[&str]) -> Result<()> {
    let by_hand = format!("sudo apt-get install {}", packages.join(" "));
    let sudo = through_sudo(
        packages,
        Rights {
            apt: find("apt-get").is_some(),
            root: nix::unistd::geteuid().is_root(),
            sudo: find("sudo").is_some(),
            in_namespace: std::env::var_os(IN_USER_NAMESPACE).is_some(),
        },
    )?;
    let apt = |args: &[&str]| -> Result<std::process::Output> {
        let mut command = match sudo {
            true => Command::new("sudo"),
            false => Command::new("apt-get"),
        };
        if sudo {
            command.arg("apt-get");
        }
        let command = command
            .args(["-q", "-y"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive");
        // sudo asks for a password on the terminal itself, if it must.
        command
            .stdin(Stdio::null())
            .output()
            .context("starting apt-get")
    };
    let step = Step::start(format!("installing {} on the host", packages.join(" and ")));
    let mut args = vec!["install", "--no-install-recommends"];
    args.extend(packages);
    let mut output = apt(&args)?;
    if !output.status.success() {
        // A new machine has no package lists. Third-party sources may fail; the install then reports an
        // error.
        apt(&["update"])?;
        output = apt(&args)?;
    }
    if !output.status.success() {
        bail!(
            "installing {} with apt-get ended with {}; the end of its output:\n{}run this by hand and \
             call again: {by_hand}",
            packages.join(" and "),
            output.status,
            sandbox::tail(&String::from_utf8_lossy(&output.stderr), 20)
        );
    }
    step.done();
    Ok(())
}

/// The mirror in the apt sources of a Debian host.
pub fn debian_mirror() -> Option<String> {
    let os = fs::read_to_string("/etc/os-release").ok()?;
    let codename = os
        .lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="))?
        .trim_matches('"')
        .to_owned();
    if !os.lines().any(|l| l.trim() == "ID=debian") {
        return None;
    }
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.flatten().map(|e| e.path()));
    }
    files.sort();
    files
        .iter()
        .find_map(|file| mirror_in(&fs::read_to_string(file).ok()?, file, &codename))
}

fn mirror_in(text: &str, file: &Path, codename: &str) -> Option<String> {
    let http = |uri: &&str| uri.starts_with("http://") || uri.starts_with("https://");
    if file.extension().is_some_and(|e| e == "sources") {
        return text.split("\n\n").find_map(|stanza| {
            let field = |name: &str| {
                stanza
                    .lines()
                    .find_map(|l| l.strip_prefix(name))
                    .map(|v| v.split_whitespace().collect::<Vec<_>>())
            };
            let fits = field("Types:")?.contains(&"deb")
                && field("Suites:")?.contains(&codename)
                && field("Components:")?.contains(&"main");
            fits.then(|| {
                field("URIs:")?
                    .into_iter()
                    .find(|u| http(u))
                    .map(str::to_owned)
            })
            .flatten()
        });
    }
    text.lines().find_map(|line| {
        let line = line.trim().strip_prefix("deb ")?;
        // Options in brackets may contain spaces.
        let line = match line.trim_start().strip_prefix('[') {
            Some(rest) => rest.split_once(']')?.1,
            None => line,
        };
        let mut words = line.split_whitespace();
        let uri = words.next().filter(http)?;
        let fits = words.next()? == codename && words.any(|w| w == "main");
        fits.then(|| uri.to_owned())
    })
}

/// The host's apt proxy settings, as lines of apt configuration.
pub fn apt_proxy() -> Vec<String> {
    let Ok(output) = Command::new("apt-config")
        .arg("dump")
        .stderr(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|l| l.starts_with("Acquire::http") && l.contains("::Proxy") && !l.contains("\"\""))
        .map(str::to_owned)
        .collect()
}

/// The frequency of the time stamp counter in kHz, if the host reports it: a virtual machine whose hypervisor
/// does. An emulated CPU shows the host's counter.
pub fn tsc_khz() -> Option<u64> {
    known_tsc_khz(&fs::read_to_string("/proc/cpuinfo").ok()?)
}

fn known_tsc_khz(cpuinfo: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    };
    let flags: Vec<&str> = field("flags")?.split_whitespace().collect();
    let has = |flag| flags.contains(&flag);
    // With aperfmperf, the file has the core's current frequency instead.
    if !has("hypervisor") || !has("tsc_known_freq") || has("aperfmperf") {
        return None;
    }
    let mhz: f64 = field("cpu MHz")?.parse().ok()?;
    (mhz > 0.0).then_some((mhz * 1000.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_install_is_told_what_to_run() {
        let rights = |apt, root, sudo, in_namespace| Rights {
            apt,
            root,
            sudo,
            in_namespace,
        };
        let tried =
            |rights| through_sudo(&["mmdebstrap"], rights).map_err(|error| error.to_string());
        assert_eq!(tried(rights(true, true, false, false)), Ok(false));
        assert_eq!(tried(rights(true, false, true, false)), Ok(true));
        let by_root = "the lab needs mmdebstrap on the host and may not install it here; as root, run: \
                       apt-get install mmdebstrap";
        assert_eq!(
            tried(rights(true, false, false, false)),
            Err(by_root.into())
        );
        assert_eq!(tried(rights(true, false, true, true)), Err(by_root.into()));
        let without_apt = tried(rights(false, true, true, false)).unwrap_err();
        assert!(
            without_apt.contains("your own package manager"),
            "{without_apt}"
        );
    }

    #[test]
    fn the_counters_speed_is_taken_only_from_who_knows_it() {
        let cpuinfo = |flags: &str| {
            format!(
                "processor\t: 0\ncpu MHz\t\t: 2445.428\nflags\t\t: fpu tsc {flags}\n\nprocessor\t: 1\n"
            )
        };
        let of = |flags| known_tsc_khz(&cpuinfo(flags));
        assert_eq!(of("hypervisor tsc_known_freq"), Some(2_445_428));
        assert_eq!(of("hypervisor"), None);
        assert_eq!(of("tsc_known_freq aperfmperf"), None);
        assert_eq!(of("hypervisor tsc_known_freq aperfmperf"), None);
        assert_eq!(known_tsc_khz("flags: hypervisor tsc_known_freq"), None);
        assert_eq!(known_tsc_khz(""), None);
    }

    #[test]
    fn each_reason_for_which_there_is_no_namespace_has_its_own_remedy() {
        let host = || Namespaces {
            user: "ann".into(),
            ranges: [true; 2],
            none_at_all: false,
            only_root: false,
            apparmor: false,
        };
        let refused = "unshare: unshare failed: Operation not permitted";
        let told = |host: Namespaces, said, part: &str| {
            let remedy = host.remedy(said);
            assert!(remedy.contains(part), "{part} in {remedy}");
        };
        let ranges = [true, false];
        told(
            Namespaces { ranges, ..host() },
            "",
            "--add-subgids 100000-165535 ann",
        );
        told(
            Namespaces {
                none_at_all: true,
                ranges,
                ..host()
            },
            refused,
            "user.max_user_namespaces=15000",
        );
        told(
            Namespaces {
                only_root: true,
                ..host()
            },
            refused,
            "unprivileged_userns_clone=1",
        );
        told(
            Namespaces {
                apparmor: true,
                ..host()
            },
            "unshare: write failed /proc/self/uid_map: Operation not permitted",
            "apparmor_restrict_unprivileged_userns=0",
        );
        told(
            host(),
            "unshare: unrecognized option '--map-auto'",
            "util-linux 2.38",
        );
        told(host(), refused, "a container");
    }

    #[test]
    fn a_range_belongs_to_a_user_by_name_or_number() {
        let text = "annabel:100000:65536\n1001:165536:65536\n";
        assert!(has_range(text, "annabel", "1000"));
        assert!(has_range(text, "bob", "1001"));
        assert!(!has_range(text, "ann", "100"));
        assert!(!has_range("", "ann", "100"));
    }

    #[test]
    fn root_without_the_capability_may_not_mount() {
        assert!(may_mount("Name:\tx\nCapEff:\t000001ffffffffff\n"));
        // A Docker container's capabilities.
        assert!(!may_mount("CapEff:\t00000000a80425fb\n"));
        assert!(may_mount(""));
    }

    #[test]
    fn the_mirror_is_the_one_that_serves_the_hosts_own_suite() {
        let list = "# deb http://no.example/debian bookworm main\n\
                    deb http://other.example/tool stable main\n\
                    deb [arch=amd64 signed-by=/k x] https://m.example/debian bookworm main contrib\n";
        let at = |text, file| mirror_in(text, Path::new(file), "bookworm");
        assert_eq!(
            at(list, "sources.list").as_deref(),
            Some("https://m.example/debian")
        );
        let sources = "Types: deb\nURIs: http://t.example/x\nSuites: stable\nComponents: main\n\n\
                       Types: deb deb-src\nURIs: http://m.example/debian\nSuites: bookworm bookworm-updates\n\
                       Components: main\n";
        assert_eq!(
            at(sources, "debian.sources").as_deref(),
            Some("http://m.example/debian")
        );
        assert_eq!(at("", "debian.sources"), None);
        assert_eq!(at("deb cdrom:[x]/ bookworm main", "sources.list"), None);
    }
}
