//! `peerbuf bench`: what the library costs, each figure beside its floor in the same run.

mod share;

use std::process::ExitCode;

use crate::Failure;

/// Arguments of `peerbuf bench`.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Measure handing over and moving buffers, beside bare messages on the same kind of socket
    Share(share::Arguments),
}

/// Runs one bench.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    match &arguments.what {
        What::Share(arguments) => share::run(arguments),
    }
}
