//! `peerbuf rdma`: a server exposes a buffer, and a client writes a file's bytes into it or
//! reads them from it.
//!
//! Data goes only by RDMA. Control messages go over TCP. The client moves at most one bufferful
//! at a time: from the file to its buffer, from buffer to buffer, and, if the server has a
//! file, from the server's buffer to that file. Both ends compute a checksum of their buffer's
//! bytes.
//!
//! Each end lends its buffer to itself, so the buffer can move during a transfer
//! (`--move-every`). Work that a move of either end cuts off is repeated over a new connection.

mod bench;
mod client;
mod lent;
mod place;
mod report;
mod serve;
mod wire;

use std::process::ExitCode;

use peerbuf::plan::Path;
use peerbuf_rdma::{self as rdma, Card, Place, Registration};

use crate::Failure;
use wire::Receipt;

/// Arguments of `peerbuf rdma`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Serve a buffer to every client that connects, until Ctrl-C
    Serve(serve::Arguments),
    /// Write a file's bytes into the server's buffer
    Put(client::Arguments),
    /// Read the server's buffer into a file
    Get(client::Arguments),
    /// Measure the throughput of writes to the server's buffer and of reads from it
    ///
    /// Each figure is for requests of one length, from the first post to the last completion. Afterwards the
    /// server's buffer and the beginning of its --file hold random bytes.
    Bench(bench::Arguments),
}

const AFTER_HELP: &str = "\
  first$  peerbuf rdma serve --listen 10.0.0.1:7471 --buffer bar:0000:04:00.0:2 --size 16M --file /mnt/in
  second$ peerbuf rdma put --connect 10.0.0.1:7471 --buffer bar:0000:04:00.0:2 /mnt/out

Every client that reaches the TCP address may use the buffer, and with --file write the file: there is no
password, and RDMA is not encrypted. Use it on trusted networks only.";

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    match &arguments.command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Put(arguments) => client::put(arguments),
        Command::Get(arguments) => client::get(arguments),
        Command::Bench(arguments) => bench::run(arguments),
    }
}

/// Which card, and where on its network.
#[derive(Debug, Clone, clap::Args)]
pub struct Which {
    /// The RDMA device [default: the first]
    #[arg(long, value_name = "NAME")]
    card: Option<String>,

    /// The device's port [default: the first active port]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    ib_port: Option<u8>,

    /// Index of the address in the port's GID table [default: a RoCE v2 address for IPv4 if there is one]
    #[arg(long, value_name = "N")]
    gid_index: Option<u8>,
}

impl Which {
    fn open(&self) -> Result<Card, Failure> {
        let name = match &self.card {
            Some(name) => name.clone(),
            None => rdma::probe()?.swap_remove(0),
        };
        let mut place = Place::default();
        if let Some(port) = self.ib_port {
            place = place.port(port);
        }
        if let Some(index) = self.gid_index {
            place = place.gid_index(index);
        }
        Ok(Card::open_at(&name, place)?)
    }
}

/// Number of requests that an end has in flight.
const DEPTH: u32 = 16;

fn receipt(registration: &Registration) -> Receipt {
    let plan = registration.plan();
    // The plan for a software card says that the CPU carries the bytes. The CPU takes them from
    // the buffer's own memory, without a copy on the way to the packets.
    let by_processor = registration.rung().is_dma_buf() && plan.path == Path::StagedCopy;
    Receipt {
        card: registration.domain().name().into(),
        buffer: registration.name().into(),
        registration: registration.rung().as_str().into(),
        attempts: registration
            .attempts()
            .iter()
            .map(ToString::to_string)
            .collect(),
        path: match by_processor {
            true => "processor-in-place".into(),
            false => plan.path.as_str().into(),
        },
    }
}
