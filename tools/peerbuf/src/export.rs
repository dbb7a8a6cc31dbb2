//! `peerbuf export`: part of a BAR, for a command or for other processes.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use peerbuf::Access;
use peerbuf::buffer::Buffer;
use peerbuf::export::peerbuf::{Device, Request};
use peerbuf::export::provider;
use peerbuf::plan::topology::PciAddress;
use peerbuf::share::Listener;
use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use crate::{Failure, say, size};

/// Arguments of `peerbuf export`.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// The device's PCI address; `peerbuf info` lists them
    #[arg(value_name = "DDDD:BB:DD.F")]
    device: PciAddress,

    /// The BAR's index, of a device that peerbuf.ko has
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=5))]
    #[arg(required_unless_present = "provider")]
    bar: Option<u8>,

    /// Take memory that the device's own driver lends to peers, such as an NVMe disk's controller
    /// memory buffer
    #[arg(long, conflicts_with_all = ["bar", "offset"])]
    provider: bool,

    /// Where in the BAR, or `any`
    #[arg(long, value_name = "OFFSET", default_value = "any", value_parser = parse_offset)]
    offset: Offset,

    /// How many bytes; a multiple of the page size, as is the offset
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    length: u64,

    /// Allow reading only
    #[arg(long)]
    read_only: bool,

    /// Give the buffer to every process of this user or root that connects to this socket
    #[arg(long, value_name = "PATH", conflicts_with = "command")]
    socket: Option<PathBuf>,

    /// Say what was exported as a JSON object
    #[arg(long)]
    json: bool,

    /// Run this command with the buffer, and free the buffer after it
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

const AFTER_HELP: &str = "\
With a COMMAND the dma-buf is open in it as the descriptor whose number is in $PEERBUF_FD, and
$PEERBUF_LENGTH has its length; the exit status is the command's. With --socket or without either,
the range stays taken until Ctrl-C.

  peerbuf export 0000:03:00.0 --bar 2 --length 16M -- ./consumer
  peerbuf export 0000:03:00.0 --bar 2 --length 16M --offset 1M --socket /run/buffer
  peerbuf export 0000:04:00.0 --provider --length 1M -- ./consumer";

#[derive(Debug, Clone, Copy)]
struct Offset(Option<u64>);

fn parse_offset(text: &str) -> Result<Offset, String> {
    match text {
        "any" => Ok(Offset(None)),
        text => Ok(Offset(Some(size::parse(text)?))),
    }
}

#[derive(Serialize)]
struct Exported {
    buffer: String,
    length: u64,
    writable: bool,
    socket: Option<PathBuf>,
}

/// Exports and holds.
pub fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let access = if arguments.read_only {
        Access::Read
    } else {
        Access::ReadWrite
    };
    let (device, bar) = match arguments.bar {
        Some(bar) => (Device::open(arguments.device)?, bar),
        None => {
            let device = provider::open(arguments.device)?;
            let bar = device.query()?.exportable().map_or(0, |bar| bar.index);
            (device, bar)
        }
    };
    let buffer = device.export(Request {
        bar,
        offset: arguments.offset.0,
        length: arguments.length,
        access,
    })?;
    if let Some((program, rest)) = arguments.command.split_first() {
        if arguments.json {
            announce(arguments, &buffer)?;
        }
        return run_command(program, rest, &buffer);
    }
    // Before anything can be seen of the export, so that no Ctrl-C leaves the socket behind.
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    let listener = arguments.socket.clone().map(Listener::bind).transpose()?;
    announce(arguments, &buffer)?;
    serve(listener.as_ref(), &signals, &buffer)?;
    Ok(ExitCode::SUCCESS)
}

fn announce(arguments: &Arguments, buffer: &Buffer) -> Result<(), Failure> {
    if arguments.json {
        let exported = Exported {
            buffer: buffer.name().into(),
            length: buffer.size(),
            writable: buffer.is_writable(),
            socket: arguments.socket.clone(),
        };
        say::answer(serde_json::to_string(&exported)?)?;
    } else {
        let size = size::show(buffer.size());
        say::answer(format_args!("exported {}, {size}", buffer.name()))?;
        match &arguments.socket {
            Some(socket) => say::answer(format_args!(
                "for those who connect to {}, until Ctrl-C",
                socket.display()
            ))?,
            None => say::answer("held until Ctrl-C")?,
        }
    }
    Ok(())
}

fn run_command(program: &str, rest: &[String], buffer: &Buffer) -> Result<ExitCode, Failure> {
    let dmabuf = buffer.dmabuf().ok_or("the buffer has no dma-buf")?;
    // A copy that survives exec, unlike the original.
    let inherited = rustix::io::dup(dmabuf)?;
    let status = Command::new(program)
        .args(rest)
        .env("PEERBUF_FD", inherited.as_raw_fd().to_string())
        .env("PEERBUF_LENGTH", buffer.size().to_string())
        .status()
        .map_err(|error| format!("{program}: {error}"))?;
    // As a shell has it: 128 and the signal's number.
    let code = status
        .code()
        .or(status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    Ok(ExitCode::from(code as u8))
}

fn serve(listener: Option<&Listener>, signals: &SignalFd, buffer: &Buffer) -> Result<(), Failure> {
    loop {
        let mut waiting = vec![PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        waiting.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        match rustix::event::poll(&mut waiting, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if !waiting[0].revents().is_empty() {
            return Ok(());
        }
        if let Some(listener) = listener {
            let channel = listener.accept()?;
            let peer = channel.peer()?;
            let ours = rustix::process::geteuid().as_raw();
            if peer.uid != ours && peer.uid != 0 {
                say::remark(format_args!(
                    "process {} of user {} was refused",
                    peer.pid, peer.uid
                ));
                continue;
            }
            // One peer that goes away early is no reason to stop serving the others.
            if let Err(error) = channel.send_buffer(&buffer.whole()) {
                say::remark(format_args!("process {}: {error}", peer.pid));
            }
        }
    }
}
