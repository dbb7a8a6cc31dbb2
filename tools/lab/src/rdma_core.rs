//! rdma-core's own Python tests, from the source package of the guest's libibverbs.

use anyhow::Result;

use crate::{
    cache::{Cache, Entry, Recipe},
    tree::Tree,
};

const RECIPE: &str = include_str!("../recipes/rdma-core-tests.sh");

/// The directory with `rdma-core-tests.tar`, made at the first call.
///
/// # Errors If the archive lacks the source of the installed version.
pub fn get(cache: &Cache, tree: &Tree) -> Result<Entry> {
    let recipe = Recipe::new("rdma-core-tests")
        .with(tree.name())
        .with(RECIPE);
    let what = "fetching rdma-core's own tests";
    cache.entry(recipe, what, |dir| {
        tree.recipe(RECIPE, dir).run(what).map(drop)
    })
}
