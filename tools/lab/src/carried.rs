//! What the program carries for a lab without a checkout: the sources of peerbuf.ko and peerbuf_probe.ko, and of what
//! guests have for programs with RDMA. They are built in the cache. The recipes, the patches of soft-RoCE and the
//! guest's scripts are in the program anyway.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    cache::{Cache, Recipe},
    fixtures,
    kernel::{Named, Source},
    project, rdma_core,
    tree::Tree,
};

/// Each file's path, as in the checkout, and its contents.
const FILES: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/carried.rs"));

/// The files below one of these directories.
fn below(
    directories: &'static [&str],
) -> impl Iterator<Item = &'static (&'static str, &'static [u8])> {
    let is_below = |name: &str| directories.iter().any(|dir| name.starts_with(dir));
    FILES.iter().filter(move |(name, _)| is_below(name))
}

/// The cache entry that `build` makes out of the files below these directories.
fn entry(
    cache: &Cache,
    mut recipe: Recipe,
    directories: &'static [&str],
    what: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    for (name, contents) in below(directories) {
        recipe = recipe.with(name).with(contents);
    }
    let entry = cache.entry(recipe, what, |dir| {
        for (name, contents) in below(directories) {
            let file = dir.join(name);
            fs::create_dir_all(file.parent().unwrap_or(dir))?;
            fs::write(&file, contents).with_context(|| format!("writing {}", file.display()))?;
        }
        build(dir)
    })?;
    Ok(entry.leak())
}

/// The modules for a kernel, built at the first call.
///
/// # Errors If one does not compile, with the compiler's messages.
pub fn modules(
    cache: &Cache,
    tree: &Tree,
    source: &Source,
    kernel: &Named,
) -> Result<Vec<PathBuf>> {
    let recipe = Recipe::new(format!("modules-{}", kernel.package()))
        .with(source.dir().display().to_string());
    let dir = entry(
        cache,
        recipe,
        &["kmod/", "uapi/"],
        "building peerbuf.ko",
        |dir| project::make_modules(tree, source, dir).map(drop),
    )?;
    Ok(project::MODULES
        .map(|name| dir.join("kmod").join(name))
        .into())
}

/// The directory of the guest's fixtures for programs with RDMA, built at the first call: the libraries to preload, and
/// rdma-core's own tests with the script that runs them.
///
/// # Errors If one does not compile, with the compiler's messages; those of [`rdma_core::get`].
pub fn fixtures(cache: &Cache, tree: &Tree) -> Result<PathBuf> {
    let tests = rdma_core::get(cache, tree)?;
    let recipe = Recipe::new("fixtures")
        .with(tests.path().display().to_string())
        .with(fixtures::PRELOAD);
    let what = "building the libraries to preload";
    let dir = entry(cache, recipe, &["preload/", "python/"], what, |dir| {
        let out = dir.join("out");
        fs::create_dir(&out)?;
        fixtures::preload(tree, dir, "preload")?;
        fixtures::copy_all(&dir.join("python"), &out)?;
        fixtures::copy_all(tests.path(), &out)
    })?;
    Ok(dir.join("out"))
}

/// The command `peerbuf` beside this program, where `cargo install` puts it; guests get it if it is there.
pub fn command() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let command = program.with_file_name("peerbuf");
    command.is_file().then_some(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_carries_each_source_of_the_modules() {
        let carried = Path::new(env!("CARGO_MANIFEST_DIR")).join("carried");
        let names: Vec<_> = FILES.iter().map(|(name, _)| *name).collect();
        let kbuild = fs::read_to_string(carried.join("kmod/Kbuild")).unwrap();
        for name in [
            "kmod/Kbuild",
            "kmod/COPYING",
            "uapi/include/peerbuf.h",
            "uapi/src/abi.rs",
        ] {
            assert!(names.contains(&name), "{name}");
        }
        let objects = kbuild
            .split_whitespace()
            .filter_map(|word| word.strip_suffix(".o"));
        for object in objects.filter(|object| !object.starts_with("peerbuf")) {
            let is = |ending| names.contains(&format!("kmod/{object}.{ending}").as_str());
            assert!(is("rs") || is("c"), "{object}.o has no source");
        }
        let built =
            |name: &&str| name.ends_with(".o") || name.ends_with(".mod.c") || name.ends_with(".ko");
        assert!(!names.iter().any(built));
    }
}
