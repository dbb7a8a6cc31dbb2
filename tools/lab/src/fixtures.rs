//! Programs and modules for tests only, built in the distribution tree.
//!
//! `tests/lab/fixtures/c/NAME.c` becomes the programs NAME and NAME-static,
//! `tests/lab/fixtures/preload/NAME.c` the library NAME.so, and each directory in
//! `tests/lab/fixtures/modules` its modules. A guest has them in `/opt/peerbuf/fixtures`, with the files of
//! `tests/lab/fixtures/python`, some of the kernel's own tests, and rdma-core's.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    kernel::Source,
    progress::Step,
    project::{self, Project},
    rdma_core,
    run::Ground,
    sandbox::Mount,
    selftests,
    tree::Tree,
};

const COMPILE: &str = "set -eu; cd /lab/build/fixtures/c; for c in *.c; do [ -e \"$c\" ] || continue; \
    gcc-14 -O2 -Wall -Wextra -Werror -I/lab/build/uapi/include -o \"/lab/build/out/${c%.c}\" \"$c\"; \
    gcc-14 -O2 -static -I/lab/build/uapi/include -o \"/lab/build/out/${c%.c}-static\" \"$c\"; done; \
    cp ../python/* /lab/build/out";

/// The script that builds the libraries to preload, of the sources in its argument.
pub const PRELOAD: &str = "set -eu; for c in \"$1\"/*.c; do name=${c##*/}; gcc-14 -O2 -Wall -Wextra -Werror -shared \
    -fPIC -o \"/lab/build/out/${name%.c}.so\" \"$c\" -libverbs; done";

/// Builds what changed, for the kernel of `source`, and returns the directory with everything.
///
/// # Errors If something does not compile, with the compiler's messages.
pub fn build(project: &Project, ground: &Ground, source: &Source) -> Result<PathBuf> {
    let tree = &ground.tree;
    let selftests = selftests::get(&ground.cache, tree, &ground.kernel)?;
    let rdma_core = rdma_core::get(&ground.cache, tree)?;
    let work = project.work_dir(&format!("fixtures-{}", source.name()))?;
    let _lock = project::lock(&work)?;
    let out = work.join("out");
    for dir in ["fixtures/c", "fixtures/modules", "out"] {
        fs::create_dir_all(work.join(dir))?;
    }
    let fixtures = project.root().join("tests/lab/fixtures");
    project::mirror(&fixtures, &work.join("fixtures"))?;
    project::mirror(
        &project.root().join("uapi/include"),
        &work.join("uapi/include"),
    )?;
    let made_of = project::made_of(&[&work.join("fixtures"), &work.join("uapi")], source)?
        + COMPILE
        + PRELOAD
        + &selftests.path().display().to_string()
        + &rdma_core.path().display().to_string();
    let stamp = work.join("made-of");
    if fs::read_to_string(&stamp).ok().as_deref() == Some(&made_of) {
        return Ok(out);
    }
    let step = Step::start("building the tests' fixtures");
    crate::cache::remove_tree(&out)?;
    fs::create_dir(&out)?;
    tree.sandbox("/bin/sh")
        .own_processes()
        .bind(&work, "/lab/build")
        .mount(Mount::Tmpfs { at: "/tmp".into() })
        .args(["-c", COMPILE])
        .run("compiling tests/lab/fixtures/c")?;
    preload(tree, &work, "fixtures/preload")?;
    for made in [&selftests, &rdma_core] {
        copy_all(made.path(), &out)?;
    }
    // One call of make builds all: tests/lab/fixtures/modules/Kbuild lists each directory.
    let modules = work.join("fixtures/modules");
    project::build_module(tree, source, &modules)?;
    // The directories of the checkout: `work` may still have products of removed ones.
    for dir in fs::read_dir(fixtures.join("modules"))? {
        let dir = modules.join(dir?.file_name());
        if !dir.is_dir() {
            continue;
        }
        for file in fs::read_dir(&dir)? {
            let file = file?.path();
            if let (Some("ko"), Some(name)) =
                (file.extension().and_then(|e| e.to_str()), file.file_name())
            {
                fs::copy(&file, out.join(name))
                    .with_context(|| format!("copying {}", file.display()))?;
            }
        }
    }
    fs::write(&stamp, made_of)?;
    step.done();
    Ok(out)
}

/// Builds the libraries to preload, from the sources in the directory `sources` of `work`, into `work/out`.
///
/// # Errors If one does not compile, with the compiler's messages.
pub fn preload(tree: &Tree, work: &Path, sources: &str) -> Result<()> {
    let sources = format!("/lab/build/{sources}");
    tree.sandbox("/bin/sh")
        .own_processes()
        .bind(work, "/lab/build")
        .mount(Mount::Tmpfs { at: "/tmp".into() })
        .args(["-c", PRELOAD, "preload", &sources])
        .run("compiling the libraries to preload")?;
    Ok(())
}

/// Copies the files in `from` into `to`.
///
/// # Errors If one cannot be copied.
pub fn copy_all(from: &Path, to: &Path) -> Result<()> {
    for file in fs::read_dir(from)? {
        let file = file?;
        fs::copy(file.path(), to.join(file.file_name()))
            .with_context(|| format!("copying {}", file.path().display()))?;
    }
    Ok(())
}
