//! `cargo lab package`: everything that is installed, in one directory. Needs neither root nor the distribution tree.

use std::{path::Path, process::Command};

use anyhow::{Context, Result};

use crate::{
    progress::{Step, note},
    project::{self, Project},
};

/// Builds the Debian packages and the wheel for Python into `out`. Returns the exit status of the step that failed: 77
/// if this machine lacks what the wheel needs, in which case the Debian packages are there.
///
/// # Errors If there is no checkout, or a script of it cannot be started.
pub fn package(out: &Path, dev: bool) -> Result<i32> {
    let project = Project::find()?;
    let out = std::path::absolute(out)?;
    let profile = if dev { "dev" } else { "release" };
    let steps: [(&str, &str, &[&str]); 2] = [
        ("building the Debian packages", "tools/packages/build", &[]),
        (
            "building the wheel for Python",
            "lib/python/wheel",
            &["--profile", profile],
        ),
    ];
    for (what, script, options) in steps {
        let step = Step::start(what);
        let mut command = Command::new(project.root().join(script));
        command
            .arg(&out)
            .args(options)
            .env("PEERBUF_PROFILE", profile);
        let status = project::outside(&mut command, project.root())
            .status()
            .with_context(|| format!("starting {script}"))?;
        if !status.success() {
            note(format_args!("{script} ended with {status}"));
            return Ok(status.code().unwrap_or(1));
        }
        step.done();
    }
    Ok(0)
}
