//! The command `peerbuf`: shows, exports and demonstrates shared buffers.

mod accepting;
mod ask;
mod bench;
mod copy;
mod cycle;
mod demo;
mod doctor;
mod export;
mod held;
mod info;
mod load;
mod ls;
mod matrix;
mod pages;
mod places;
mod progress;
mod proofs;
mod prove;
mod rdma;
mod say;
mod size;
mod table;
mod topo;
mod why;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// Share one buffer between devices through dma-buf, and see how its bytes travel.
///
/// Start with `peerbuf doctor`, which says what works on this machine, what does not and why, and then
/// `peerbuf demo`, which moves a file's bytes through each kind of buffer and checks them.
#[derive(Parser)]
#[command(name = "peerbuf", version, long_version = pages::version(), after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit status: 0 success, 1 failure (the reason is on standard error), 2 wrong usage. For doctor, why and
prove: 0 the best path works, 1 something prevents it.

Paths, best first:
  peer-to-peer        the disk reads and writes the device's memory itself
  shared-host-memory  disk and device use the same pages of system memory
  staged-copy         the CPU carries the bytes

Tables are as wide as the terminal, or as $COLUMNS if the output is not a terminal or its width is unknown,
and at most 100 columns. Text that does not fit into a table follows it, numbered.";

#[derive(Subcommand)]
enum Command {
    /// Measure the library's cost beside that of the bare operations
    Bench(bench::Arguments),
    /// Print what completes the command's arguments in a shell
    Completions(pages::Completions),
    /// Copy bytes from one place to another, file, device memory or stream, by the best path there is
    Copy(copy::Arguments),
    /// Move buffers repeatedly while other processes use them, and check every byte
    Cycle(cycle::Arguments),
    /// Move a file's bytes disk -> buffer -> disk between two processes, and check each byte
    Demo(demo::Arguments),
    /// Say what works on this machine, what does not, why, and what to do about it
    Doctor(doctor::Arguments),
    /// Export part of a device's BAR and hand it to a command or to other processes
    Export(export::Arguments),
    /// Show the devices, what can be exported, and what is missing
    Info(info::Arguments),
    /// Load the tensors of a model file into a buffer, and lend it to other processes
    Load(load::Arguments),
    /// List the dma-bufs of this machine: size, exporter, name, and who holds them
    Ls(ls::Arguments),
    /// Try each exporter with each importer, check the bytes, and show the paths
    Matrix(matrix::Arguments),
    /// Move bytes between two devices, each way, see whether they arrive, and keep the verdict
    Prove(prove::Arguments),
    /// Serve a buffer to another machine by RDMA, or copy a file into or out of such a buffer
    Rdma(rdma::Arguments),
    /// Show the PCI topology, and whether the kernel allows peer-to-peer DMA between each pair of devices
    Topo(topo::Arguments),
    /// Say why two devices can or cannot use each other's memory, and what would change it
    Why(why::Arguments),
    /// Write the manual pages, for packages
    #[command(hide = true)]
    Manual(pages::Manual),
    /// The second process of the demo, started by the first
    #[command(hide = true)]
    DemoWorker,
    /// A worker of the cycle, started by the first process
    #[command(hide = true)]
    CycleWorker,
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Completions(arguments) => pages::completions(&arguments, &Arguments::command()),
        Command::Copy(arguments) => copy::run(&arguments),
        Command::Cycle(arguments) => cycle::run(&arguments),
        Command::CycleWorker => cycle::worker::run(),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Export(arguments) => export::run(&arguments),
        Command::Info(arguments) => info::run(&arguments),
        Command::Load(arguments) => load::run(&arguments),
        Command::Ls(arguments) => ls::run(&arguments),
        Command::Manual(arguments) => pages::manual(&arguments, Arguments::command()),
        Command::Matrix(arguments) => matrix::run(&arguments),
        Command::Prove(arguments) => prove::run(&arguments),
        Command::Rdma(arguments) => rdma::run(&arguments),
        Command::Topo(arguments) => topo::run(&arguments),
        Command::Why(arguments) => why::run(&arguments),
        Command::DemoWorker => demo::worker::run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            if !say::is_nobody_listening(&error) {
                say::remark(format_args!("peerbuf: {error}"));
            }
            ExitCode::FAILURE
        }
    }
}

/// Any error, for `main` to print. Each says what failed and on what.
type Failure = Box<dyn std::error::Error>;
