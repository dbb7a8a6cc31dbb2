//! Soft-RoCE with dma-buf support: the source of the guest's kernel with the patches in `recipes/rxe`, loaded
//! instead of the kernel's own module (`--rdma dmabuf`).

use std::fs;

use anyhow::Result;

use crate::{
    cache::{Cache, Entry, Recipe, remove_tree},
    kernel::{Kernel, Source},
    tree::Tree,
};

const RECIPE: &str = include_str!("../recipes/rxe.sh");
const PATCHES: [(&str, &str); 2] = [
    (
        "1.patch",
        include_str!(
            "../recipes/rxe/0001-RDMA-rxe-Refuse-to-prefetch-memory-regions-that-are-.patch"
        ),
    ),
    (
        "2.patch",
        include_str!("../recipes/rxe/0002-RDMA-rxe-Add-memory-regions-over-dma-bufs.patch"),
    ),
];

/// The module's name.
pub const MODULE: &str = "rdma_rxe.ko";

/// The directory with the module for `kernel`, made at the first call.
///
/// # Errors If a patch does not apply to the kernel's source, or the module does not compile.
pub fn get(cache: &Cache, tree: &Tree, kernel: &Kernel) -> Result<Entry> {
    let build = Source::get(cache, tree, &kernel.named())?;
    let mut recipe = Recipe::new(format!("rxe-{}", kernel.release()))
        .with(build.dir().display().to_string())
        .with(RECIPE);
    for (_, text) in PATCHES {
        recipe = recipe.with(text);
    }
    cache.entry(recipe, "building soft-RoCE with dma-bufs", |dir| {
        let source = Source::prepared(cache, tree, kernel.package())?;
        let patches = dir.join("patches");
        fs::create_dir(&patches)?;
        for (name, text) in PATCHES {
            fs::write(patches.join(name), text)?;
        }
        tree.recipe(RECIPE, dir)
            .bind_read_only(source.tarball(), "/lab/source.tar.xz")
            .bind_read_only(&patches, "/lab/patches")
            .bind_read_only(build.dir(), "/lab/linux")
            .args(build.make_variables())
            .run("building soft-RoCE with dma-bufs")?;
        remove_tree(&patches)
    })
}
