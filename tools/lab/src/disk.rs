//! The image of the guests' NVMe disk: one ext4 file system, shared by all guests, never written.

use anyhow::Result;

use crate::{
    cache::{Cache, Entry, Recipe},
    tree::Tree,
};

const DISK_RECIPE: &str = include_str!("../recipes/disk.sh");

/// The directory with `nvme.ext4`, made at the first call.
///
/// # Errors If mkfs fails or there is no room.
pub fn get(cache: &Cache, tree: &Tree) -> Result<Entry> {
    let recipe = Recipe::new("disk").with(tree.name()).with(DISK_RECIPE);
    cache.entry(recipe, "making the NVMe disk's file system", |dir| {
        tree.recipe(DISK_RECIPE, dir)
            .run("making the disk's file system")
            .map(drop)
    })
}
