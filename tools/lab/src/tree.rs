//! The distribution tree: the root of every guest, with the compilers and QEMU.
//!
//! mmdebstrap makes it once. After that it is read-only: guests see it under an overlay, and the sandbox
//! mounts over it. Additional packages are layers on top.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::{Cache, Entry, Recipe, remove_tree},
    host,
    sandbox::{self, Mount, Sandbox},
};

/// The distribution's release. Its compilers must be those that built its kernel.
const SUITE: &str = "trixie";
/// Additional suites; the kernel comes from backports.
const MORE_SUITES: [&str; 2] = ["trixie-updates", "trixie-backports"];

const PACKAGES: &[&str] = &[
    // The kernel's tool chain.
    "bc",
    "bindgen",
    "bison",
    "clang",
    "cpio",
    "dwarves",
    "flex",
    "gcc-14",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "lld",
    "llvm",
    "make",
    "perl",
    "rust-src",
    "rustc",
    "xz-utils",
    "zstd",
    // The machine.
    "busybox-static",
    "qemu-system-x86",
    "kmod",
    // Programs for tests and users in a guest.
    "bash",
    "ca-certificates",
    "e2fsprogs",
    "fio",
    "ibverbs-utils",
    "iproute2",
    "libibverbs-dev",
    "nvme-cli",
    "pciutils",
    "procps",
    "python3",
    "rdma-core",
    "strace",
];

/// Paths that no guest and no recipe needs: without them the tree has 1.2 GB instead of 2.1. `*` also matches
/// slashes, so versions are spelled with `?`.
const LEFT_OUT: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    // rust-src: the kernel compiles only library/.
    "/usr/src/rustc-?.??.?/src/*",
    "/usr/src/rustc-?.??.?/compiler/*",
    "/usr/src/rustc-?.??.?/tests/*",
    // Dependencies of bindgen for writing compilers; bindgen itself uses only libclang.so.
    "/usr/lib/llvm-??/lib/lib*.a",
    "/usr/lib/llvm-??/include/*",
    "/usr/lib/llvm-??/bin/llvm-exegesis",
    "/usr/bin/x86_64-linux-gnu-lto-dump-??",
    // The machine has 64 bits.
    "/usr/bin/qemu-system-i386",
];

/// Mount points of the sandbox and the guest.
const MOUNT_POINTS: &[&str] = &[
    "lab/build",
    "lab/linux",
    "lab/out",
    "lab/src",
    "mnt/nvme",
    "mnt/share",
    "opt/peerbuf",
    "usr/lib/modules",
];

/// The recipe and the cache entry of the tree.
pub struct Tree {
    entry: Entry,
    name: String,
}

impl Tree {
    /// The tree, made at the first call.
    ///
    /// # Errors Without mmdebstrap, a network or room; names what is missing.
    pub fn get(cache: &Cache) -> Result<Self> {
        let recipe = || {
            let mut recipe = Recipe::new("tree")
                .with("2")
                .with(SUITE)
                .with(std::env::consts::ARCH);
            for part in [&MORE_SUITES[..], PACKAGES, LEFT_OUT, MOUNT_POINTS].concat() {
                recipe = recipe.with(part);
            }
            recipe
        };
        let entry = cache.entry(
            recipe(),
            "making the distribution tree (about two minutes)",
            |dir| {
                host::need_mmdebstrap()?;
                bootstrap(&dir.join("root"))
            },
        )?;
        Ok(Self {
            entry,
            name: recipe().name(),
        })
    }

    /// The root directory.
    pub fn root(&self) -> PathBuf {
        self.entry.path().join("root")
    }

    /// A name that identifies its contents.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The installed versions of these packages.
    ///
    /// # Errors If one is not installed.
    pub fn versions(&self, packages: &[&str]) -> Result<Vec<String>> {
        let file = self.root().join("var/lib/dpkg/status");
        let text =
            fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let field = |stanza: &str, name: &str| {
            let mut lines = stanza.lines();
            lines.find_map(|l| l.strip_prefix(name).map(|v| v.trim().to_owned()))
        };
        packages
            .iter()
            .map(|package| {
                let stanza = text
                    .split("\n\n")
                    .find(|s| field(s, "Package:").as_deref() == Some(package));
                let version = stanza.and_then(|s| field(s, "Version:"));
                let version = version.with_context(|| {
                    format!("the distribution tree has no package {package}; `cargo lab clean` makes it anew")
                })?;
                Ok(format!("{package} {version}"))
            })
            .collect()
    }

    /// A sandbox for a program of the tree.
    pub fn sandbox(&self, program: &str) -> Sandbox {
        Sandbox::new(&self.root(), program)
    }

    /// A sandbox for one of the lab's shell recipes, with `out` as `/lab/out`. Fetched package lists and
    /// caches are discarded.
    pub fn recipe(&self, text: &str, out: &Path) -> Sandbox {
        self.sandbox("/bin/sh")
            .own_processes()
            .network()
            .mount(Mount::Tmpfs {
                at: "/var/lib/apt/lists".into(),
            })
            .mount(Mount::Tmpfs {
                at: "/var/cache/apt".into(),
            })
            .mount(Mount::Tmpfs { at: "/tmp".into() })
            .bind(out, "/lab/out")
            .args(["-c", text, "recipe"])
    }

    /// A layer with additional packages, made at the first call.
    ///
    /// # Errors If apt does not know a package or cannot install it.
    pub fn layer(&self, cache: &Cache, packages: &[String]) -> Result<Entry> {
        let mut packages = packages.to_vec();
        packages.sort();
        packages.dedup();
        let mut recipe = Recipe::new("with")
            .detail(packages.join(", "))
            .with("1")
            .with(&self.name);
        for package in &packages {
            recipe = recipe.with(package);
        }
        let what = format!("adding {} to the guest's packages", packages.join(", "));
        cache.entry(recipe, &what, |dir| {
            // For users who inspect the cache.
            fs::write(dir.join("packages"), packages.join("\n") + "\n")?;
            let (upper, work) = (dir.join("upper"), dir.join("work"));
            let merged = dir.join("merged");
            for d in [&upper, &work, &merged] {
                fs::create_dir(d)?;
            }
            // Maintainer scripts must not start services here.
            let script = "set -eu; printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d; \
                          chmod 755 /usr/sbin/policy-rc.d; apt-get -q update; \
                          apt-get -q -y -o APT::Sandbox::User=root install --no-install-recommends \"$@\"; \
                          rm /usr/sbin/policy-rc.d";
            Sandbox::new(&merged, "/bin/sh")
                .own_processes()
                .overlay_root(vec![self.root()], Some((upper, work.clone())))
                .network()
                .mount(Mount::Tmpfs { at: "/var/lib/apt/lists".into() })
                .mount(Mount::Tmpfs { at: "/var/cache/apt".into() })
                .mount(Mount::Tmpfs { at: "/tmp".into() })
                .args(["-c", script, "with"])
                .args(&packages)
                .run("installing the packages of --with")?;
            remove_tree(&work)?;
            remove_tree(&merged)?;
            Ok(())
        })
    }
}

fn bootstrap(root: &Path) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    command.args(["--mode=root", "--variant=apt"]);
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.arg("--aptopt=Apt::Install-Recommends \"false\"");
    // By default an unreachable archive is only a warning for `apt-get update`, and the recipes would report
    // its packages as missing.
    command.arg("--aptopt=APT::Update::Error-Mode \"any\"");
    for line in host::apt_proxy() {
        command.arg(format!("--aptopt={line}"));
    }
    // No fsync: a tree half made at a power failure is no cache entry yet, and is made again.
    command.arg("--dpkgopt=force-unsafe-io");
    for pattern in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={pattern}"));
    }
    command.arg(SUITE).arg(root);
    if let Some(mirror) = host::debian_mirror() {
        for suite in [SUITE].iter().chain(&MORE_SUITES) {
            command.arg(format!("deb {mirror} {suite} main"));
        }
    }
    run_in_own_namespace(command)?;

    // If the host has no mirror configured, mmdebstrap has chosen one; the additional suites use the same.
    let sources = root.join("etc/apt/sources.list");
    let text =
        fs::read_to_string(&sources).with_context(|| format!("reading {}", sources.display()))?;
    let backports = MORE_SUITES[1];
    if !text.contains(backports) {
        let Some(line) = text
            .lines()
            .find(|l| l.starts_with("deb ") && l.contains(&format!(" {SUITE} ")))
        else {
            bail!(
                "mmdebstrap wrote no line for {SUITE} into {}",
                sources.display()
            );
        };
        let more = line.replace(&format!(" {SUITE} "), &format!(" {backports} "));
        fs::write(&sources, format!("{text}{more}\n"))?;
    }
    for dir in MOUNT_POINTS {
        fs::create_dir_all(root.join(dir))?;
    }
    Ok(())
}

/// Runs mmdebstrap in its own mount namespace: if it is killed, its mounts in the tree disappear from the
/// host.
fn run_in_own_namespace(command: Command) -> Result<()> {
    let output = Sandbox::new(Path::new("/"), command.get_program())
        .own_processes()
        .args(command.get_args())
        .command()?
        .stdin(Stdio::null())
        .output()
        .context("starting mmdebstrap")?;
    if !output.status.success() {
        let args: Vec<_> = command.get_args().collect();
        let text = String::from_utf8_lossy(&output.stderr);
        bail!(sandbox::failure(
            "making the tree",
            Path::new("mmdebstrap"),
            &args,
            output.status,
            &text
        ));
    }
    Ok(())
}
