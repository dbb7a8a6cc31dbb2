//! Runs programs in the distribution tree; the lab starts QEMU, apt and make only in this way.
//!
//! A [`Sandbox`] is a description: a root, the mounts, a program. Starting it executes this same binary
//! again, which enters its own mount namespace (and, if requested, process namespace), mounts, changes root
//! and executes the program. This gives two guarantees. Nothing stays mounted on the host, however the lab
//! ends. And everything started dies with the lab, even after SIGKILL: each process in the chain requests a
//! parent-death signal.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::{chroot, getppid},
};
use serde::{Deserialize, Serialize};

/// The hidden first argument for the outer half of a sandbox.
pub const ENTER: &str = "__sandbox";
/// The hidden first argument for the first process of a new process namespace.
const INSIDE: &str = "__sandbox-inside";

/// A mount in the sandbox; mounts are made in the given order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// Shows a host directory or file.
    Bind {
        /// The path on the host.
        from: PathBuf,
        /// The path below the sandbox's root.
        at: PathBuf,
        /// Refuses writes.
        read_only: bool,
    },
    /// An empty in-memory file system, writable for everyone like /tmp.
    Tmpfs {
        /// The path below the sandbox's root.
        at: PathBuf,
    },
    /// An overlay of layers, topmost first. Writable only with `upper`.
    Overlay {
        /// The read-only layers, topmost first.
        lower: Vec<PathBuf>,
        /// The directory for writes, and overlayfs's work directory beside it.
        upper: Option<(PathBuf, PathBuf)>,
        /// The path below the sandbox's root.
        at: PathBuf,
    },
}

/// A program and its view of the file system.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sandbox {
    root: PathBuf,
    layers: Option<Mount>,
    mounts: Vec<Mount>,
    own_processes: bool,
    program: PathBuf,
    args: Vec<PathBuf>,
    env: Vec<(String, PathBuf)>,
}

impl Sandbox {
    /// `program` in `root`, with the host's `/dev` and `/proc` and a clean environment.
    pub fn new(root: &Path, program: impl AsRef<OsStr>) -> Self {
        let mut env = vec![
            ("PATH".into(), "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("HOME".into(), "/root".into()),
            ("LC_ALL".into(), "C.UTF-8".into()),
            ("DEBIAN_FRONTEND".into(), "noninteractive".into()),
        ];
        for name in ["http_proxy", "https_proxy", "no_proxy"] {
            if let Some(value) = std::env::var_os(name) {
                env.push((name.into(), value.into()));
            }
        }
        Self {
            root: root.into(),
            layers: None,
            mounts: Vec::new(),
            own_processes: false,
            program: program.as_ref().into(),
            args: Vec::new(),
            env,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().into());
        self
    }

    /// Adds arguments.
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args
            .extend(args.into_iter().map(|a| a.as_ref().into()));
        self
    }

    /// Sets an environment variable of the program.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().into()));
        self
    }

    /// Adds a mount after the existing ones.
    pub fn mount(mut self, mount: Mount) -> Self {
        self.mounts.push(mount);
        self
    }

    /// Shows the host's `from` at `at`, writable.
    pub fn bind(self, from: impl Into<PathBuf>, at: impl Into<PathBuf>) -> Self {
        self.mount(Mount::Bind {
            from: from.into(),
            at: at.into(),
            read_only: false,
        })
    }

    /// Shows the host's `from` at `at`, read-only.
    pub fn bind_read_only(self, from: impl Into<PathBuf>, at: impl Into<PathBuf>) -> Self {
        self.mount(Mount::Bind {
            from: from.into(),
            at: at.into(),
            read_only: true,
        })
    }

    /// Makes the root an overlay of layers, mounted at the original root.
    pub fn overlay_root(mut self, lower: Vec<PathBuf>, upper: Option<(PathBuf, PathBuf)>) -> Self {
        self.layers = Some(Mount::Overlay {
            lower,
            upper,
            at: "/".into(),
        });
        self
    }

    /// Adds the host's resolver files, so that the program can use the network by name.
    pub fn network(mut self) -> Self {
        for file in ["/etc/resolv.conf", "/etc/hosts"] {
            if let Ok(real) = fs::canonicalize(file) {
                self = self.bind_read_only(real, file);
            }
        }
        self
    }

    /// Gives the program a process namespace, so that all its processes end with it.
    pub fn own_processes(mut self) -> Self {
        self.own_processes = true;
        self
    }

    /// The command that enters the sandbox; the caller sets its standard streams.
    ///
    /// # Errors If a path is not UTF-8.
    pub fn command(&self) -> Result<Command> {
        let json = serde_json::to_string(self).context(
            "a path or argument for the lab's tree is not UTF-8; move it to one that is",
        )?;
        // Not current_exe(): cargo may have replaced the file.
        let mut command = Command::new("/proc/self/exe");
        command
            .arg(ENTER)
            .arg(std::process::id().to_string())
            .arg(json);
        Ok(command)
    }

    /// Runs to the end. Keeps the output for the error message.
    ///
    /// # Errors If it cannot be started or exits with another status than 0; names the program and the end of
    /// its output.
    pub fn run(&self, what: &str) -> Result<String> {
        let output = self
            .command()?
            .stdin(std::process::Stdio::null())
            .output()?;
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let all = format!("{out}{}", String::from_utf8_lossy(&output.stderr));
            bail!(failure(
                what,
                &self.program,
                &self.args,
                output.status,
                &all
            ));
        }
        Ok(out)
    }
}

/// The error message for a failed program: the purpose, the program, the status, and its last output.
pub fn failure<A: AsRef<OsStr>>(
    what: &str,
    program: &Path,
    args: &[A],
    status: ExitStatus,
    output: &str,
) -> String {
    let line = args.iter().fold(OsString::from(program), |mut line, arg| {
        line.push(" ");
        line.push(arg);
        line
    });
    format!(
        "{what} failed: `{}` ended with {status}; the end of its output:\n{}",
        line.display(),
        tail(output, 40)
    )
}

/// The last `lines` lines of `text`, indented.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<_> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all[from..].iter().map(|l| format!("    {l}\n")).collect()
}

/// Entry point for the hidden first arguments; returns only after an error or a wait.
pub fn main_if_called(args: &[OsString]) -> Option<Result<i32>> {
    let inside = match args.get(1)?.to_str()? {
        ENTER => false,
        INSIDE => true,
        _ => return None,
    };
    Some(match (args.get(2), args.get(3)) {
        (Some(parent), Some(json)) => enter(inside, parent, json),
        _ => Err(anyhow::anyhow!("this entry point is the lab's own")),
    })
}

fn enter(inside: bool, parent: &OsStr, json: &OsStr) -> Result<i32> {
    set_pdeathsig(Signal::SIGKILL).context("asking for a parent-death signal")?;
    // The parent may have died before the request; in a new process namespace its ID is 0.
    if !inside && parent.as_bytes() != getppid().to_string().as_bytes() {
        return Ok(125);
    }
    let sandbox: Sandbox = serde_json::from_slice(json.as_bytes())?;
    if !inside {
        let mut flags = CloneFlags::CLONE_NEWNS;
        if sandbox.own_processes {
            flags |= CloneFlags::CLONE_NEWPID;
        }
        unshare(flags).context(
            "taking a mount namespace (unshare): the kernel, or a filter of the container that this is, refuses; \
             call the lab as root outside of a container, or start it with --privileged",
        )?;
        change_mount(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
        if sandbox.own_processes {
            let status = Command::new("/proc/self/exe")
                .args([OsStr::new(INSIDE), parent, json])
                .status()?;
            return Ok(exit_code(status));
        }
    }
    sandbox.mount_all(inside)?;
    chroot(&sandbox.root)
        .with_context(|| format!("changing root to {}", sandbox.root.display()))?;
    std::env::set_current_dir("/").context("entering the lab's tree")?;
    let error = Command::new(&sandbox.program)
        .args(&sandbox.args)
        .env_clear()
        .envs(sandbox.env.iter().map(|(k, v)| (k, v)))
        .exec();
    Err(error).with_context(|| format!("starting {} in the lab's tree", sandbox.program.display()))
}

/// A process's exit status as a shell reports it.
pub fn exit_code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn change_mount(at: &Path, flags: MsFlags) -> Result<()> {
    mount(None::<&Path>, at, None::<&Path>, flags, None::<&Path>)
        .with_context(|| format!("changing the mount at {}", at.display()))
}

impl Sandbox {
    fn below(&self, at: &Path) -> PathBuf {
        self.root.join(at.strip_prefix("/").unwrap_or(at))
    }

    fn mount_all(&self, fresh_proc: bool) -> Result<()> {
        if let Some(layers) = &self.layers {
            self.mount_one(layers)?;
        }
        if self.root == Path::new("/") && !fresh_proc {
            return self.mounts.iter().try_for_each(|m| self.mount_one(m));
        }
        if self.root != Path::new("/") {
            bind(Path::new("/dev"), &self.below(Path::new("/dev")), true)?;
        }
        let proc = self.below(Path::new("/proc"));
        let mounted = fresh_proc
            && mount(
                Some("proc"),
                &proc,
                Some("proc"),
                MsFlags::empty(),
                None::<&Path>,
            )
            .is_ok();
        if !mounted {
            bind(Path::new("/proc"), &proc, true)?;
        }
        for entry in &self.mounts {
            self.mount_one(entry)?;
        }
        Ok(())
    }

    fn mount_one(&self, entry: &Mount) -> Result<()> {
        match entry {
            Mount::Bind {
                from,
                at,
                read_only,
            } => {
                let at = self.below(at);
                make_mount_point(from, &at)?;
                bind(from, &at, false)?;
                if *read_only {
                    change_mount(
                        &at,
                        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY,
                    )?;
                }
            }
            Mount::Tmpfs { at } => {
                let at = self.below(at);
                mount(
                    Some("tmpfs"),
                    &at,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    Some("mode=1777"),
                )
                .with_context(|| format!("mounting a tmpfs at {}", at.display()))?;
            }
            Mount::Overlay { lower, upper, at } => {
                let at = self.below(at);
                fs::create_dir_all(&at)?;
                let lower: Vec<_> = lower.iter().map(|l| l.display().to_string()).collect();
                let mut options = format!("lowerdir={}", lower.join(":"));
                if let Some((upper, work)) = upper {
                    options += &format!(",upperdir={},workdir={}", upper.display(), work.display());
                }
                mount(
                    Some("overlay"),
                    &at,
                    Some("overlay"),
                    MsFlags::empty(),
                    Some(options.as_str()),
                )
                .with_context(|| format!("mounting an overlay at {} ({options})", at.display()))?;
            }
        }
        Ok(())
    }
}

fn bind(from: &Path, at: &Path, recursive: bool) -> Result<()> {
    let rec = if recursive {
        MsFlags::MS_REC
    } else {
        MsFlags::empty()
    };
    mount(
        Some(from),
        at,
        None::<&Path>,
        MsFlags::MS_BIND | rec,
        None::<&Path>,
    )
    .with_context(|| format!("showing {} at {}", from.display(), at.display()))
}

fn make_mount_point(from: &Path, at: &Path) -> Result<()> {
    if fs::symlink_metadata(at).is_ok() {
        return Ok(());
    }
    let is_dir = fs::metadata(from)
        .with_context(|| format!("looking at {}", from.display()))?
        .is_dir();
    if is_dir {
        fs::create_dir_all(at)
    } else {
        fs::File::create(at).and_then(|f| f.set_permissions(fs::Permissions::from_mode(0o644)))
    }
    .with_context(|| format!("making the mount point {}", at.display()))
}
