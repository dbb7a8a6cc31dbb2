//! Kernels, stock and debug: the list of those available; their part of the machine (image, modules,
//! initramfs); and the tree to build modules against.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    cache::{Cache, Entry, Recipe, remove_tree},
    sandbox::{self, Sandbox},
    tree::Tree,
};

const KERNEL_RECIPE: &str = include_str!("../recipes/kernel.sh");
const LIST_RECIPE: &str = include_str!("../recipes/kernels.sh");
const INITRAMFS_RECIPE: &str = include_str!("../recipes/initramfs.sh");
const INITRAMFS: &str = include_str!("../carried/init/initramfs");
const SOURCE_RECIPE: &str = concat!(
    include_str!("../recipes/kernel-functions.sh"),
    include_str!("../recipes/linux-source.sh")
);
/// The script that [`SOURCE_RECIPE`] calls.
const PREPARE_TREE: &str = include_str!("../carried/kmod/prepare-tree");
const DEBUG_RECIPE: &str = concat!(
    include_str!("../recipes/kernel-functions.sh"),
    include_str!("../recipes/debug-kernel.sh")
);
const DEBUG_CONFIG: &str = include_str!("../recipes/debug-kernel.config");

/// The name of the debug kernel for `--kernel`.
pub const DEBUG: &str = "debug";
/// The name of the newest kernel that the module supports and the distribution offers.
pub const STOCK: &str = "stock";
/// The kernel series that peerbuf.ko supports, newest last. Rust's kernel interfaces change with each series,
/// and the distribution adds series at any time; `kmod/Makefile` refuses unsupported ones.
pub const SERIES: &[&str] = &["7.2", "7.3"];
/// The packages with the compilers of the debug kernel.
const COMPILERS: &[&str] = &[
    "clang-19", "lld-19", "llvm-19", "rustc", "rust-src", "bindgen",
];

/// A recipe's exit status if the distribution does not offer the version.
const NOT_OFFERED: i32 = 40;
/// A recipe's exit status if the kernel was built without Rust.
const NO_RUST: i32 = 41;

/// The origin of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    /// A package of the distribution.
    Package,
    /// The source of the package of this release, with the lab's configuration.
    Source(String),
}

/// A kernel to boot.
pub struct Kernel {
    release: String,
    origin: Origin,
    image: Entry,
    initramfs: Entry,
}

/// An available kernel, before it is fetched or built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    package: String,
    debug: bool,
}

/// A kernel package offered by the distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Offered {
    release: String,
    /// Offered with headers and source, so that modules can be built for it.
    whole: bool,
}

impl Named {
    /// The release of its package, or of the package whose source it is built from.
    pub fn package(&self) -> &str {
        &self.package
    }

    /// The kernel that `wanted` names, according to the cached list, which may be old.
    ///
    /// # Errors If no list can be fetched.
    pub fn find(cache: &Cache, tree: &Tree, wanted: &str) -> Result<Option<Self>> {
        let offered = offered(cache, tree, false)?;
        Ok(choose(&offered, wanted).map(|package| Self {
            package: package.to_owned(),
            debug: wanted == DEBUG,
        }))
    }
}

impl Kernel {
    /// The kernel that `wanted` names, made first if it is not in the cache: a release; a series (`7.2`: its
    /// newest release, preferably one that modules can be built for); `stock` (the newest available release
    /// of the newest of [`SERIES`]); or `debug` (the debug kernel, built from the source of `stock`).
    ///
    /// # Errors If the distribution does not offer it, with a list of what it offers.
    pub fn get(cache: &Cache, tree: &Tree, wanted: &str) -> Result<Self> {
        // The list is as old as the tree. If a package in it no longer exists, the list is made again, once.
        let mut fresh = false;
        loop {
            let offered = offered(cache, tree, fresh).with_context(|| match fresh {
                true => format!(
                    "kernel {wanted:?} is not among those known here; asking for newer ones"
                ),
                false => format!("finding kernel {wanted:?}"),
            })?;
            let fetch = if wanted == DEBUG {
                Self::build
            } else {
                Self::fetch
            };
            match choose(&offered, wanted) {
                Some(release) => match fetch(cache, tree, release) {
                    Err(e) if !fresh && is_status(&e, NOT_OFFERED) => {}
                    other => return other,
                },
                None if fresh => bail!(
                    "no kernel package {wanted:?}: the suites offer {}; name one of them, a series (7.2) for its newest, 'stock' for the newest that peerbuf.ko supports ({}) or 'debug' for the instrumented one",
                    listed(&offered),
                    SERIES.join(", ")
                ),
                None => {}
            }
            fresh = true;
        }
    }

    fn fetch(cache: &Cache, tree: &Tree, release: &str) -> Result<Self> {
        let recipe = Recipe::new(format!("kernel-{release}"))
            .with(tree.name())
            .with(KERNEL_RECIPE);
        let image = cache.entry(
            recipe,
            &format!("fetching kernel {release} (about half a minute)"),
            |dir| {
                run(
                    tree.recipe(KERNEL_RECIPE, dir).arg(release),
                    "fetching the kernel",
                )
            },
        )?;
        Self::with_initramfs(cache, tree, Origin::Package, release.to_owned(), image)
    }

    fn build(cache: &Cache, tree: &Tree, package: &str) -> Result<Self> {
        let image = debug(cache, tree, package)?;
        let release = image.path().join("release");
        let release = fs::read_to_string(&release)
            .with_context(|| format!("reading {}", release.display()))?;
        let origin = Origin::Source(package.to_owned());
        Self::with_initramfs(cache, tree, origin, release.trim().to_owned(), image)
    }

    fn with_initramfs(
        cache: &Cache,
        tree: &Tree,
        origin: Origin,
        release: String,
        image: Entry,
    ) -> Result<Self> {
        let name = image.path().file_name().unwrap_or_default();
        let recipe = Recipe::new(format!("initramfs-{release}"))
            .with(tree.name())
            .with(name.as_encoded_bytes())
            .with(INITRAMFS_RECIPE)
            .with(INITRAMFS);
        let initramfs = cache.entry(recipe, "making the initramfs", |dir| {
            let init = dir.join("init");
            fs::write(&init, INITRAMFS)?;
            run(
                tree.recipe(INITRAMFS_RECIPE, dir)
                    .bind_read_only(&init, "/lab/init")
                    .bind_read_only(image.path(), "/lab/kernel")
                    .arg(&release),
                "making the initramfs",
            )?;
            remove_tree(&init)
        })?;
        Ok(Self {
            release,
            origin,
            image,
            initramfs,
        })
    }

    /// Its origin.
    pub fn named(&self) -> Named {
        Named {
            package: self.package().to_owned(),
            debug: self.is_debug(),
        }
    }

    /// The release string, as in `uname -r`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Whether it is the debug kernel, on which everything takes several times as long.
    pub fn is_debug(&self) -> bool {
        matches!(self.origin, Origin::Source(_))
    }

    /// The release of its package, or of the package whose source it was built from.
    pub fn package(&self) -> &str {
        match &self.origin {
            Origin::Package => &self.release,
            Origin::Source(package) => package,
        }
    }

    /// The directory with `vmlinuz` and `lib/modules`.
    pub fn dir(&self) -> &Path {
        self.image.path()
    }

    /// The directory with `initramfs`.
    pub fn initramfs_dir(&self) -> &Path {
        self.initramfs.path()
    }
}

/// The debug kernel from the source of a package, built first if it is not in the cache.
fn debug(cache: &Cache, tree: &Tree, package: &str) -> Result<Entry> {
    // The ingredients exclude most of the tree's packages: the build takes long and does not depend on them.
    let mut recipe = Recipe::new(format!("debug-{package}"))
        .with(DEBUG_RECIPE)
        .with(DEBUG_CONFIG);
    for compiler in tree.versions(COMPILERS)? {
        recipe = recipe.with(compiler);
    }
    let what = "building the debug kernel (twenty minutes on two cores)";
    cache.entry(recipe, what, |dir| {
        let source = Source::prepared(cache, tree, package)?;
        cache.make_room(2_500_000_000);
        let config = dir.join("config");
        fs::write(&config, DEBUG_CONFIG)?;
        run(
            tree.recipe(DEBUG_RECIPE, dir)
                .bind_read_only(source.tarball(), "/lab/source.tar.xz")
                .bind_read_only(&config, "/lab/config"),
            "building the debug kernel",
        )
    })
}

/// A build tree for the modules of one kernel.
pub struct Source {
    entry: Entry,
    make: &'static [&'static str],
}

impl Source {
    /// The build tree for a kernel, prepared first if it is not in the cache.
    ///
    /// # Errors If the distribution has no source for it, or the kernel was built without Rust.
    pub fn get(cache: &Cache, tree: &Tree, kernel: &Named) -> Result<Self> {
        if kernel.debug {
            return Ok(Self {
                entry: debug(cache, tree, &kernel.package)?,
                make: &["LLVM=1"],
            });
        }
        Self::prepared(cache, tree, &kernel.package)
    }

    /// The build tree of a package's kernel.
    ///
    /// # Errors
    /// As for [`Source::get`].
    pub fn prepared(cache: &Cache, tree: &Tree, release: &str) -> Result<Self> {
        let recipe = Recipe::new(format!("linux-{release}"))
            .with(tree.name())
            .with(SOURCE_RECIPE)
            .with(PREPARE_TREE);
        let what =
            format!("preparing the source of {release} for building modules (about two minutes)");
        let entry = cache.entry(recipe, &what, |dir| {
            cache.make_room(2_200_000_000);
            fs::write(dir.join("prepare-tree"), PREPARE_TREE)?;
            let result = run(tree.recipe(SOURCE_RECIPE, dir).arg(release), "preparing the kernel's source");
            match result {
                Err(e) if is_status(&e, NO_RUST) => {
                    bail!("kernel {release} was built without Rust, so peerbuf.ko cannot be built for it")
                }
                Err(e) if is_status(&e, NOT_OFFERED) => {
                    bail!("the suites offer no headers and source for {release}, so no module can be built for it; try --kernel stock, or --bare, which needs none")
                }
                other => other,
            }
        })?;
        Ok(Self {
            entry,
            make: &["CC=gcc-14", "HOSTCC=gcc-14"],
        })
    }

    /// The build tree.
    pub fn dir(&self) -> PathBuf {
        self.entry.path().join("linux")
    }

    /// A name that identifies the kernel and how the tree was made.
    pub fn name(&self) -> String {
        let name = self.entry.path().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The `make` variables that select the compilers that the kernel was built with.
    pub fn make_variables(&self) -> &'static [&'static str] {
        self.make
    }

    /// The complete source, for a tree from [`Source::prepared`].
    pub fn tarball(&self) -> PathBuf {
        self.entry.path().join("linux-source.tar.xz")
    }
}

fn offered(cache: &Cache, tree: &Tree, fresh: bool) -> Result<Vec<Offered>> {
    let recipe = || Recipe::new("versions").with(tree.name()).with(LIST_RECIPE);
    let what = "looking which kernels there are";
    let list = |dir: &Path| run(tree.recipe(LIST_RECIPE, dir), "listing kernel packages");
    if fresh {
        cache.renew(recipe(), what, list)?;
    }
    let entry = cache.entry(recipe(), what, list)?;
    let text = fs::read_to_string(entry.path().join("versions"))?;
    Ok(text.lines().map(Offered::read).collect())
}

impl Offered {
    /// Parses a line of the list.
    fn read(line: &str) -> Self {
        let image = line.strip_suffix(" image only");
        Self {
            release: image.unwrap_or(line).to_owned(),
            whole: image.is_none(),
        }
    }
}

/// The list of kernels as text.
fn listed(offered: &[Offered]) -> String {
    let of = |whole| {
        let of = offered.iter().filter(|o| o.whole == whole);
        of.map(|o| o.release.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match of(false) {
        images if images.is_empty() => of(true),
        images => format!("{} (and for --bare alone {images})", of(true)),
    }
}

/// The kind of kernel under which the history of runs is kept: [`STOCK`], [`DEBUG`] or the series.
pub fn kind(wanted: &str) -> &str {
    series(wanted.strip_prefix("linux-image-").unwrap_or(wanted))
}

/// The first two numbers of a release.
fn series(release: &str) -> &str {
    let end = release.match_indices('.').nth(1).map(|(at, _)| at);
    &release[..end.unwrap_or(release.len())]
}

/// The release in `offered` (newest last) that `wanted` names.
fn choose<'a>(offered: &'a [Offered], wanted: &str) -> Option<&'a str> {
    let name = wanted.strip_prefix("linux-image-").unwrap_or(wanted);
    let newest = |wanted: &str, whole| {
        let mut of = offered
            .iter()
            .rev()
            .filter(|o| series(&o.release) == wanted);
        of.find(|o| o.whole == whole)
    };
    let found = if name == STOCK || name == DEBUG {
        SERIES.iter().rev().find_map(|s| newest(s, true))
    } else {
        let is = |o: &&Offered| o.release == name || o.release.strip_suffix("-amd64") == Some(name);
        let named = offered.iter().find(is);
        named
            .or_else(|| newest(name, true))
            .or_else(|| newest(name, false))
    };
    found.map(|o| o.release.as_str())
}

/// A recipe's failure: its exit status, which callers may interpret, and the message.
#[derive(Debug)]
struct RecipeFailed(i32, String);

impl std::fmt::Display for RecipeFailed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.1)
    }
}

impl std::error::Error for RecipeFailed {}

fn run(sandbox: Sandbox, what: &str) -> Result<()> {
    let output = sandbox
        .command()?
        .stdin(std::process::Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let message = format!(
        "{what} in the distribution tree ended with {}; the end of its output:\n{}",
        output.status,
        sandbox::tail(&text, 30)
    );
    Err(anyhow!(RecipeFailed(
        sandbox::exit_code(output.status),
        message
    )))
}

fn is_status(error: &anyhow::Error, status: i32) -> bool {
    error
        .downcast_ref::<RecipeFailed>()
        .is_some_and(|f| f.0 == status)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(list: &str) -> Vec<Offered> {
        list.lines().map(Offered::read).collect()
    }

    #[test]
    fn a_kernel_is_named_as_people_name_it() {
        let offered = offered(
            "6.12.1+deb13-amd64\n6.18.9+deb13-amd64 image only\n7.2.9+deb13-amd64\n\
             7.2.12+deb13-amd64\n7.2.13+deb13-amd64 image only\n7.3.4+deb13-amd64\n\
             7.20.1+deb13-amd64",
        );
        let choose = |wanted| choose(&offered, wanted);
        assert_eq!(choose("6.12.1+deb13"), Some("6.12.1+deb13-amd64"));
        assert_eq!(
            choose("linux-image-7.2.12+deb13-amd64"),
            Some("7.2.12+deb13-amd64")
        );
        // Prefers one that modules can be built for, unless it is named exactly.
        assert_eq!(choose("7.2"), Some("7.2.12+deb13-amd64"));
        assert_eq!(choose("7.2.13+deb13"), Some("7.2.13+deb13-amd64"));
        assert_eq!(choose("6.12"), Some("6.12.1+deb13-amd64"));
        assert_eq!(choose("6.18"), Some("6.18.9+deb13-amd64"));
        assert_eq!(choose("7.1"), None);
        assert_eq!(choose("7"), None);
        assert_eq!(choose(""), None);
    }

    #[test]
    fn kernels_without_headers_are_listed_apart() {
        let whole = "6.12.1-amd64\n7.3.4-amd64";
        assert_eq!(listed(&offered(whole)), "6.12.1-amd64, 7.3.4-amd64");
        let some = "6.12.1-amd64\n6.18.9-amd64 image only\n7.3.4-amd64";
        assert_eq!(
            listed(&offered(some)),
            "6.12.1-amd64, 7.3.4-amd64 (and for --bare alone 6.18.9-amd64)"
        );
    }

    #[test]
    fn stock_and_debug_are_of_the_newest_series_that_the_module_supports() {
        let offered = offered(
            "7.2.9+deb13-amd64\n7.2.12+deb13-amd64\n7.3.4+deb13-amd64\n\
             7.3.5+deb13-amd64 image only\n8.0.1+deb13-amd64",
        );
        for wanted in [STOCK, DEBUG] {
            assert_eq!(choose(&offered, wanted), Some("7.3.4+deb13-amd64"));
            assert_eq!(choose(&offered[..2], wanted), Some("7.2.12+deb13-amd64"));
            assert_eq!(choose(&offered[3..], wanted), None);
            assert_eq!(choose(&[], wanted), None);
        }
    }

    fn kmod() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("carried/kmod")
    }

    #[test]
    fn the_module_and_the_lab_name_the_same_series() {
        let kbuild = fs::read_to_string(kmod().join("Kbuild")).unwrap();
        let list = kbuild.lines().find_map(|l| l.strip_prefix("supported := "));
        let list: Vec<_> = list.unwrap().split_whitespace().collect();
        assert_eq!(list, SERIES);
    }

    /// The output of `make` for a tree of that version, and whether the kernel's build began.
    fn make(version: &str) -> (String, bool) {
        let tree = tempfile::tempdir().unwrap();
        let makefile = format!(
            "kernelversion:\n\t@echo {version}\nmodules:\n\t@touch {}/begun\n",
            tree.path().display()
        );
        fs::write(tree.path().join("Makefile"), makefile).unwrap();
        let output = std::process::Command::new("make")
            .arg("-sC")
            .arg(kmod())
            .arg(format!("KDIR={}", tree.path().display()))
            .env_remove("MAKEFLAGS")
            .output()
            .expect("make, as every machine has it that builds modules");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        (text, tree.path().join("begun").exists())
    }

    #[test]
    fn make_refuses_other_kernels_in_one_line_that_names_those_that_do() {
        for version in ["7.1.9", "6.12.107", "7.4.0-rc1", "7.20.1", "72.3.0", ""] {
            let (text, begun) = make(version);
            assert!(!begun, "{version:?}: the build was begun");
            assert_eq!(text.lines().count(), 1, "{text}");
            for word in SERIES.iter().chain([&version]) {
                assert!(text.contains(word), "{version:?}: {text}");
            }
        }
        for version in ["7.2.13", "7.3.4", "7.3.0-rc7"] {
            let (text, begun) = make(version);
            assert!(begun && text.is_empty(), "{version}: {text}");
        }
    }

    /// The configuration in a headers package, for a kernel built with gcc and with Rust.
    const CONFIG: &str = "CONFIG_CC_VERSION_TEXT=\"x86_64-linux-gnu-gcc (Distribution 14.2.0-19) 14.2.0\"\n\
                          CONFIG_RUST=y\nCONFIG_DEBUG_INFO_BTF=y\n# CONFIG_VGEM is not set\n";

    /// A source archive's Makefile for 7.3.4, which writes the same files as the kernel's. `more` adds rules.
    fn makefile(more: &str) -> String {
        format!(
            "kernelversion:\n\t@echo 7.3.4\nolddefconfig::\n\t@echo CONFIG_CC_VERSION_TEXT=here >>.config\n\
             prepare::\n\t@mkdir -p include/config\n\
             \t@echo 7.3.4$(LOCALVERSION) >include/config/kernel.release\nmodules_prepare::\n{more}"
        )
    }

    /// The exit status, the output and the products of kmod/prepare-tree for `release`, given this headers
    /// package and source archive.
    fn prepare_tree(
        release: &str,
        config: &str,
        makefile: &str,
    ) -> (i32, String, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| {
            let file = dir.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("headers/.config", config);
        write("headers/Module.symvers", "0x0\tdma_buf_export\tvmlinux\n");
        write("linux-7.3.4/Makefile", makefile);
        write("linux-7.3.4/scripts/config", "#!/bin/sh\n");
        for file in "sub/Makefile Kconfig Kbuild arch/x86/a certs/a drivers/android/a.h drivers/base/a.h \
                     drivers/gpu/a.h include/a init/a kernel/bounds.c kernel/a.h kernel/sched/rq-offsets.c \
                     kernel/time/timeconst.bc lib/vdso/a rust/a security/selinux/include/a tools/a usr/a lib/not-for-modules.c"
            .split_whitespace()
        {
            write(&format!("linux-7.3.4/{file}"), "");
        }
        let scripts = "set -e; cd \"$1\"; chmod 755 linux-7.3.4/scripts/config; \
                       tar -cf source.tar linux-7.3.4; rm -r linux-7.3.4; \
                       exec \"$2\" --headers headers --source source.tar tree \"$3\" 2>&1";
        let output = std::process::Command::new("sh")
            .args(["-c", scripts, "sh"])
            .arg(dir.path())
            .arg(fs::canonicalize(kmod().join("prepare-tree")).unwrap())
            .arg(release)
            .env_remove("MAKEFLAGS")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.code().unwrap(), text, dir)
    }

    #[test]
    fn prepare_tree_makes_a_tree_of_the_kernels_release_and_says_how_to_build_with_it() {
        let (status, text, dir) = prepare_tree("7.3.4+deb13-amd64", CONFIG, &makefile(""));
        assert_eq!(status, 0, "{text}");
        let tree = dir.path().join("tree");
        let line = format!("make -C kmod KDIR={} CC=gcc HOSTCC=gcc", tree.display());
        assert_eq!(text.lines().last(), Some(line.as_str()));
        let release = fs::read_to_string(tree.join("include/config/kernel.release")).unwrap();
        assert_eq!(release, "7.3.4+deb13-amd64\n");
        assert!(tree.join("Module.symvers").is_file());
        assert!(!tree.join("lib/not-for-modules.c").exists());
        // A kernel whose preparation reads more files gets its complete source.
        let more = makefile("prepare::\n\t@test -f lib/not-for-modules.c\n");
        let (status, text, dir) = prepare_tree("7.3.4+deb13-amd64", CONFIG, &more);
        assert_eq!(status, 0, "{text}");
        assert!(dir.path().join("tree/lib/not-for-modules.c").is_file());
    }

    #[test]
    fn prepare_tree_refuses_what_would_make_no_module_for_the_kernel() {
        let release = "7.3.4+deb13-amd64";
        let without_btf = "olddefconfig::\n\t@sed -i /BTF/d .config\n";
        let cases = [
            (
                NO_RUST,
                release,
                "CONFIG_VGEM=m\n".to_owned(),
                "",
                vec!["CONFIG_RUST"],
            ),
            (42, "7.3.40", CONFIG.to_owned(), "", vec!["7.3.4,"]),
            (
                42,
                "7.2.12+deb13-amd64",
                CONFIG.to_owned(),
                "",
                vec!["7.3.4", "7.2.12"],
            ),
            (
                43,
                release,
                CONFIG.to_owned(),
                without_btf,
                vec!["< CONFIG_DEBUG_INFO_BTF=y"],
            ),
            (
                43,
                release,
                CONFIG.replace("gcc", "gcc-0"),
                "",
                vec!["gcc-0"],
            ),
            (
                2,
                release,
                CONFIG.to_owned(),
                "prepare::\n\t@exit 7\n",
                vec!["Error 7"],
            ),
        ];
        for (expected, release, config, more, words) in cases {
            let (status, text, _dir) = prepare_tree(release, &config, &makefile(more));
            assert_eq!(status, expected, "{text}");
            for word in words {
                assert!(text.contains(word), "{word}: {text}");
            }
        }
    }
}
