//! What the lab needs of the host, the right to mount and mmdebstrap, and what it asks of it: how many guests
//! it bears, and how fast its clock runs. Nothing else.

use std::{
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{progress::Step, sandbox};

/// Set in the environment once the lab has entered a user namespace of its own.
const IN_USER_NAMESPACE: &str = "PEERBUF_LAB_IN_USER_NAMESPACE";

/// How many guests run at a time where there are several to run: as many as the host has processors, if its
/// memory allows. A guest has two processors and mostly uses one; with a third guest on two processors the
/// longest runs took twice as long.
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

/// What the host itself has of what peerbuf uses, for people to read while the lab is being made.
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
    text += " `cargo run --bin peerbuf -- info` says more of this host.\n";
    text
}

/// What a guest takes of the host's memory at most, for the most part.
const GUEST_KIB: usize = 4 << 20;

/// Without root: starts the lab again in a user namespace where it is root, and does not return.
///
/// # Errors
/// When that fails, with what the person can do.
pub fn become_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    if std::env::var_os(IN_USER_NAMESPACE).is_some() {
        bail!("in its own user namespace the lab is not root; run `cargo lab` as root instead");
    }
    // mmdebstrap and uidmap come first: inside, there is no way to install anything.
    if find("mmdebstrap").is_none() || find("newuidmap").is_none() {
        install(&["mmdebstrap", "uidmap"])?;
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
        bail!(
            "the lab needs root, or a user namespace with a range of user ids, to make and enter \
             its distribution tree.\n  tried: unshare --user --map-root-user --map-auto --mount true\n  \
             result: {}\n  so either run it as root (`sudo -E cargo lab ...`), or give this user a \
             range: `sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER`",
            String::from_utf8_lossy(&probe.stderr).trim()
        );
    }
    let error = Command::new("unshare")
        .args(args)
        .args(std::env::args_os().skip(1))
        .env(IN_USER_NAMESPACE, "1")
        .exec();
    Err(error).context("starting the lab in a user namespace")
}

/// Makes sure that mmdebstrap is there.
///
/// # Errors
/// When it is not and cannot be installed; names the one command to run.
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

fn install(packages: &[&str]) -> Result<()> {
    let by_hand = format!("sudo apt-get install {}", packages.join(" "));
    if find("apt-get").is_none() {
        bail!(
            "the lab needs {} on the host, and this host has no apt-get to install it with; \
             install it with your own package manager and call again",
            packages.join(" and ")
        );
    }
    let root = nix::unistd::geteuid().is_root();
    if !root && (find("sudo").is_none() || std::env::var_os(IN_USER_NAMESPACE).is_some()) {
        bail!(
            "the lab needs {}; as root, run: apt-get install {}",
            packages.join(" and "),
            packages.join(" ")
        );
    }
    let apt = |args: &[&str]| -> Result<std::process::Output> {
        let mut command = if root {
            Command::new("apt-get")
        } else {
            Command::new("sudo")
        };
        if !root {
            command.arg("apt-get");
        }
        let command = command
            .args(["-q", "-y"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive");
        // sudo may have to ask for a password: it does so on the terminal itself.
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
        // A bare machine has no package lists yet. Third-party sources may fail: the install says.
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

/// The mirror of the distribution that the host's own apt sources name, if it is a Debian host.
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
        // Options in brackets may hold spaces.
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

/// apt's proxy settings on the host, as lines of an apt configuration.
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

/// How fast the time stamp counter runs, in kHz, where the host says so: a virtual machine whose
/// hypervisor does. An emulated processor shows the host's counter.
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
    // With aperfmperf it is the core's speed at the moment that stands there.
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
