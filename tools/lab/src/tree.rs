//! The distribution tree: root of every guest, and home of the compilers and of QEMU.
//!
//! Made once by mmdebstrap. After that nobody writes to it: guests see it read-only under an
//! overlay, and the sandbox mounts over it what it needs. Further packages are layers beside it.

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

/// The distribution's release. Its own compilers must be those that its kernel was built with.
const SUITE: &str = "trixie";
/// The suites beside it; the kernel comes from backports.
const MORE_SUITES: [&str; 2] = ["trixie-updates", "trixie-backports"];

const PACKAGES: &[&str] = &[
    // the kernel's tool chain
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
    // the machine
    "busybox-static",
    "qemu-system-x86",
    "kmod",
    // what tests and people use in a guest
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

/// No guest and no recipe reads these: without them the tree is 1.2 GB instead of 2.1. A `*` matches slashes, too,
/// so versions are spelled with `?`.
const LEFT_OUT: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    // rust-src: the kernel compiles library/ alone.
    "/usr/src/rustc-?.??.?/src/*",
    "/usr/src/rustc-?.??.?/compiler/*",
    "/usr/src/rustc-?.??.?/tests/*",
    // What bindgen's dependencies bring for writing compilers; bindgen itself uses libclang.so.
    "/usr/lib/llvm-??/lib/lib*.a",
    "/usr/lib/llvm-??/include/*",
    "/usr/lib/llvm-??/bin/llvm-exegesis",
    "/usr/bin/x86_64-linux-gnu-lto-dump-??",
    // The machine has 64 bits.
    "/usr/bin/qemu-system-i386",
];

/// What the sandbox and the guest mount over.
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

/// Recipe and cache entry of the tree.
pub struct Tree {
    entry: Entry,
    name: String,
}

impl Tree {
    /// The tree, made first if the cache has none.
    ///
    /// # Errors
    /// Without mmdebstrap, a network or room; says which.
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

    /// Its root directory.
    pub fn root(&self) -> PathBuf {
        self.entry.path().join("root")
    }

    /// A name that changes with what is in it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The packages of this name that are installed, each with its version.
    ///
    /// # Errors
    /// When one is not installed.
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

    /// A program of the tree, to be run in it.
    pub fn sandbox(&self, program: &str) -> Sandbox {
        Sandbox::new(&self.root(), program)
    }

    /// One of the lab's shell recipes, run in the tree with `out` as `/lab/out`. Package lists
    /// and caches that it fetches are not kept.
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

    /// A layer with further packages, made first if the cache has none.
    ///
    /// # Errors
    /// When apt does not know one of them or cannot install it.
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
            // For people who look into the cache.
            fs::write(dir.join("packages"), packages.join("\n") + "\n")?;
            let (upper, work) = (dir.join("upper"), dir.join("work"));
            let merged = dir.join("merged");
            for d in [&upper, &work, &merged] {
                fs::create_dir(d)?;
            }
            // Maintainer scripts must not start services here, and see no network of ours but apt.
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
    // An archive that cannot be reached is only a warning to `apt-get update` otherwise, and the recipes would
    // take it for one that lacks their packages.
    command.arg("--aptopt=APT::Update::Error-Mode \"any\"");
    for line in host::apt_proxy() {
        command.arg(format!("--aptopt={line}"));
    }
    // A tree that a power cut leaves half written is no entry of the cache, and made again.
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

    // Without a mirror of the host's, mmdebstrap chose one; the further suites come from there too.
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

/// mmdebstrap mounts into the tree; if it is killed, nothing may stay mounted on the host.
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
