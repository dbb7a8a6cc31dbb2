//! The stranger's program (`lib/examples/stranger`), a program with RDMA by `sideway`.
//!
//! The bindings that sideway uses need CMake, libclang and a C compiler, which a machine that builds peerbuf
//! need not have. The distribution tree has the compilers, and a layer on it has CMake. So cargo runs there,
//! with the host's tool chain and downloaded crates.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    progress::Step,
    project::{self, Project},
    run::Ground,
    sandbox::{Mount, Sandbox},
};

/// The program's directory in the checkout.
const PACKAGE: &str = "lib/examples/stranger";

/// Builds it, if necessary, and returns its programs.
///
/// # Errors If its dependencies are unavailable, or something does not compile, with the compiler's messages.
pub fn build(project: &Project, ground: &Ground) -> Result<Vec<PathBuf>> {
    let manifest = project.root().join(PACKAGE).join("Cargo.toml");
    let work = project.work_dir("stranger")?;
    let _lock = project::lock(&work)?;
    let step = Step::start("building the stranger's program (in the distribution tree)");
    let out = work.join("target");
    let merged = work.join("root");
    for dir in [&out, &merged] {
        fs::create_dir_all(dir)?;
    }
    // Fetches on the host, because the tree has no network. If dependencies of peerbuf's crates have changed,
    // this also updates the program's lock file.
    let mut fetch = Command::new(project::cargo_program());
    fetch.args(["fetch", "--quiet", "--manifest-path"]);
    answer(fetch.arg(&manifest))?;
    let sysroot = answer(Command::new("rustc").args(["--print", "sysroot"]))?;
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let home = home.context("neither CARGO_HOME nor HOME says where cargo keeps its downloads")?;
    let layer = ground.tree.layer(&ground.cache, &["cmake".to_owned()])?;
    let lower = vec![layer.path().join("upper"), ground.tree.root()];
    Sandbox::new(&merged, "/opt/peerbuf/bin/cargo")
        .own_processes()
        .overlay_root(lower, None)
        .mount(Mount::Tmpfs { at: "/tmp".into() })
        .bind_read_only(project.root(), "/lab/src")
        .bind_read_only(Path::new(sysroot.trim()), "/opt/peerbuf")
        .bind(home, "/lab/linux")
        .bind(&out, "/lab/out")
        .env("PATH", "/opt/peerbuf/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("CARGO_HOME", "/lab/linux")
        .env("CC", "gcc-14")
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER", "gcc-14")
        .env("LIBCLANG_PATH", "/usr/lib/llvm-19/lib")
        .args(["build", "--offline", "--locked", "--quiet"])
        .args(["--target-dir", "/lab/out", "--manifest-path"])
        .arg(Path::new("/lab/src").join(PACKAGE).join("Cargo.toml"))
        .run("building the stranger's program")?;
    step.done();
    let programs = ["stranger", "stranger-raw"];
    Ok(programs.map(|name| out.join("debug").join(name)).into())
}

/// A command's output.
fn answer(command: &mut Command) -> Result<String> {
    let output = command.output().context("starting a program of Rust's")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}: {said}", output.status);
    }
    Ok(String::from_utf8(output.stdout)?)
}
