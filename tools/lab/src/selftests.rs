//! The kernel's selftests of udmabuf and of the dma-buf heaps, compiled from the source of the guest's
//! kernel: peerbuf must not disturb other exporters.

use anyhow::Result;

use crate::{
    cache::{Cache, Entry, Recipe},
    kernel::{Kernel, Source},
    tree::Tree,
};

const SELFTESTS_RECIPE: &str = include_str!("../recipes/selftests.sh");

/// The directory with `selftest-udmabuf` and `selftest-dmabuf-heap`, made at the first call.
///
/// # Errors If they do not compile.
pub fn get(cache: &Cache, tree: &Tree, kernel: &Kernel) -> Result<Entry> {
    let package = kernel.package();
    let recipe = Recipe::new(format!("selftests-{package}"))
        .with(tree.name())
        .with(SELFTESTS_RECIPE);
    cache.entry(recipe, "compiling the kernel's own tests", |dir| {
        let source = Source::prepared(cache, tree, package)?;
        tree.recipe(SELFTESTS_RECIPE, dir)
            .bind_read_only(source.tarball(), "/lab/source.tar.xz")
            .run("compiling the kernel's own tests")
            .map(drop)
    })
}
