//! The checkout: its parts, and the builds of its programs and modules.

use std::{
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use walkdir::WalkDir;

use crate::{cache::Recipe, kernel::Source, progress::Step, sandbox, tree::Tree};

/// A checkout of peerbuf.
pub struct Project {
    root: PathBuf,
    target: PathBuf,
    metadata: serde_json::Value,
}

impl Project {
    /// The checkout in which cargo started this program, or else the one around the current directory, if there is
    /// one. An installed lab runs anywhere, with the sources that it carries.
    ///
    /// # Errors If cargo cannot read it.
    pub fn here() -> Result<Option<Self>> {
        let here = match std::env::var_os("CARGO_MANIFEST_DIR") {
            Some(dir) => PathBuf::from(dir),
            None => std::env::current_dir().context("finding the current directory")?,
        };
        let root = here
            .ancestors()
            .find(|dir| dir.join("tools/lab/carried").is_dir());
        root.map(Self::at).transpose()
    }

    /// The checkout, for commands that are nothing without it.
    ///
    /// # Errors If there is none, or cargo cannot read it.
    pub fn find() -> Result<Self> {
        Self::here()?.context(
            "this needs a checkout of peerbuf, and there is none around the current directory; `run`, `pair`, `shell`, \
             `kmod`, `kbuild`, `tree`, `cache` and `clean` work anywhere",
        )
    }

    fn at(root: &Path) -> Result<Self> {
        let output = cargo(root)
            .args(["metadata", "--no-deps", "--offline", "--format-version=1"])
            .output()?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!(
                "reading the workspace at {} with cargo failed:\n{}",
                root.display(),
                sandbox::tail(&text, 20)
            );
        }
        let json: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let target = json["target_directory"]
            .as_str()
            .context("cargo metadata names no target directory")?;
        let target = PathBuf::from(target);
        Ok(Self {
            root: root.to_owned(),
            target,
            metadata: json,
        })
    }

    /// `[package.metadata]` of a package of the workspace.
    ///
    /// # Errors If there is no such package.
    pub fn package_metadata(&self, package: &str) -> Result<&serde_json::Value> {
        let packages = self.metadata["packages"].as_array();
        packages
            .into_iter()
            .flatten()
            .find(|p| p["name"] == package)
            .map(|p| &p["metadata"])
            .with_context(|| format!("the workspace has no package {package}"))
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory for the lab among the build products.
    ///
    /// # Errors If it cannot be made.
    pub fn work_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.target.join("lab").join(name);
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(dir)
    }

    /// The command `peerbuf`, with the crate's examples if requested, built if necessary.
    ///
    /// # Errors If it does not compile, with the compiler's messages.
    pub fn peerbuf(&self, examples: bool) -> Result<Vec<PathBuf>> {
        let step = Step::start("building the command peerbuf");
        let mut args = vec!["build", "--package=peerbuf-cli", "--bins"];
        if examples {
            args.extend(["--package=peerbuf", "--examples"]);
        }
        let built = self.cargo_build(&args)?;
        step.done();
        Ok(built.into_iter().map(|p| p.file).collect())
    }

    /// The suite's programs, built if necessary.
    ///
    /// # Errors If one does not compile, with the compiler's messages.
    pub fn suite(&self) -> Result<Vec<Program>> {
        let step = Step::start("building the lab's suite");
        let package = "--package=peerbuf-lab-suite";
        let programs = self.cargo_build(&["test", "--no-run", package, "--tests"])?;
        step.done();
        Ok(programs)
    }

    /// Builds with cargo and returns the resulting programs.
    ///
    /// # Errors If something does not compile, with the compiler's messages.
    pub fn cargo_build(&self, args: &[&str]) -> Result<Vec<Program>> {
        // Runs at low priority: a first call waits for the other parts, which are made at the same time.
        let mut command = Command::new("nice");
        command.args(["-n", "5"]).arg(cargo_program());
        let output = outside(&mut command, &self.root)
            .args(args)
            .args(["--message-format=json-render-diagnostics", "--quiet"])
            .stdin(Stdio::null())
            .output()
            .context("starting cargo")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!(
                "`cargo {}` failed:\n{}",
                args.join(" "),
                sandbox::tail(&text, 60)
            );
        }
        let mut programs = Vec::new();
        for line in output
            .stdout
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
        {
            let message: serde_json::Value = serde_json::from_slice(line)?;
            let target = &message["target"];
            if let (Some(file), Some(name)) =
                (message["executable"].as_str(), target["name"].as_str())
            {
                let is_test = target["kind"]
                    .as_array()
                    .is_some_and(|k| k.iter().any(|k| k == "test"));
                programs.push(Program {
                    name: name.into(),
                    file: file.into(),
                    is_test,
                });
            }
        }
        Ok(programs)
    }

    /// Builds [`MODULES`] for one kernel, outside the sources, and returns their paths; an empty list if
    /// there is nothing to build.
    ///
    /// # Errors If one does not compile, with the compiler's messages.
    pub fn modules(&self, tree: &Tree, source: &Source) -> Result<Vec<PathBuf>> {
        if !self.root.join("kmod/Makefile").is_file() {
            return Ok(Vec::new());
        }
        let work = self.work_dir(&format!("kmod-{}", source.name()))?;
        let _lock = lock(&work)?;
        for part in ["kmod", "uapi"] {
            mirror(&self.root.join(part), &work.join(part))?;
        }
        make_modules(tree, source, &work)
    }

    /// Builds the modules as [`Project::modules`] does, from sources that `change` has modified: it gets the
    /// directory of the copied `kmod/`.
    ///
    /// # Errors Those of `change`, and if a module does not compile.
    pub fn changed_modules(
        &self,
        tree: &Tree,
        source: &Source,
        change: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Vec<PathBuf>> {
        let work = self.work_dir(&format!("kmod-changed-{}", source.name()))?;
        let _lock = lock(&work)?;
        for part in ["kmod", "uapi"] {
            mirror(&self.root.join(part), &work.join(part))?;
        }
        change(&work.join("kmod"))?;
        make_modules(tree, source, &work)
    }
}

/// The modules in `kmod/`: the exporter and the test importer.
pub const MODULES: [&str; 2] = ["peerbuf.ko", "peerbuf_probe.ko"];

/// Builds [`MODULES`] from the sources in `work`, unless they exist already, and returns their paths.
///
/// # Errors If one does not compile, with the compiler's messages.
pub fn make_modules(tree: &Tree, source: &Source, work: &Path) -> Result<Vec<PathBuf>> {
    let modules = MODULES.map(|name| work.join("kmod").join(name));
    let stamp = work.join("made-of");
    let made_of = made_of(&[&work.join("kmod"), &work.join("uapi")], source)?;
    // Even a make with nothing to do takes seconds.
    let there = modules.iter().all(|module| module.is_file());
    if there && fs::read_to_string(&stamp).ok().as_deref() == Some(&made_of) {
        return Ok(modules.into());
    }
    let step = Step::start("building kmod/");
    // A killed make leaves a partial object, which the next make would consider complete. (A make that fails
    // removes partial objects itself.)
    let begun = work.join("begun");
    let args = |target| ["-C", "/lab/build/kmod", "KDIR=/lab/linux", target];
    if begun.exists() {
        make(tree, source, work, &args("clean"))?;
    }
    fs::write(&begun, "")?;
    let made = make(tree, source, work, &args("modules"));
    fs::remove_file(&begun)?;
    made?;
    if let Some(missing) = modules.iter().find(|module| !module.is_file()) {
        bail!(
            "`make` in kmod/ succeeded, but made no {}",
            missing.display()
        );
    }
    fs::write(&stamp, made_of)?;
    step.done();
    Ok(modules.into())
}

/// A text that changes with every source in `dirs` and with the kernel they are built for.
///
/// # Errors If a source cannot be read.
pub fn made_of(dirs: &[&Path], source: &Source) -> Result<String> {
    let mut recipe = Recipe::new("made-of").with(source.dir().display().to_string());
    for dir in dirs {
        let sources = WalkDir::new(dir).sort_by_file_name();
        for entry in sources.into_iter().filter_entry(|e| is_source(e.path())) {
            let entry = entry?;
            if entry.file_type().is_file() {
                let text = fs::read(entry.path())
                    .with_context(|| format!("reading {}", entry.path().display()))?;
                recipe = recipe.with(entry.path().display().to_string()).with(text);
            }
        }
    }
    Ok(recipe.name())
}

/// A program built by cargo.
pub struct Program {
    /// The target's name in its manifest.
    pub name: String,
    /// The path.
    pub file: PathBuf,
    /// Whether it is a test program.
    pub is_test: bool,
}

/// Builds the external module in `dir`, in place, for the kernel of `source`.
///
/// # Errors If it does not compile, with the compiler's messages.
pub fn build_module(tree: &Tree, source: &Source, dir: &Path) -> Result<()> {
    let dir = fs::canonicalize(dir).with_context(|| format!("finding {}", dir.display()))?;
    if !["Kbuild", "Makefile"].iter().any(|f| dir.join(f).is_file()) {
        bail!(
            "{} has no Kbuild or Makefile; an external module needs one, such as a Kbuild with `obj-m := NAME.o`",
            dir.display()
        );
    }
    let step = Step::start(format!("building the module in {}", dir.display()));
    make(
        tree,
        source,
        &dir,
        &["-C", "/lab/linux", "M=/lab/build", "modules"],
    )?;
    step.done();
    Ok(())
}

/// Runs `make` in the tree, with `work` at `/lab/build` and the kernel's tree at `/lab/linux`.
fn make(tree: &Tree, source: &Source, work: &Path, args: &[&str]) -> Result<()> {
    tree.sandbox("/usr/bin/make")
        .own_processes()
        .bind_read_only(source.dir(), "/lab/linux")
        .bind(work, "/lab/build")
        .mount(sandbox::Mount::Tmpfs { at: "/tmp".into() })
        .args(source.make_variables())
        .arg(format!(
            "-j{}",
            std::thread::available_parallelism().map_or(1, |n| n.get())
        ))
        .args(args)
        .run("building the module")
        .map(drop)
}

/// The cargo that started this program.
pub fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn cargo(root: &Path) -> Command {
    let mut command = Command::new(cargo_program());
    outside(&mut command, root);
    command
}

/// Makes cargo run in the checkout, without the environment that another cargo set for this program.
pub fn outside<'c>(command: &'c mut Command, root: &Path) -> &'c mut Command {
    command.current_dir(root);
    for name in [
        "CARGO_MANIFEST_DIR",
        "CARGO_MANIFEST_PATH",
        "CARGO_PKG_NAME",
    ] {
        command.env_remove(name);
    }
    command
}

/// Excludes other calls that build in the same directory.
///
/// # Errors Those of the file system.
pub fn lock(dir: &Path) -> Result<fs::File> {
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join("lock"))?;
    if file.try_lock().is_err() {
        let _step = Step::start(format!(
            "waiting for another call that builds in {}",
            dir.display()
        ));
        file.lock()?;
    }
    Ok(file)
}

/// Makes the sources in `to` equal to those in `from`. Touches only files that differ, so that make does only
/// what is needed. Ignores build products in both.
///
/// # Errors Those of the file system.
pub fn mirror(from: &Path, to: &Path) -> Result<()> {
    for entry in WalkDir::new(from)
        .into_iter()
        .filter_entry(|e| is_source(e.path()))
    {
        let entry = entry?;
        let target = to.join(entry.path().strip_prefix(from)?);
        if entry.file_type().is_dir() {
            fs::create_dir_all(&target)?;
        } else {
            let new = fs::read(entry.path())
                .with_context(|| format!("reading {}", entry.path().display()))?;
            if fs::read(&target).ok().as_ref() != Some(&new) {
                fs::write(&target, new).with_context(|| format!("writing {}", target.display()))?;
                let mode = entry.metadata()?.permissions().mode();
                fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
            }
        }
    }
    for entry in WalkDir::new(to)
        .into_iter()
        .filter_entry(|e| is_source(e.path()))
        .flatten()
    {
        let source = from.join(entry.path().strip_prefix(to)?);
        if entry.file_type().is_file() && !source.exists() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Whether a file is a source, judging by its name.
fn is_source(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let product = [
        ".o", ".ko", ".mod", ".mod.c", ".cmd", ".a", ".order", ".symvers", ".rmeta", ".d",
    ];
    let hidden = name.starts_with('.') && name.len() > 1;
    !hidden && !product.iter().any(|p| name.ends_with(p)) && name != "target"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirroring_copies_changes_removes_the_gone_and_leaves_products() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir_all(from.join("src")).unwrap();
        for (file, text) in [
            ("src/x.rs", "1"),
            ("Kbuild", "k"),
            ("junk.o", "o"),
            (".x.cmd", "c"),
        ] {
            fs::write(from.join(file), text).unwrap();
        }
        mirror(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("src/x.rs")).unwrap(), b"1");
        assert!(!to.join("junk.o").exists() && !to.join(".x.cmd").exists());

        fs::write(to.join("peerbuf.ko"), "built").unwrap();
        let before = fs::metadata(to.join("Kbuild")).unwrap().modified().unwrap();
        fs::write(from.join("src/x.rs"), "2").unwrap();
        fs::write(from.join("src/y.rs"), "3").unwrap();
        mirror(&from, &to).unwrap();
        fs::remove_file(from.join("src/y.rs")).unwrap();
        mirror(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("src/x.rs")).unwrap(), b"2");
        assert!(!to.join("src/y.rs").exists());
        assert!(to.join("peerbuf.ko").exists());
        assert_eq!(
            fs::metadata(to.join("Kbuild")).unwrap().modified().unwrap(),
            before
        );
    }
}
