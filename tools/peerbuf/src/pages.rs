//! Files that a package installs beside the command, made from the command's own arguments:
//! shell completions and manual pages. Also the text of `peerbuf --version`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;
use std::{fs, io};

use clap::Command;
use clap_complete::Shell;

use crate::Failure;

/// Arguments of `peerbuf completions`.
#[derive(clap::Args)]
pub struct Completions {
    /// The shell
    shell: Shell,
}

/// Arguments of `peerbuf manual`.
#[derive(clap::Args)]
pub struct Manual {
    /// An existing directory: peerbuf.1, and a page for each command
    directory: PathBuf,
}

pub fn completions(arguments: &Completions, command: &Command) -> Result<ExitCode, Failure> {
    // bash would also offer hidden commands.
    let shown = command.get_subcommands().filter(|one| !one.is_hide_set());
    let mut command = Command::new("peerbuf")
        .version("")
        .subcommands(shown.cloned());
    clap_complete::generate(arguments.shell, &mut command, "peerbuf", &mut io::stdout());
    Ok(ExitCode::SUCCESS)
}

pub fn manual(arguments: &Manual, command: Command) -> Result<ExitCode, Failure> {
    clap_mangen::generate_to(command, &arguments.directory).map_err(|error| {
        format!(
            "writing pages in {}: {error}",
            arguments.directory.display()
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The release of library and command, the module's interface version, the kernel, and the
/// loaded module.
pub fn version() -> &'static str {
    static VERSION: LazyLock<String> = LazyLock::new(|| {
        let release = env!("CARGO_PKG_VERSION");
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease");
        let kernel =
            kernel.unwrap_or_else(|error| format!("unknown: /proc/sys/kernel/osrelease: {error}"));
        let module = match Path::new("/sys/module/peerbuf").exists() {
            true => match fs::read_to_string("/sys/module/peerbuf/srcversion") {
                Ok(source) => format!("loaded, source {}", source.trim()),
                Err(_) => "loaded".to_owned(),
            },
            false => "not loaded".to_owned(),
        };
        format!(
            "{release}\nlibrary: {release}\nfeatures needed of peerbuf.ko: {:#x}\nkernel: {}\npeerbuf.ko: {module}",
            peerbuf_uapi::FEATURES,
            kernel.trim(),
        )
    });
    &VERSION
}
