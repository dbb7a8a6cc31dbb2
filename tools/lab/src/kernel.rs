//! Stock kernels: which there are, the machine's half (image, modules, initramfs) and the
//! builder's half (a tree to build modules against).

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

use crate::{
    cache::{Cache, Entry, Recipe, remove_tree},
    sandbox::{self, Sandbox},
    tree::Tree,
};

const KERNEL_RECIPE: &str = include_str!("../recipes/kernel.sh");
const SOURCE_RECIPE: &str = include_str!("../recipes/linux-source.sh");
const INITRAMFS: &str = include_str!("../../../tests/lab/init/initramfs");

const LIST_RECIPE: &str = include_str!("../recipes/kernels.sh");

/// The exit status by which a recipe says that the suites do not offer the version.
const NOT_OFFERED: i32 = 40;
/// The exit status by which a recipe says that the kernel was built without Rust.
const NO_RUST: i32 = 41;

/// A kernel to boot: its release string and what was made of its packages.
pub struct Kernel {
    release: String,
    entry: Entry,
}

impl Kernel {
    /// The kernel that `wanted` names (`stock` is the newest the suites offer), fetched first if
    /// the cache does not have it.
    ///
    /// # Errors
    /// When the suites do not offer it; lists what they do.
    pub fn get(cache: &Cache, tree: &Tree, wanted: &str) -> Result<Self> {
        // The list is as old as the tree. Where it leads nowhere any more, it is made again, once.
        let mut fresh = false;
        loop {
            let offered = offered(cache, tree, fresh)?;
            match choose(&offered, wanted) {
                Some(release) => match Self::fetch(cache, tree, release) {
                    Err(e) if !fresh && is_status(&e, NOT_OFFERED) => {}
                    Err(e) => return Err(e),
                    Ok(kernel) => return Ok(kernel),
                },
                None if fresh => bail!(
                    "no kernel package {wanted:?}: the suites offer {}; name one of them, or 'stock' for the newest",
                    offered.join(", ")
                ),
                None => {}
            }
            fresh = true;
        }
    }

    fn fetch(cache: &Cache, tree: &Tree, release: &str) -> Result<Self> {
        let recipe = Recipe::new(format!("kernel-{release}"))
            .with(tree.name())
            .with(KERNEL_RECIPE)
            .with(INITRAMFS);
        let entry = cache.entry(
            recipe,
            &format!("fetching kernel {release} (about half a minute)"),
            |dir| {
                let init = dir.join("init");
                std::fs::write(&init, INITRAMFS)?;
                run(
                    tree.recipe(KERNEL_RECIPE, dir)
                        .bind_read_only(&init, "/lab/init")
                        .arg(release),
                    "fetching the kernel",
                )?;
                remove_tree(&init)
            },
        )?;
        Ok(Self {
            release: release.to_owned(),
            entry,
        })
    }

    /// Its release string, as `uname -r` gives it.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Holds `vmlinuz`, `initramfs` and `lib/modules`.
    pub fn dir(&self) -> &Path {
        self.entry.path()
    }
}

/// A tree that modules for one kernel are built against.
pub struct Source {
    entry: Entry,
}

impl Source {
    /// The tree for `release`, prepared first if the cache has none.
    ///
    /// # Errors
    /// When the suites have no source for it, or the kernel was built without Rust.
    pub fn get(cache: &Cache, tree: &Tree, release: &str) -> Result<Self> {
        let recipe = Recipe::new(format!("linux-{release}"))
            .with(tree.name())
            .with(SOURCE_RECIPE);
        let what =
            format!("preparing the source of {release} for building modules (about two minutes)");
        let entry = cache.entry(recipe, &what, |dir| {
            let result = run(tree.recipe(SOURCE_RECIPE, dir).arg(release), "preparing the kernel's source");
            match result {
                Err(e) if is_status(&e, NO_RUST) => {
                    bail!("kernel {release} was built without Rust, so peerbuf.ko cannot be built for it")
                }
                Err(e) if is_status(&e, NOT_OFFERED) => {
                    bail!("the suites offer no headers and source for {release} any more; try --kernel stock")
                }
                other => other,
            }
        })?;
        Ok(Self { entry })
    }

    /// The prepared tree.
    pub fn dir(&self) -> PathBuf {
        self.entry.path().join("linux")
    }
}

fn offered(cache: &Cache, tree: &Tree, fresh: bool) -> Result<Vec<String>> {
    let recipe = || Recipe::new("versions").with(tree.name()).with(LIST_RECIPE);
    if fresh {
        cache.forget(recipe())?;
    }
    let entry = cache.entry(recipe(), "looking which kernels there are", |dir| {
        run(tree.recipe(LIST_RECIPE, dir), "listing kernel packages")
    })?;
    let text = std::fs::read_to_string(entry.path().join("versions"))?;
    Ok(text.lines().map(str::to_owned).collect())
}

fn choose<'a>(offered: &'a [String], wanted: &str) -> Option<&'a str> {
    let name = wanted.strip_prefix("linux-image-").unwrap_or(wanted);
    let newest = || offered.last();
    let found = if name == "stock" {
        newest()
    } else {
        offered
            .iter()
            .find(|o| *o == name || o.strip_suffix("-amd64") == Some(name))
    };
    found.map(String::as_str)
}

/// A recipe's failure: the exit status, for who knows what it means, and the message.
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

    #[test]
    fn a_kernel_is_named_as_people_name_it() {
        let offered = ["6.12.1+deb13-amd64", "7.2.12+deb13-amd64"].map(String::from);
        assert_eq!(choose(&offered, "stock"), Some("7.2.12+deb13-amd64"));
        assert_eq!(choose(&offered, "6.12.1+deb13"), Some("6.12.1+deb13-amd64"));
        assert_eq!(
            choose(&offered, "linux-image-7.2.12+deb13-amd64"),
            Some("7.2.12+deb13-amd64")
        );
        assert_eq!(choose(&offered, "7.2"), None);
        assert_eq!(choose(&[], "stock"), None);
    }
}
