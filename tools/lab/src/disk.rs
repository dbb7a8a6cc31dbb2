//! The image of the guests' NVMe disk: one ext4 file system, the same for all, never written to.

use anyhow::Result;

use crate::{
    cache::{Cache, Entry, Recipe},
    tree::Tree,
};

const DISK_RECIPE: &str = include_str!("../recipes/disk.sh");

/// The directory that holds `nvme.ext4`, made first if the cache has none.
///
/// # Errors
/// When mkfs fails or there is no room.
pub fn get(cache: &Cache, tree: &Tree) -> Result<Entry> {
    let recipe = Recipe::new("disk").with(tree.name()).with(DISK_RECIPE);
    cache.entry(recipe, "making the NVMe disk's file system", |dir| {
        tree.recipe(DISK_RECIPE, dir)
            .run("making the disk's file system")
            .map(drop)
    })
}
